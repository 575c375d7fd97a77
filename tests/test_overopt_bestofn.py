"""Best-of-n against the mean over all subsets, in memory that 12,600 responses do not burst, and what it refuses."""

import itertools
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from alignax.overopt.bestofn import best_of_n, kl, weights

ORACLES = json.loads((Path(__file__).parent / "oracles" / "ensembles.json").read_text())


def over_all_subsets(proxy: np.ndarray, gold: np.ndarray, n: int) -> float:
    """The mean gold reward of the best of every subset of n; of several best, their mean."""
    best = lambda own: gold[own][proxy[own] == proxy[own].max()].mean()
    return float(np.mean([best(np.array(own)) for own in itertools.combinations(range(len(proxy)), n)]))


def test_every_n_is_the_mean_over_all_subsets_with_ties():
    rng = np.random.default_rng(0)
    proxies = {"a": rng.normal(size=(2, 7)), "b": rng.integers(0, 3, (2, 7)).astype(float), "constant": np.zeros((2, 7))}
    gold = rng.normal(size=(2, 7))
    best = best_of_n(proxies, {"gold": gold}, range(1, 8))
    for name, proxy in proxies.items():
        for p in range(2):
            expected = [over_all_subsets(proxy[p], gold[p], n) for n in range(1, 8)]
            np.testing.assert_allclose(best.values[name]["gold"][p], expected, atol=1e-12)
            expected = [over_all_subsets(proxy[p], proxy[p], n) for n in range(1, 8)]
            np.testing.assert_allclose(best.values[name]["proxy"][p], expected, atol=1e-12)
    np.testing.assert_allclose(best.values["a"]["gold"][:, 0], gold.mean(axis=1))
    np.testing.assert_allclose(best.values["a"]["gold"][:, -1], np.take_along_axis(gold, proxies["a"].argmax(1)[:, None], 1)[:, 0])


@pytest.mark.parametrize("o", ORACLES["best_of_n"], ids=lambda o: o["id"])
def test_numbers_of_the_papers_formula(o):
    proxy, gold = np.array(ORACLES["proxy"]), np.array(ORACLES["gold"])
    found = best_of_n({"one": proxy}, {"gold": gold}, (o["n"],)).values["one"]
    for name in ("proxy", "gold"):
        np.testing.assert_allclose(found[name].mean(), o[name], rtol=1e-9)
    np.testing.assert_allclose(kl(o["n"]), o["kl"], atol=1e-12)


def test_gold_follows_each_proxys_own_order():
    gold = np.array([[1.0, 2.0, 3.0]])
    best = best_of_n({"up": gold, "down": -gold}, {"gold": gold}, (3,)).values
    assert best["up"]["gold"][0, 0] == 3.0 and best["down"]["gold"][0, 0] == 1.0 and best["down"]["proxy"][0, 0] == -1.0


def test_weights():
    np.testing.assert_allclose(weights(5, 2), np.array([0, 1, 2, 3, 4]) / 10)
    for N, n in ((12_600, 1), (12_600, 4096), (12_600, 12_500), (1_000_000, 500_000)):
        assert abs(weights(N, n).sum() - 1) < 1e-9
    with pytest.raises(ValueError, match="best of n = 8 of 7 responses"):
        weights(7, 8)


@pytest.mark.parametrize(("n", "value"), [(1, 0), (2, 0.193147), (16, 1.835089), (1000, 5.908755), (12_500, 8.4336), (60_000, 10.0021)])
def test_kl(n, value):
    assert kl(n) == pytest.approx(value, abs=1e-4)


def test_kl_is_exact_without_ties_and_a_bound_with_them():
    def exact(atoms: int, n: int) -> float:
        p = np.diff(np.linspace(0, 1, atoms + 1) ** n)
        return float(np.sum(p * np.log(p * atoms, where=p > 0, out=np.zeros(atoms))))

    assert exact(100_000, 16) == pytest.approx(kl(16), abs=1e-3)
    assert exact(16, 1000) == pytest.approx(math.log(16), abs=1e-3) and exact(16, 1000) < kl(1000)


def test_twelve_thousand_responses_in_bounded_memory():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(3, 12_600)).astype(np.float32)
    proxies = {str(k): gold + rng.normal(size=gold.shape).astype(np.float32) for k in range(8)}
    n = [2**i for i in range(13)] + [12_500]
    tracemalloc.start()
    best = best_of_n(proxies, {"gold": gold}, n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(n) * 12_600 * 8, "as if of one prompt and one proxy"
    assert np.isfinite(best.values["0"]["gold"]).all()
    # The best of n of a normal proxy with correlation sqrt(1/2): n = 4096 has a maximum of 3.5 to 3.7 standard deviations.
    assert best.values["0"]["gold"][:, 12].mean() == pytest.approx(3.6 / math.sqrt(2), abs=0.4)


def test_duplicate_responses_count_as_often_as_they_occur():
    once = np.array([[1.0, 2.0]])
    twice = np.concatenate([once, once], axis=1)
    best = best_of_n({"a": twice}, {"gold": twice}, (1, 2)).values["a"]["gold"][0]
    np.testing.assert_allclose(best, [1.5, 1 + 5 / 6])


def test_what_is_not_finite_is_left_out_everywhere_and_counted():
    rng = np.random.default_rng(2)
    a, b, gold = rng.normal(size=(3, 1, 6))
    clean = best_of_n({"a": a[:, 2:], "b": b[:, 2:]}, {"gold": gold[:, 2:]}, (1, 3))
    a[0, 0], gold[0, 1] = np.nan, np.inf
    best = best_of_n({"a": a, "b": b}, {"gold": gold}, (1, 3))
    assert best.excluded == 2 and clean.excluded == 0
    for name in ("a", "b"):
        np.testing.assert_allclose(best.values[name]["gold"], clean.values[name]["gold"])
    with pytest.raises(ValueError, match="prompt 0 has 4 responses of 6 with finite scores, too few for n = 5"):
        best_of_n({"a": a, "b": b}, {"gold": gold}, (5,))
    with pytest.raises(ValueError, match="proxy 'a' is not finite for any response"):
        best_of_n({"a": a * np.nan, "b": b}, {"gold": gold}, (1,))


def test_refused():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"value 'gold' has shape \(2, 4\), proxy 'a' \(2, 3\)"):
        best_of_n({"a": x}, {"gold": np.zeros((2, 4))}, (1,))
    with pytest.raises(ValueError, match="at least one proxy, and no value named 'proxy'"):
        best_of_n({"a": x}, {"proxy": x}, (1,))
