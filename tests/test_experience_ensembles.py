"""Aggregates of ensembles: hand-computed numbers, identities, and where their gradients go."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax.experience import chain
from alignax.experience.ensembles import mean, median, quantile, score, uwo, wco
from alignax.types import Model

ORACLES = json.loads((Path(__file__).parent / "oracles" / "ensembles.json").read_text())
SCORES = jnp.array([1.0, 1.2, 2.6])
ALL = {"mean": mean, "median": median, "wco": wco, "uwo": uwo(0.5), "quantile": quantile(0.3)}


@pytest.mark.parametrize(
    ("aggregate", "value"),
    [
        (mean, 1.6),
        (median, 1.2),
        (wco, 1.0),
        (uwo(0.5), 1.346667),  # of the population; the sample variance would make it 1.22
        (quantile(0.25), 1.1),
    ],
)
def test_by_hand(aggregate, value):
    np.testing.assert_allclose(aggregate(SCORES), value, rtol=1e-6)


@pytest.mark.parametrize("o", ORACLES["ensemble"], ids=lambda o: o["id"])
def test_numbers_of_the_papers_formulas(o):
    members = jnp.asarray(ORACLES["members"], jnp.float32)
    aggregate = mean if o["objective"] == "mean" else uwo(o["uwo_weight"])
    np.testing.assert_allclose(aggregate(members), o["reward"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(mean(members) - uwo(1.0)(members), o["variance"], rtol=2e-5, atol=1e-5)


def test_limits_of_one_another():
    scores = jax.random.normal(jax.random.key(0), (4, 3, 7))
    assert uwo(0) is mean and uwo(0.0) is mean
    np.testing.assert_array_equal(quantile(0.0)(scores), wco(scores))
    np.testing.assert_allclose(quantile(0.5)(scores), median(scores), rtol=1e-6)
    assert (wco(scores) <= mean(scores)).all() and (uwo(0.1)(scores) < mean(scores)).all()


@pytest.mark.parametrize("name", ALL)
def test_shapes_one_member_equal_members_and_any_order(name):
    aggregate = ALL[name]
    scores = jax.random.normal(jax.random.key(1), (5, 2, 3))
    assert aggregate(scores).shape == (2, 3)
    np.testing.assert_allclose(aggregate(scores[jnp.array([3, 1, 4, 0, 2])]), aggregate(scores), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(aggregate(scores[:1]), scores[0])
    np.testing.assert_allclose(aggregate(jnp.broadcast_to(scores[:1], scores.shape)), scores[0], rtol=1e-5)
    assert jnp.isnan(aggregate(scores.at[2, 1, 1].set(jnp.nan))[1, 1]), "never averaged in"


def test_gradients():
    grad = lambda aggregate, scores=SCORES: np.asarray(jax.grad(aggregate)(scores))
    np.testing.assert_allclose(grad(mean), [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_array_equal(grad(wco), [1, 0, 0])
    np.testing.assert_array_equal(grad(wco, jnp.array([1.0, 1.0, 2.0])), [0.5, 0.5, 0.0])
    np.testing.assert_array_equal(grad(median), [0, 1, 0])
    np.testing.assert_allclose(grad(quantile(0.25)), [0.5, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(grad(uwo(0.5)), 1 / 3 - (np.array([1.0, 1.2, 2.6]) - 1.6) / 3, atol=1e-6)


def test_refused():
    with pytest.raises(ValueError, match="coefficient of UWO is -0.1; it must be at least 0"):
        uwo(-0.1)
    with pytest.raises(ValueError, match=r"quantile is 1.5; it must be in \[0, 1\]"):
        quantile(1.5)


def member(params, batch):
    """An ensemble whose members score a response by its length, times a factor of their own."""
    lengths = batch["completion_mask"].sum(-1).astype(jnp.float32)
    return tiny.plain_apply(tiny.plain_params(), batch)._replace(scores=lengths[..., None] * params[None, None])


def test_scores_and_their_aggregate_are_written_into_the_batch():
    batch = tiny.batch(4)
    lengths = np.asarray(batch["completion_mask"].sum(-1), np.float32)
    ensemble = Model(member, jnp.array([1.0, 2.0, 6.0]))
    traced = []  # not jit's own count of its entries, which it drops where a process holds many programs
    write = jax.jit(lambda experience, batch: traced.append(1) or experience(batch))
    out = write(chain(score(ensemble, 2), uwo(0.5)), batch)
    assert out["scores"].shape == (4, 2, 3) and out["rewards"].shape == (4, 2)
    np.testing.assert_allclose(out["scores"], lengths[..., None] * np.array([1.0, 2.0, 6.0]), rtol=1e-6)
    np.testing.assert_allclose(out["rewards"], 3 * lengths - 0.5 * lengths**2 * 14 / 3, rtol=1e-5)
    np.testing.assert_array_equal(write(chain(score(ensemble), wco), batch)["rewards"], lengths)
    single = Model(lambda params, batch: member(params, batch)._replace(scores=member(params, batch).scores[..., 0]), jnp.array([3.0]))
    np.testing.assert_array_equal(write(chain(score(single), mean), batch)["rewards"], 3 * lengths)
    assert len(traced) == 3 and write(chain(score(ensemble, 2), uwo(0.5)), batch) and len(traced) == 3


def test_an_aggregate_wants_scores_and_scores_a_reward_model():
    with pytest.raises(ValueError, match=r'no "scores".*score\(ensemble\)'):
        wco(tiny.batch())
    policy = Model(lambda params, batch: tiny.plain_apply(params, batch)._replace(scores=None), tiny.plain_params())
    with pytest.raises(ValueError, match="takes a reward model, but this model gives no scores"):
        score(policy)(tiny.batch())


@pytest.mark.parametrize("members", [(), (3,)])
def test_a_reward_model_of_several_labels_is_no_ensemble(members):
    """Such a model is refused, alone or in an ensemble: its labels would be taken for members."""
    scores = lambda labels: Model(lambda params, batch: None, {"score": jnp.zeros((*members, 8, labels))})  # pyright: ignore
    score(scores(1))
    with pytest.raises(
        ValueError, match="takes a reward model with one score per response, or an ensemble of such models, but this model gives 2"
    ):
        score(scores(2))
