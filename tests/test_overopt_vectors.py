"""What the world of vectors must show, and its absence where it must not be; margins from the testbeds of three papers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from alignax import config, dpo, rpo
from alignax.config import BadInput
from alignax.overopt import laboratory, results, vectors
from alignax.train import init_state

FILE = runs.REPO / "experiments" / "overoptimization.py"


@functools.cache
def experiment(*overrides: str):
    return config.load_experiment(FILE, overrides)


def settings(*overrides: str):
    return experiment(*overrides).config


def world(*overrides: str):
    own = experiment(*overrides)
    return vectors.vectors(own.config, own.loss(own.config))


@functools.cache
def best_of_n(seeds: int, *overrides: str) -> dict[str, dict[str, float]]:
    """Objective -> peak, final and drop of the mean gold reward."""
    names = experiment(*overrides).loss.__globals__["ensembles"]
    aggregates = {"mean": names.mean, "WCO": names.wco, "UWO": names.uwo(0.5)}
    sizes = tuple(4**i for i in range(7))
    m = laboratory.score("tail", world(*overrides).score(range(seeds)), aggregates, sizes, range(seeds))
    return {curve.objective: results.peak(curve) for curve in results.curves([m])}


@functools.cache
def direct(seeds: int, objective: str, beta: float, *overrides: str) -> dict[str, np.ndarray]:
    """Quantity -> mean over seeds, [E]."""
    loss = {"DPO": dpo, "RPO": lambda beta: rpo(beta, 0.05)}[objective](beta)
    trajectories = world(*overrides).align(range(seeds), loss)
    m = laboratory.align("tail", objective, beta, trajectories, range(seeds))
    return {name: np.mean(values, axis=0) for name, values in m["curves"].items()}


def check_tail(ends: dict[str, dict[str, float]]) -> None:
    final, drop = ({name: x[key] for name, x in ends.items()} for key in ("final", "drop"))
    assert final["UWO"] - final["mean"] >= 0.5
    assert final["WCO"] > final["single"]
    assert drop["single"] >= 0.5
    assert drop["UWO"] < drop["mean"]


@pytest.mark.slow
def test_conservative_ensembles_hold_what_a_single_proxy_and_the_mean_lose():
    check_tail(best_of_n(3))


@pytest.mark.slow
def test_without_the_tail_nothing_is_overoptimised():
    for name, x in best_of_n(3, "world.tail=0").items():
        assert x["drop"] <= 0.15, name
        assert x["final"] > 1.0, name


@pytest.mark.slow
@pytest.mark.long
def test_eight_seeds():
    ends = best_of_n(8)
    check_tail(ends)
    assert ends["UWO"]["drop"] <= 0.6 * ends["mean"]["drop"]
    for name, x in best_of_n(8, "world.tail=0").items():
        assert x["drop"] <= 0.15 and x["final"] > 1.0, name


SHORT = ("direct.steps=400",)


def check_direct(dpo: dict[str, np.ndarray], rpo: dict[str, np.ndarray]) -> None:
    E = len(dpo["gold"])
    assert dpo["gold"][: E // 4 + 1].max() - dpo["gold"][-1] >= 0.4, "peaks early and falls"
    assert rpo["gold"][-1] - dpo["gold"][-1] >= 0.4
    assert dpo["chosen_drift"][-1] < rpo["chosen_drift"][-1] < 0, "both let the chosen fall, DPO much further"
    assert (np.diff(dpo["proxy"][[0, E // 4, -1]]) > 0).all(), "what is trained rises all the while"
    assert dpo["kl"][0] == pytest.approx(0, abs=1e-4) and dpo["gold"][0] == pytest.approx(0, abs=1e-4), "starts from the reference"


@pytest.mark.slow
def test_dpo_peaks_early_and_falls_where_rpo_holds():
    check_direct(direct(3, "DPO", 0.02, *SHORT), direct(3, "RPO", 0.02, *SHORT))


@pytest.mark.long
@pytest.mark.slow
def test_eight_seeds_of_direct_alignment():
    narrow, wide = direct(8, "DPO", 0.02), direct(8, "DPO", 0.5)
    check_direct(narrow, direct(8, "RPO", 0.02))
    assert narrow["kl"][-1] > wide["kl"][-1] + 0.2, "smaller beta, larger KL"


def test_members_share_their_noise_unless_told_not_to():
    key = jax.random.key(0)
    shared = np.asarray(vectors.flips(key, 1000, 5, settings()))
    assert (shared == shared[0]).all() and 0.2 < shared.mean() < 0.3
    each = np.asarray(vectors.flips(key, 1000, 5, settings("world.shared_noise=false")))
    assert len(np.unique(each, axis=0)) == 5 and 0.2 < each.mean() < 0.3


def test_flipped_pairs_change_sides():
    pairs = jnp.arange(12).reshape(3, 2, 2)
    changed = np.asarray(vectors.relabelled(pairs, jnp.array([False, True, False])))
    np.testing.assert_array_equal(changed, [[[0, 1], [2, 3]], [[6, 7], [4, 5]], [[8, 9], [10, 11]]])


def test_pairs_of_the_pool_have_the_labels_that_they_should():
    gold, flipped = jnp.arange(50) / 50.0, jnp.arange(40) < 10
    chosen, rejected = np.asarray(vectors.random_pairs(jax.random.key(0), gold, flipped))[:, :, 0].T
    assert (chosen[:10] <= rejected[:10]).all() and (chosen[10:] >= rejected[10:]).all() and (chosen != rejected).any()


@pytest.mark.slow
def test_a_single_reward_model():
    tiny = ("world.pairs=64", "world.responses=8", "world.prompts=2", "world.held_out=16", "proxy.steps=3", "best_of_n.n=(1,2)")
    one = next(iter(world(*tiny, "proxy.members=1").score([7])))
    assert one.members.shape == (1, 2, 8) and one.gold.shape == (2, 8) and one.margins.shape == (1, 16)
    assert one.show(1, 3)[0] == "prompt 1" and "|x| = " in one.show(1, 3)[1]


def test_gold_is_standardised_and_bad_far_out():
    own = settings().world
    gold = vectors.make_gold(jax.random.key(3), own)
    x = vectors.draw(jax.random.key(4), (20_000,), own)
    r = np.asarray(vectors.rewards(gold, x, own))
    assert abs(r.mean()) < 0.03 and abs(r.std() - 1) < 0.03
    far = np.asarray(jnp.linalg.norm(x, axis=-1)) >= 1.45 * 4
    assert 0.005 < far.mean() < 0.03 and len(np.unique(r[far])) == 1 and r[far][0] < -0.9
    pair = vectors.ordered(gold, x.reshape(-1, 2, 16), own)
    assert (np.diff(np.asarray(vectors.rewards(gold, pair, own)), axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world.noise=0.7", r"'world.noise' is 0.7; it must be in 0 ... 0.5"),
        ("proxy.members=0", r"'proxy.members' is 0; it must be in 1 ..."),
        ("world.responses=100", r"best of n = 4096 of 100 responses; .* raise world.responses to 4096"),
        ("direct.steps=90", r"90, not a multiple of direct.every \(25\)"),
        ("world.radius=0.0", r"the gold reward is -1 for every response"),
    ],
)
def test_settings_that_measure_nothing_are_refused(override, message):
    with pytest.raises(BadInput, match=message):
        next(iter(world(override).score([0])))


def test_models_that_diverge_are_no_measurement():
    state = init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), jax.random.key(0))
    vectors.check_trained(state)
    with pytest.raises(FloatingPointError, match=r"3 training steps of 2 models were not finite; lower the learning rate"):
        vectors.check_trained(dataclasses.replace(state, skipped=jnp.array([0, 3])))
