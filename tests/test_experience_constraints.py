"""Constrained RLHF: thresholds met on a bandit, by hand where the formulas are, and the search for thresholds on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_experience_advantages import groups

from alignax import checkpoint, experience, losses
from alignax.experience import (
    advance,
    chain,
    first_carry,
    kl_reward,
    leave_one_out,
    mu_ppo,
    nelder_mead,
    proxy_point,
    whiten_advantages,
    xi_ppo,
)
from alignax.experience.advantages import last_scored
from alignax.train import init_state, make_step
from alignax.types import Batch, Outputs, Params

ARMS, SAMPLES = 100, 500
THRESHOLDS = ((0.5, 0.5), (0.9, 0.9), (-0.3, -0.3))
METHODS = {"xi": (xi_ppo, np.tanh), "mu": (mu_ppo, lambda x: 1 / (1 + np.exp(-x)))}
both = pytest.mark.parametrize("method", METHODS)


SCORES = np.random.default_rng(0).normal(size=(ARMS, 2)).astype(np.float32) @ np.array([[1, 0.5], [0, 0.75**0.5]], np.float32)


def bandit(params: Params, batch: Batch) -> Outputs:
    """A response is one token, its arm."""
    log_probs = jax.nn.log_softmax(params)
    return Outputs(log_probs[batch["tokens"]], jnp.zeros(batch["tokens"].shape))


def sampled(params: Params) -> Batch:
    """Responses at evenly spaced quantiles of the policy, so that averages are nearly expectations: one group of SAMPLES."""
    places = (jnp.arange(SAMPLES) + 0.5) / SAMPLES
    arms = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(params)), places).clip(0, ARMS - 1)
    batch = {"tokens": arms[None, :, None], "completion_mask": jnp.ones((1, SAMPLES, 1), bool), "scores": jnp.asarray(SCORES)[arms][None]}
    return batch | {"old_logps": bandit(params, batch).logps, "ref_logps": jnp.full((1, SAMPLES, 1), -jnp.log(float(ARMS)))}


@functools.cache
def trained(method: str, steps: int = 1000) -> list[np.ndarray]:
    """Of each of THRESHOLDS, means over the last 400 steps: expected scores [3, 2], multipliers [3, 2] and KL [3]."""
    step = make_step(bandit, losses.ppo(), optax.sgd(10.0))

    def train(thresholds):
        constraints = METHODS[method][0](thresholds)

        def one(state, _):
            carry, batch = advance(constraints, state.carry, sampled(state.params))
            state, _ = step(state.replace(carry=carry), batch)
            p = jax.nn.softmax(state.params)
            return state, (p @ SCORES, batch["multipliers"][0], p @ jnp.log(ARMS * p))

        state = init_state(jnp.zeros(ARMS), optax.sgd(10.0), jax.random.key(0))
        _, path = jax.lax.scan(one, state.replace(carry=first_carry(constraints)), length=steps)  # type: ignore[attr-defined]
        return [x[-400:].mean(axis=0) for x in path]

    return [np.asarray(x) for x in jax.jit(jax.vmap(train))(jnp.array(THRESHOLDS))]


@both
def test_thresholds_that_both_reach_are_met(method):
    reached, multipliers, kl = (x[:2] for x in trained(method))
    assert np.abs(SCORES.mean(axis=0)).max() < 0.1, "the reference is far from every threshold"
    assert np.abs(reached - np.array(THRESHOLDS[:2])).max() < 0.05
    assert (multipliers > 0).all() and 0.1 < kl[0] < kl[1]


def test_bounded_multipliers_do_not_enforce_every_threshold():
    """Thresholds below what the reference scores: for mu-PPO they are met at no cost, for xi-PPO out of its bounded reach."""
    (_, _, xi), (_, _, bound), _ = trained("xi")
    (_, _, mu), (_, _, free), (_, _, kl) = trained("mu")
    assert (bound < -0.9).all() and (xi > -0.2).all()
    assert (free < 0.3).all() and (mu > -0.2).all() and kl < 0.01


# --- by hand ---


def scored(T: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Groups of responses of several lengths, with scores of two reward models."""
    rng = np.random.default_rng(seed)
    batch = groups(rng.normal(size=(4, 3)), T, seed)
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


@both
@pytest.mark.parametrize("x", [[0.0, 0.0], [0.7, -1.3]], ids=["at_0", "elsewhere"])
def test_the_advantage_is_a_sum_of_whitened_ones_whose_weights_are_k(method, x):
    make, bounded = METHODS[method]
    batch = scored()
    mask, L = batch["completion_mask"], bounded(np.array(x))
    _, after = at(make((0.5, 0.5)), x, batch)
    kl = np.where(mask, batch["old_logps"] - batch["ref_logps"], 0.0).sum(-1)
    own = [whitened(r, mask) for r in (-kl, batch["scores"][..., 0], batch["scores"][..., 1])]
    weights = np.array([2 - L.sum(), *L])
    assert weights.sum() == pytest.approx(2)
    if not any(x):
        np.testing.assert_allclose(weights, [2, 0, 0] if method == "xi" else [1, 0.5, 0.5])
    np.testing.assert_allclose(after["advantages"], np.tensordot(weights, own, 1), atol=2e-5)
    np.testing.assert_allclose(after["multipliers"], np.tile(L, (4, 1)), rtol=1e-6)


@both
def test_a_multiplier_falls_where_its_score_is_above_its_threshold(method):
    make, bounded = METHODS[method]
    batch, x, h = scored(), np.array([0.3, -0.4]), 1e-5
    mean = batch["scores"].mean((0, 1))
    for slack in (np.array([0.2, -0.1]), np.array([-3.0, 4.0])):
        (after, velocity), _ = at(make(mean - slack, learning_rate=0.5, momentum=0.3), list(x), batch)
        gradient = (bounded(x + h) - bounded(x - h)) / (2 * h) * slack
        gradient *= min(1, 0.5 / np.linalg.norm(gradient))
        np.testing.assert_allclose(velocity, 0.3 * 0.2 + gradient, rtol=2e-4)
        np.testing.assert_allclose(after, x - 0.5 * velocity, rtol=1e-5)
        assert (np.sign(gradient) == np.sign(slack)).all()
    # Without momentum from before, lambda falls where the score is above its threshold, and rises below it.
    still = PROGRAM(make(mean - np.array([0.2, -0.1])), first_carry(make((0.0, 0.0)))[f"{method}_ppo"], batch)[0][0]
    assert still[0] < 0 < still[1]


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


@both
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


def test_another_estimator_and_no_critic_of_another_reward():
    batch = scored() | {"token_rewards": scored(seed=1)["values"]}  # of another reward: not read
    _, after = at(mu_ppo((0.5, 0.5), estimator=experience.rewards_to_go()), [0.0, 0.0], batch)
    whole = jax.jit(lambda batch: chain(experience.rewards_to_go(), whiten_advantages())(batch)["advantages"])
    last = last_scored(batch)[..., None] * batch["scores"][:, :, None]  # [B, N, T, 2]
    kl = jnp.asarray(batch["ref_logps"] - batch["old_logps"])
    parts = [whole(batch | {"token_rewards": x}) for x in (kl, last[..., 0], last[..., 1])]
    np.testing.assert_allclose(after["advantages"], parts[0] + 0.5 * parts[1] + 0.5 * parts[2], atol=1e-5)
    with pytest.raises(ValueError, match='has no "values"'):
        at(mu_ppo((0.5, 0.5), estimator=experience.gae()), [0.0, 0.0], batch)


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
        (lambda: proxy_point(range(10), range(10)), "a polynomial of degree 10"),
        (lambda: nelder_mead(np.sum, [[0.0, 1.0], [1.0, 0.0]]), r"shape \(2, 2\)"),
        (lambda: nelder_mead(lambda x: np.nan, [[0.0], [1.0]]), "the objective is nan"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- thresholds ---


def test_the_proxy_point_of_a_hump_and_of_a_rise():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 3, size=200)
    noise = rng.normal(size=200)
    assert proxy_point(x, x * (4 - x) * np.exp(-x), degree=10) == pytest.approx(3 - np.sqrt(5), abs=1e-3)  # where the derivative is 0
    assert proxy_point(x, -((x - 1.2) ** 2) + 0.05 * noise, degree=4) == pytest.approx(1.2, abs=0.1)
    assert proxy_point(x, 2 * x, degree=3) == pytest.approx(x.max()), "gold that never falls: no score is too large"


def rosenbrock(x: np.ndarray) -> float:
    return -float((1 - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2)


def kinked(x: np.ndarray) -> float:
    return -float(np.abs(x - 0.3).sum() + np.abs(x).max() ** 0.5)


@pytest.mark.parametrize("objective", [rosenbrock, kinked])
@pytest.mark.parametrize("most", [1, 5, 10, 40])
def test_the_simplex_is_scipys(objective, most):
    from scipy.optimize import minimize

    simplex = np.array([[-1.0, 1.0], [0.2, 0.9], [-0.5, 0.1]])
    options = {"initial_simplex": simplex, "maxiter": most + 1, "xatol": 0, "fatol": 0}
    theirs = minimize(lambda x: -objective(x), simplex[0], method="Nelder-Mead", options=options)
    best, value = nelder_mead(objective, simplex, most, tolerance=0, near=0)
    np.testing.assert_allclose(best, theirs.x, rtol=1e-9)
    assert value == pytest.approx(-theirs.fun)


def test_no_thresholds_are_tried_twice():
    tried = []

    def objective(x):
        tried.append(x)
        return -float(np.square(x - np.array([0.48, 0.23])).sum())

    best, value = nelder_mead(objective, [[0.3, 0.3], [0.4, 0.3], [0.3, 0.4]], most=30, tolerance=1e-6)
    np.testing.assert_allclose(best, [0.48, 0.23], atol=0.01)
    assert value == max(objective(x) for x in tried[:]) and len(tried) < 100
    points = np.unique(np.array(tried), axis=0)
    apart = np.abs(points[:, None] - points[None]).max(-1)[np.triu_indices(len(points), 1)]
    assert apart.min() > 5e-3
