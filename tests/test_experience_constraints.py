"""Constrained RLHF: thresholds met on a bandit, and by hand where the formulas are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from test_experience_advantages import groups

from alignax import experience, losses
from alignax.experience import (
    advance,
    all_ppo,
    chain,
    first_carry,
    gae,
    kl_reward,
    leave_one_out,
    mu_ppo,
    ppo_sat,
    whiten_advantages,
    xi_ppo,
)
from alignax.experience.advantages import last_scored
from alignax.experience.chain import taken
from alignax.run import checkpoint
from alignax.train import init_state, make_step
from alignax.types import Batch, Outputs, Params

ARMS, SAMPLES = 100, 500
NORMAL = np.random.default_rng(0).normal(size=(ARMS, 2)).astype(np.float32)
SCORES = NORMAL @ np.array([[1, 0.5], [0, 0.75**0.5]], np.float32)  # correlation 0.5
OPPOSED = NORMAL @ np.array([[1, -0.6], [0, 0.8]], np.float32)  # correlation -0.6: one rises where the other falls
CASES = ((SCORES, (0.5, 0.5)), (SCORES, (0.9, 0.9)), (SCORES, (-0.3, -0.3)), (OPPOSED, (0.3, 0.3)))
THRESHOLDS = np.array([thresholds for _, thresholds in CASES])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def between(L: np.ndarray) -> np.ndarray:
    return np.array([len(L) - L.sum(), *L])


METHODS = {
    "xi": (xi_ppo, np.tanh, between),
    "mu": (mu_ppo, sigmoid, between),
    "all": (all_ppo, sigmoid, lambda L: np.array([1, *(1 - L)])),
}
each = pytest.mark.parametrize("method", METHODS)


def bandit(params: Params, batch: Batch) -> Outputs:
    """A response is one token, its arm."""
    log_probs = jax.nn.log_softmax(params)
    return Outputs(log_probs[batch["tokens"]], jnp.zeros(batch["tokens"].shape))


def sampled(params: Params, scores: jax.Array | np.ndarray = SCORES) -> Batch:
    """Responses at evenly spaced quantiles of the policy, so that averages are nearly expectations: one group of SAMPLES."""
    places = (jnp.arange(SAMPLES) + 0.5) / SAMPLES
    arms = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(params)), places).clip(0, ARMS - 1)
    batch = {"tokens": arms[None, :, None], "completion_mask": jnp.ones((1, SAMPLES, 1), bool), "scores": jnp.asarray(scores)[arms][None]}
    return batch | {"old_logps": bandit(params, batch).logps, "ref_logps": jnp.full((1, SAMPLES, 1), -jnp.log(float(ARMS)))}


@functools.cache
def trained(method: str, steps: int = 1000) -> list[np.ndarray]:
    """Means over the last 400 steps for each of CASES: expected scores [4, 2], multipliers [4, 2] and KL [4]."""
    step = make_step(bandit, losses.ppo(), optax.sgd(10.0))

    def train(scores, thresholds):
        constraints = METHODS[method][0](thresholds)

        def one(state, _):
            carry, batch, seen = advance(constraints, state.carry, sampled(state.params, scores))
            state, _ = step(state.replace(carry=carry), batch)
            p = jax.nn.softmax(state.params)
            return state, (p @ scores, jnp.stack([seen[f"constraint/multiplier_{k}"] for k in (0, 1)]), p @ jnp.log(ARMS * p))

        state = init_state(jnp.zeros(ARMS), optax.sgd(10.0), jax.random.key(0))
        _, path = jax.lax.scan(one, state.replace(carry=first_carry(constraints)), length=steps)  # type: ignore[attr-defined]
        return [x[-400:].mean(axis=0) for x in path]

    return [np.asarray(x) for x in jax.jit(jax.vmap(train))(jnp.stack([scores for scores, _ in CASES]), jnp.array(THRESHOLDS))]


@pytest.mark.parametrize("method", runs.slow_but(["xi", "mu"], "mu"))
def test_thresholds_that_both_reach_are_met(method):
    reached, multipliers, kl = (x[:2] for x in trained(method))
    assert np.abs(SCORES.mean(axis=0)).max() < 0.1, "the reference is far from every threshold"
    assert np.abs(reached - THRESHOLDS[:2]).max() < 0.05
    assert (multipliers > 0).all() and 0.1 < kl[0] < kl[1]


@pytest.mark.slow
def test_all_ppo_ends_at_or_below_where_xi_ends_at_and_mu_at_or_above():
    """The order of the paper's figure 5, on thresholds above the reference; rewards that are opposed are not worth their KL to All-PPO."""
    above = [0, 1, 3]
    xi, mu, below = (trained(method)[0][above] - THRESHOLDS[above] for method in METHODS)
    assert np.abs(xi).max() < 0.05 and mu.min() > -0.05 and below.max() < 0.05
    assert below[-1].max() < -0.15 and trained("all")[2][3] < 0.02
    assert (trained("all")[1][:2] > 0.1).all(), "and otherwise its multipliers hold the scores down"


def test_bounded_multipliers_do_not_enforce_every_threshold():
    """Thresholds below what the reference scores: for mu-PPO they are met at no cost, for xi-PPO out of its bounded reach."""
    (xi, bound, _), (mu, free, kl) = ([x[2] for x in trained(method)] for method in ("xi", "mu"))
    assert (bound < -0.9).all() and (xi > -0.2).all()
    assert (free < 0.3).all() and (mu > -0.2).all() and kl < 0.01


# --- by hand ---


def scored(T: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Groups of responses of several lengths, with scores of two reward models."""
    rng = np.random.default_rng(seed)
    batch = groups(rng.normal(size=(4, 3)), T, seed)
    del batch["values"]
    return batch | {"scores": rng.normal(size=(4, 3, 2)).astype(np.float32), "tokens": np.zeros(batch["completion_mask"].shape, np.int32)}


PROGRAM = jax.jit(lambda constraints, carry, batch: constraints.function(carry, batch))


def at(constraints, x: list[float], batch: dict) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Carry and batch after one of `batch`, lambda being x before it."""
    return jax.tree.map(np.array, PROGRAM(constraints, (jnp.array(x), jnp.full(len(x), 0.2)), batch))


def whitened(rewards: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Leave-one-out advantages of rewards [B, N], whitened over tokens: [B, N, T]."""
    N = rewards.shape[1]
    alone = (rewards - rewards.mean(1, keepdims=True)) * N / (N - 1)
    tokens = np.broadcast_to(alone[..., None], mask.shape)
    return np.where(mask, (tokens - tokens[mask].mean()) / tokens[mask].std(ddof=1), 0.0)


@each
@pytest.mark.parametrize("x", [[0.0, 0.0], [0.7, -1.3]], ids=["at_0", "elsewhere"])
def test_the_advantage_is_a_sum_of_whitened_ones(method, x):
    make, bounded, weighted = METHODS[method]
    batch = scored()
    mask, L = batch["completion_mask"], bounded(np.array(x))
    _, after = at(make((0.5, 0.5)), x, batch)
    kl = np.where(mask, batch["old_logps"] - batch["ref_logps"], 0.0).sum(-1)
    own = [whitened(r, mask) for r in (-kl, batch["scores"][..., 0], batch["scores"][..., 1])]
    weights = weighted(L)
    assert method == "all" or weights.sum() == pytest.approx(2)
    if not any(x):
        np.testing.assert_allclose(weights, [2, 0, 0] if method == "xi" else [1, 0.5, 0.5])
    np.testing.assert_allclose(after["advantages"], np.tensordot(weights, own, 1), atol=2e-5)
    after, seen = taken(after)
    np.testing.assert_allclose([seen[f"constraint/multiplier_{k}"] for k in (0, 1)], L, rtol=1e-6)
    assert not {name for name in after if "multiplier" in name}


@each
def test_a_multiplier_takes_weight_from_a_score_above_its_threshold(method):
    make, bounded, weighted = METHODS[method]
    batch, x, h = scored(), np.array([0.3, -0.4]), 1e-5
    mean = batch["scores"].mean((0, 1))
    for slack in (np.array([0.2, -0.1]), np.array([-3.0, 4.0])):
        (after, velocity), _ = at(make(mean - slack, learning_rate=0.5, momentum=0.3), list(x), batch)
        gradient = (bounded(x + h) - bounded(x - h)) / (2 * h) * slack * (-1 if method == "all" else 1)
        gradient *= min(1, 0.5 / np.linalg.norm(gradient))
        np.testing.assert_allclose(velocity, 0.3 * 0.2 + gradient, rtol=2e-4)
        np.testing.assert_allclose(after, x - 0.5 * velocity, rtol=1e-5)
        # Lambda falls where the score is above its threshold; All-PPO's, which takes the reward's weight away, rises.
        assert (np.sign(gradient) == np.sign(-slack if method == "all" else slack)).all()
    still = PROGRAM(make(mean - np.array([0.2, -0.1])), first_carry(make((0.0, 0.0)))[f"{method}_ppo"], batch)[0][0]
    assert weighted(bounded(still))[1] < weighted(bounded(np.zeros(2)))[1] < weighted(bounded(still))[2]


def test_with_one_reward_and_a_multiplier_that_stays_it_is_plain_ppo():
    """On the reward that is each one's share over its spread; responses of one token, so that whitening centres nothing."""
    constraints, optimizer = mu_ppo((0.5,), learning_rate=0.0), optax.sgd(1.0)
    step = make_step(bandit, losses.ppo(), optimizer)

    @jax.jit
    def moves(params):
        batch = sampled(params)
        batch["scores"] = batch["scores"][..., :1]
        carry, constrained = constraints.function((jnp.full(1, 1.0), jnp.zeros(1)), batch)
        kl, score = (batch["old_logps"] - batch["ref_logps"])[..., 0], batch["scores"][..., 0]
        L, share = jax.nn.sigmoid(1.0), (SAMPLES - 1) / SAMPLES  # leave-one-out makes advantages that much larger than their spread says
        penalised = kl_reward((1 - L) / jnp.std(kl, ddof=1) * share)(batch | {"rewards": L / jnp.std(score, ddof=1) * share * score})
        plain = leave_one_out()(penalised)
        state = init_state(params, optimizer, jax.random.key(0))
        return carry, [step(state, x)[0].params - params for x in (constrained, plain)]

    (x, _), (moved, also) = moves(jnp.asarray(np.random.default_rng(1).normal(size=ARMS), jnp.float32))
    assert x[0] == 1.0 and np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(moved, also, atol=1e-6)


@each
def test_a_missing_score_takes_its_response_out(method):
    make, batch = METHODS[method][0]((0.5, 0.5)), scored()
    batch["scores"][1, 2, 0] = np.nan
    carry, after = at(make, [0.7, 0.3], batch)
    without = batch | {"completion_mask": batch["completion_mask"].copy(), "scores": np.nan_to_num(batch["scores"])}
    without["completion_mask"][1, 2] = False
    other_carry, other = at(make, [0.7, 0.3], without)
    assert not after["advantages"][1, 2].any() and after["advantages"][1, 1].any()
    np.testing.assert_allclose(after["advantages"], other["advantages"], atol=1e-6)
    np.testing.assert_allclose(carry, other_carry, rtol=1e-6)
    (x, velocity), nothing = at(make, [0.7, 0.3], batch | {"scores": np.full((4, 3, 2), np.nan, np.float32)})
    assert not nothing["advantages"].any()
    np.testing.assert_allclose(velocity, 0.1 * 0.2, rtol=1e-6)  # what was left of the last step


def test_another_estimator_and_rewards_of_tokens_that_are_not_read():
    batch = scored()
    batch["token_rewards"] = batch["ref_logps"]
    _, after = at(mu_ppo((0.5, 0.5), estimator=experience.rewards_to_go()), [0.0, 0.0], batch)
    whole = jax.jit(lambda batch: chain(experience.rewards_to_go(), whiten_advantages())(batch)["advantages"])
    last = last_scored(batch)[..., None] * batch["scores"][:, :, None]  # [B, N, T, 2]
    kl = jnp.asarray(batch["ref_logps"] - batch["old_logps"])
    parts = [whole(batch | {"token_rewards": x}) for x in (kl, last[..., 0], last[..., 1])]
    np.testing.assert_allclose(after["advantages"], parts[0] + 0.5 * parts[1] + 0.5 * parts[2], atol=1e-5)
    assert "returns" not in after


@each
def test_each_reward_has_a_value_head_of_its_own(method):
    """Generalised advantages of each reward by its own values, in numpy; a response without one of its scores has none."""
    make, bounded, weighted = METHODS[method]
    lam, batch, x = 0.9, scored(), np.array([0.7, -0.4])
    mask, batch["values"] = batch["completion_mask"], np.random.default_rng(5).normal(size=(4, 3, 7, 3)).astype(np.float32)
    batch["scores"][1, 2, 0] = np.nan
    _, after = at(make((0.5, 0.5), estimator=gae(lam=lam)), list(x), batch)
    known = mask & np.isfinite(batch["scores"]).all(-1)[..., None]
    last = last_scored(batch)[..., None] * batch["scores"][:, :, None]
    rewards = np.concatenate([(batch["ref_logps"] - batch["old_logps"])[..., None], np.asarray(last)], axis=-1)  # [B, N, T, 3]
    own = np.zeros(rewards.shape)
    for b, n, k in np.ndindex(4, 3, 3):
        following, advantage = 0.0, 0.0
        for t in np.flatnonzero(known[b, n])[::-1]:
            value = batch["values"][b, n, t, k]
            advantage = rewards[b, n, t, k] + following - value + lam * advantage
            following, own[b, n, t, k] = value, advantage
    np.testing.assert_allclose(after["returns"], np.where(mask[..., None], own + batch["values"], 0.0), atol=2e-5)
    white = [np.where(known, (a - a[known].mean()) / a[known].std(ddof=1), 0.0) for a in np.moveaxis(own, -1, 0)]
    np.testing.assert_allclose(after["advantages"], np.tensordot(weighted(bounded(x)), white, 1), atol=5e-5)


def test_a_reward_that_is_largest_at_thresholds():
    """PPO-SAT: by hand; and policies that are best under it and some KL come near thresholds in reach, where gold need not be."""
    given = np.array([[1.0, -1.0, 0.5], [0.0, 2.0, 0.25]])  # [K, ...]
    np.testing.assert_allclose(ppo_sat((0.5, 0.25))(jnp.asarray(given)), [-0.25 - 0.0625, -2.25 - 1.75**2, 0.0])
    batch = scored()
    np.testing.assert_allclose(ppo_sat((0.5, 0.25))(batch)["rewards"], -np.square(batch["scores"] - [0.5, 0.25]).sum(-1), rtol=1e-5)
    for thresholds in THRESHOLDS[:3]:
        p = jax.nn.softmax(ppo_sat(tuple(thresholds))(jnp.asarray(SCORES.T)) / 0.1)  # the optimum at a KL coefficient of 0.1
        assert np.abs(p @ SCORES - thresholds).max() < 0.15


def test_a_policy_trained_on_that_reward_comes_near_its_optimum():
    methods = chain(ppo_sat((0.9, 0.9)), kl_reward(0.3), leave_one_out(), whiten_advantages())
    step = make_step(bandit, losses.ppo(), optax.sgd(10.0))
    move = lambda state, _: (step(state, methods(sampled(state.params)))[0], jax.nn.softmax(state.params) @ SCORES)
    path = jax.jit(lambda state: jax.lax.scan(move, state, length=300)[1])(init_state(jnp.zeros(ARMS), optax.sgd(10.0), jax.random.key(0)))
    best = jax.nn.softmax(ppo_sat((0.9, 0.9))(jnp.asarray(SCORES.T)) / 0.3) @ SCORES
    assert np.abs(path[0]).max() < 0.1 and np.abs(path[-100:].mean(0) - best).max() < 0.1 and np.abs(best - 0.9).max() < 0.2


def test_multipliers_are_in_checkpoints(tmp_path):
    constraints = chain(xi_ppo((0.5, 0.5), initial=0.3))
    make = lambda: init_state({"logits": jnp.zeros(ARMS)}, optax.sgd(1.0), jax.random.key(0))
    carry = {"xi_ppo": PROGRAM(constraints.functions[0], first_carry(constraints)["xi_ppo"], scored())[0]}  # type: ignore[attr-defined]
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(make().replace(carry=carry), {}, {})  # type: ignore[attr-defined]
    saver.close()
    restored = checkpoint.Checkpoints(tmp_path).restore(0, make().replace(carry=first_carry(constraints)))  # type: ignore[attr-defined]
    assert carry["xi_ppo"][0][0] != np.float32(0.3)
    jax.tree.map(np.testing.assert_array_equal, restored.carry, carry)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: xi_ppo(()), "give a number for each reward model"),
        (lambda: xi_ppo((0.5,), momentum=1.0), "momentum is 1.0"),
        (lambda: mu_ppo((0.5,), learning_rate=-1.0), "learning_rate is -1.0"),
        (lambda: mu_ppo((0.5,))(scored()), "1 thresholds for 2 reward models"),
        (lambda: mu_ppo((0.5, 0.5))(groups([[0.0, 1.0]])), 'has no "scores"'),
        (lambda: jax.eval_shape(all_ppo((0.5, 0.5), estimator=gae()), scored()), 'has no "values"'),
        (
            lambda: all_ppo((0.5, 0.5))(scored() | {"values": np.zeros((4, 3, 7))}),
            "has 1 value heads for the KL and 2 .* set model.critic_heads=3",
        ),
        (
            lambda: xi_ppo((0.5, 0.5))(scored() | {"values": np.zeros((4, 3, 7, 2))}),
            "the critic has 2 value heads for the KL and 2 reward models",
        ),
        (lambda: ppo_sat((0.5, np.nan)), "give a number for each reward model"),
        (lambda: ppo_sat((0.5,))(scored()), "1 thresholds for 2 reward models"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
