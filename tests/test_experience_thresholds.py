"""Thresholds: proxy points, the simplex search on the host, and the same search inside a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_experience_constraints import ARMS, PROGRAM, SCORES, bandit, sampled, scored

from alignax import losses
from alignax.experience import advance, first_carry, nelder_mead, nm_ppo, proxy_point, xi_ppo
from alignax.experience.chain import taken
from alignax.experience.simplex import CONTRACT, DONE, EXPAND, FILL, REFLECT
from alignax.run import checkpoint
from alignax.train import init_state, make_step

SIMPLEX = [[0.3, 0.3], [0.4, 0.3], [0.3, 0.4]]
PEAK = np.array([0.48, 0.23])


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
@pytest.mark.parametrize("most", [3, 40])
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


# --- inside a run ---


def quadratic(x):
    return -3 * ((x - PEAK) ** 2).sum()


def visits(search, rollouts: int, met: bool = True) -> list[np.ndarray]:
    """Metrics of rollouts whose policies have the scores that are asked for, if `met`, and whose gold rewards are planted on them."""

    @jax.jit
    def run(carry):
        def one(carry, i):
            theta = carry.search.asked
            scores = jnp.broadcast_to(theta if met else theta + 9.0, (2, 2, theta.size))
            batch = {"tokens": jnp.zeros((2, 2, 1), jnp.int32), "completion_mask": jnp.ones((2, 2, 1), bool), "scores": scores}
            noise = jnp.array([[1.0, -1.0], [jnp.nan, 0.0]])  # of responses, and of rollouts:
            noise += jnp.array([-1.0, 1.0, 0.0])[carry.rollouts] * (carry.search.evaluations % 3)
            gold = jnp.where(i % 5 == 3, jnp.nan, quadratic(theta) + noise)
            batch |= {"gold": gold, "old_logps": jnp.zeros((2, 2, 1)), "ref_logps": jnp.zeros((2, 2, 1))}
            after, _, seen = advance(search, {"nm_ppo": carry}, batch)
            carry = after["nm_ppo"]
            theta = jnp.stack([seen[f"constraint/threshold_{k}"] for k in range(theta.size)])
            return carry, (theta, seen["constraint/phase"], seen["constraint/evaluations"], carry.search.asked)

        return jax.lax.scan(one, carry, jnp.arange(rollouts))[1]

    return [np.asarray(x) for x in run(search.first)]


@pytest.mark.parametrize("met, patience, last, length", [(True, 9, 2, 2), (False, 3, 1, 3)])
def test_a_run_tries_what_the_host_would(met, patience, last, length):
    """One threshold after another, each for as long as it takes, rollouts without a gold reward not counted; then the best stays.

    Noise cancels over the last 2 rollouts of 2, and is not in the last of 3.
    """
    tried = []
    best, _ = nelder_mead(lambda x: tried.append(x) or quadratic(x), SIMPLEX, most=12, tolerance=1e-4)
    rollouts = 40 * length
    theta, phase, before, _ = visits(nm_ppo(SIMPLEX, patience=patience, last=last, most=12, tolerance=1e-4), rollouts, met)
    n = len(tried)
    assert 15 < n < 32 and before[-1] == n and phase[-1] == DONE and set(phase) == {FILL, REFLECT, EXPAND, CONTRACT, DONE}, (n, phase)
    np.testing.assert_allclose(np.stack([theta[before == i][0] for i in range(n)]), tried, atol=1e-6)
    np.testing.assert_allclose(theta[-1], best, atol=1e-6)
    counted = np.arange(rollouts) % 5 != 3
    assert [int((counted & (before == i)).sum()) for i in range(n)] == [length] * n
    assert np.abs(best - PEAK).max() < 0.02


@pytest.mark.slow
def test_thresholds_found_while_a_policy_trains_are_those_of_the_planted_gold():
    """A bandit whose policies are those of least KL at a mean score, and gold that falls beyond a score: near the best one's gold.

    From 16 starts like this one the search ends at 0.85 to 1.24, the best threshold is 1.01.
    """
    score = SCORES[:, :1]
    gold = -np.square(SCORES - 0.7).sum(-1)
    p = np.stack([np.asarray(jax.nn.softmax(a * score[:, 0])) for a in np.linspace(0, 5, 500)])
    means, golds = p @ score[:, 0], p @ gold
    search, optimizer = nm_ppo([[0.3], [0.6]], patience=100, last=3), optax.sgd(0.05)
    step = make_step(lambda params, batch: bandit(score @ params, batch), losses.ppo(), optimizer)

    def one(state, _):
        batch = sampled(score @ state.params, score)
        batch["gold"] = jnp.asarray(gold, jnp.float32)[batch["tokens"][..., 0]]
        carry, batch, seen = advance(search, state.carry, batch)
        return step(state.replace(carry=carry), batch)[0], seen["constraint/phase"]

    state = init_state(jnp.zeros(1), optimizer, jax.random.key(0)).replace(carry=first_carry(search))  # type: ignore[attr-defined]
    state, phases = jax.jit(lambda state: jax.lax.scan(one, state, length=800))(state)
    of = lambda threshold: np.interp(threshold, means, golds)
    found = float(state.carry["nm_ppo"].search.asked[0])
    assert phases[-1] == DONE and abs(found - means[golds.argmax()]) < 0.35, found
    assert of(found) > golds.max() - 0.07 and max(of(0.3), of(0.6)) < golds.max() - 0.12


@pytest.mark.slow
def test_a_search_is_in_checkpoints_and_goes_on(tmp_path):
    search = nm_ppo([[0.3, 0.3], [0.4, 0.3], [0.3, 0.4]], patience=2, last=2)
    batch = scored() | {"gold": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
    go = jax.jit(search.function)
    make = lambda carry: init_state({"logits": jnp.zeros(ARMS)}, optax.sgd(1.0), jax.random.key(0)).replace(carry={"nm_ppo": carry})  # type: ignore[attr-defined]
    carry = search.first
    for _ in range(5):
        carry, after = go(carry, batch)
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(make(carry), {}, {})
    saver.close()
    restored = checkpoint.Checkpoints(tmp_path).restore(0, make(search.first)).carry["nm_ppo"]
    assert carry.search.evaluations == 2 and carry.rollouts == 1
    jax.tree.map(np.testing.assert_array_equal, restored, carry)
    jax.tree.map(np.testing.assert_array_equal, go(restored, batch), go(carry, batch))
    seen = taken(after)[1]
    assert [seen[f"constraint/threshold_{k}"] for k in (0, 1)] == [np.float32(0.3), np.float32(0.4)] and seen["constraint/evaluations"] == 2
    _, plain = PROGRAM(xi_ppo((0.3, 0.4)), carry.multipliers, batch)
    np.testing.assert_allclose(go(carry, batch)[1]["advantages"], plain["advantages"], atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: proxy_point(range(10), range(10)), "a polynomial of degree 10"),
        (lambda: nelder_mead(np.sum, [[0.0, 1.0], [1.0, 0.0]]), r"shape \(2, 2\)"),
        (lambda: nelder_mead(lambda x: np.nan, [[0.0], [1.0]]), "the objective is nan"),
        (lambda: nm_ppo([[0.0, 1.0], [1.0, 0.0]], patience=5), r"shape \(2, 2\)"),
        (lambda: nm_ppo(SIMPLEX, patience=4, last=5), "patience is 4 rollouts"),
        (lambda: nm_ppo(SIMPLEX, patience=4, most=0), "most is 0"),
        (lambda: nm_ppo(SIMPLEX, patience=4, momentum=1.0), "momentum is 1.0"),
        (lambda: jax.eval_shape(nm_ppo(SIMPLEX, patience=4), scored()), "but the batch has none"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
