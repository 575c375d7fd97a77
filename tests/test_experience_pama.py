"""PAMA: the combination of several rewards' advantages whose square is the least, by hand and on a bandit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experience_advantages import groups, of_responses

from alignax.experience import advance, pama
from alignax.experience.pama import nearest_to_0


def scored(scores):
    scores = jnp.asarray(scores, jnp.float32)
    return groups(np.zeros(scores.shape[:2])) | {"scores": scores}


def test_a_response_gains_what_the_least_of_its_rewards_gains():
    """Group 0: the rewards disagree on the first two, and both find the third better; group 1: what one prefers the other does not."""
    scores = np.stack([[[0.0, 1.0, 5.0], [0.0, 1.0, 2.0]], [[0.0, 3.0, 3.0], [2.0, 1.0, 0.0]]], axis=-1)
    _, batch, metrics = advance(pama(), {}, scored(scores))
    least = 1 / (np.sqrt(3) + 1e-4)  # of (-2, 1, 1) over a deviation of sqrt(3), where (-2, -1, 3) / sqrt(7) has 1.134
    np.testing.assert_allclose(of_responses(batch), [[0, 0, least], [0, 0, 0]], rtol=1e-6)
    assert metrics["pama/agreed"] == pytest.approx(1 / 6)


def test_no_combination_has_a_smaller_square():
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    weights = np.array([(a, b, 20 - a - b) for a in range(21) for b in range(21 - a)]) / 20
    found = np.asarray(nearest_to_0(values))
    assert (found**2 <= ((values @ weights.T) ** 2).min(axis=1) + 1e-6).all()
    assert (found == np.where((values > 0).all(1), values.min(1), np.where((values < 0).all(1), values.max(1), 0))).all()
    assert {0, 1, -1} == set(np.sign(found))


def test_a_response_with_a_missing_score_is_left_out():
    """The response does not count in the statistics of the other reward either."""
    scores = np.random.default_rng(1).normal(size=(2, 4, 2))
    missing = scores.copy()
    missing[0, 3, 1] = np.nan
    found = of_responses(pama()(scored(missing)))
    assert found[0, 3] == 0 and np.isfinite(found).all()
    np.testing.assert_allclose(found[0, :3], of_responses(pama()(scored(scores[:, :3])))[0], rtol=1e-5)


def test_both_rewards_of_a_bandit_rise_where_their_sum_gives_one_up():
    """40 arms, exact gradients; of the sum the reward of the smaller scale falls with 8 of 20 seeds, these among them."""
    bandits = np.stack([np.random.default_rng(seed).normal(size=(40, 2)) * [1.0, 5.0] for seed in (1, 3, 4)]).astype(np.float32)

    def largest_fall(combined, scores):
        def one(logits, _):
            p = jax.nn.softmax(logits)
            advantage = combined(scores - (p @ scores)[None])
            return logits + 0.5 * p * (advantage - p @ advantage), p @ scores

        _, means = jax.lax.scan(one, jnp.zeros(40), length=500)
        return (means[:-1] - means[1:]).max()

    falls = lambda combined: jax.jit(jax.vmap(functools.partial(largest_fall, combined)))(bandits)
    assert (falls(lambda a: nearest_to_0(jnp.maximum(a, 0.0))) < 0).all()
    assert (falls(lambda a: a.sum(axis=1)) > 0.1).all()


def test_a_single_reward_is_refused():
    with pytest.raises(ValueError, match=r"pama\(\) needs several rewards, but scores have 1"):
        pama()(scored(np.zeros((2, 3, 1))))
