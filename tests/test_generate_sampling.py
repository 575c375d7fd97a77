"""Sampling from logits: transformers' processors as the oracle, and draws against the cumulative distribution in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignax.generate.sampling import Sampling, draw, most_probable, nucleus, penalised, pick, weights

V = 1000
LOGITS = np.asarray(3 * jax.random.normal(jax.random.key(0), (32, V)), np.float32)
ROWS = np.asarray(jax.random.randint(jax.random.key(1), (32, 20), 0, V))
REAL = np.arange(20)[None] < np.arange(1, 33)[:, None]
WARPS = {
    "temperature": Sampling(temperature=0.6),
    "top_k": Sampling(top_k=7),
    "top_k of more than there are": Sampling(top_k=V + 1),
    "top_p": Sampling(top_p=0.8),
    "a tiny top_p": Sampling(top_p=1e-6),
    "min_p": Sampling(min_p=0.05),
    "penalty": Sampling(repetition_penalty=1.4),
    "all": Sampling(temperature=1.7, top_k=40, top_p=0.7, min_p=0.02, repetition_penalty=0.8),
}


def of_transformers(s: Sampling) -> np.ndarray:
    """Probabilities [32, V], from its processors in its order."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(s.repetition_penalty), TemperatureLogitsWarper(s.temperature)])
    processors += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    processors += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    processors += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    rows = [processors(torch.tensor(r[m][None]), torch.tensor(z[None])) for z, r, m in zip(LOGITS, ROWS, REAL, strict=True)]
    return torch.softmax(torch.cat(rows).double(), -1).numpy()


@pytest.mark.parametrize("name", WARPS)
def test_distributions_are_those_of_transformers(name):
    s = WARPS[name]
    w = np.asarray(weights(s, penalised(jnp.asarray(LOGITS), jnp.asarray(ROWS), jnp.asarray(REAL), s.repetition_penalty)), np.float64)
    theirs = of_transformers(s)
    np.testing.assert_array_equal(w > 0, theirs > 0)
    np.testing.assert_allclose(w / w.sum(1, keepdims=True), theirs, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 999])
def test_the_k_largest_whatever_their_signs_and_sizes(k):
    z = np.concatenate([LOGITS, 1e30 * LOGITS, 1e-30 * LOGITS, -np.abs(LOGITS), np.abs(LOGITS)])
    kept = np.asarray(jax.jit(most_probable, static_argnums=1)(z, k))
    assert (kept.sum(1) == k).all()
    np.testing.assert_array_equal(kept, z >= np.sort(z, axis=1)[:, -k][:, None])


def test_ties_are_kept_together():
    z = jnp.asarray([[0.0, 1.0, 1.0, 1.0, 2.0]])
    np.testing.assert_array_equal(most_probable(z, 2)[0], [False, True, True, True, True])
    np.testing.assert_array_equal(nucleus(jnp.exp(z - 2), 0.5)[0], [False, True, True, True, True])


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    w = np.exp(LOGITS - LOGITS.max(1, keepdims=True))
    for p in (0.01, 0.3, 0.99):
        kept = np.asarray(nucleus(jnp.asarray(w), p))
        share = (w * kept).sum(1) / w.sum(1)
        smallest = np.where(kept, w, np.inf).min(1) / w.sum(1)
        assert (share >= p - 1e-5).all() and (share - smallest < p + 1e-5).all()
        assert (np.where(kept, w, np.inf).min(1) >= np.where(kept, 0, w).max(1)).all()


def test_the_draw_inverts_the_cumulative_distribution():
    w = np.where(LOGITS > 0, np.exp(LOGITS), 0.0)[:1].astype(np.float32)
    ends = np.cumsum(w[0].astype(np.float64)) / w.sum(dtype=np.float64)
    u = np.linspace(0, 1, 4001)[:-1].astype(np.float32)
    drawn = np.asarray(jax.jit(pick)(jnp.asarray(np.repeat(w, len(u), 0)), jnp.asarray(u)))
    expected = np.searchsorted(ends, u, side="right")
    clear = np.abs(ends[None] - u[:, None]).min(1) > 1e-6  # others lie on a boundary, to rounding
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(drawn[clear], expected[clear])
    assert (w[0][drawn] > 0).all()


@pytest.mark.parametrize("size", [3, 128, 129, 1000])
def test_a_draw_never_takes_what_has_no_weight(size):
    for place in {0, size // 2, size - 1}:
        w = jnp.zeros((3, size)).at[:, place].set(jnp.asarray([1e-30, 1.0, 3e7]))
        for u in (0.0, 0.5, 1 - 2**-24):
            np.testing.assert_array_equal(pick(w, jnp.full(3, u)), place)


def test_greedy_takes_the_first_of_the_largest_and_no_number():
    z = jnp.asarray([[0.0, 5.0, 5.0, -1.0]] * 2)
    none = jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1), bool)
    token, logp, drawn = draw(Sampling(temperature=0.0), z, *none, jnp.asarray([0.0, 0.9]))
    np.testing.assert_array_equal(drawn, 0)  # there is no other
    np.testing.assert_array_equal(token, [1, 1])
    np.testing.assert_allclose(logp, jax.nn.log_softmax(z)[:, 1], rtol=1e-6)


def test_log_probs_are_the_models_own_whatever_the_warp():
    u = jax.random.uniform(jax.random.key(2), (32,))
    for s in (Sampling(), WARPS["all"]):
        token, logp, _ = draw(s, jnp.asarray(LOGITS), jnp.asarray(ROWS), jnp.asarray(REAL), u)
        exact = torch.log_softmax(torch.tensor(LOGITS).double(), -1).numpy()[np.arange(32), np.asarray(token)]
        np.testing.assert_allclose(logp, exact, atol=2e-6)


def test_which_distributions_are_the_models_own():
    assert Sampling().exact and not any(s.exact for s in WARPS.values()) and not Sampling(temperature=0.0).exact
    assert str(WARPS["all"]) == "temperature 1.7, top_k 40, top_p 0.7, min_p 0.02, repetition_penalty 0.8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 1 or more, or 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_values_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
