"""Constrained RLHF (Moskovitz et al. 2023, arXiv:2310.04373): rewards held at thresholds, beyond which they stop being worth having.

    experience = chain(logps("ref_logps", reference), score(ensemble), xi_ppo((0.48, 0.23)))

The objective is the KL from the reference; each of K reward models is a constraint, its threshold the proxy point up to which more
of its score was better. What the paper calls L_k, a bounded multiplier, is learnt beside the policy and lives in the carry.

    advantages = (K - sum_k L_k) A_0 + sum_k L_k A_k,   A_0 of the reward -KL, A_k of reward model k, each whitened over the batch

The weights sum to K. Multipliers are bounded, so that of A_0 never vanishes unless all are at their bound: a threshold may be out of
reach, and `constraint/multiplier_k` of a run then stands still near its bound while `score/member_k` stays off its threshold.

All rewards need one kind of baseline: groups have it without a critic, and one critic knows one reward only.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from alignax.experience.advantages import leave_one_out, whiten_advantages
from alignax.experience.chain import Experience, Stateful
from alignax.losses.algebra import sequence
from alignax.losses.pairs import check_positive, check_range, field, ref_logps
from alignax.types import Batch

Multipliers = tuple[jax.Array, jax.Array]  # lambda [K], of which L is a bounded function, and the momentum of its descent [K]
Evaluated = tuple[np.ndarray, float]  # thresholds [K], and their objective
SLOPE = 0.5  # largest norm of lambda's gradient


def xi_ppo(
    thresholds: Sequence[float],
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """xi-PPO: the smallest KL at which each reward model's mean score *equals* its threshold; L = tanh(lambda), in (-1, 1).

    A score above its threshold is pushed down, once its multiplier is below 0. Writes `advantages` [B, N, T] for `ppo()` or `grpo()`, and
    `multipliers` [B, K], which are the same for every row. Reads `scores` [B, N, K], `old_logps` and `ref_logps`.

    After a batch  m <- momentum m + g,  lambda <- lambda - learning_rate m,  g the gradient of  sum_k L_k (mean score_k - threshold_k),
    its norm at most 0.5.

    Args:
      thresholds: of each reward model, in the units of its scores; see `proxy_point`.
      learning_rate: of lambda, at least 0; 0 keeps it.
      momentum: of its descent, in [0, 1).
      initial: lambda at step 0. At 0 the reference alone counts; the authors' code draws one number from N(0, 0.01^2) for all.
      estimator: the advantage of one reward against others, run on each alone; default `leave_one_out()`. `rewards_to_go()` needs no group.
        `gae()` is refused its critic's values, which are of one reward.
    """
    return _constrained("xi_ppo", jnp.tanh, thresholds, learning_rate, momentum, initial, estimator)


def mu_ppo(
    thresholds: Sequence[float],
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """mu-PPO: the smallest KL at which each mean score is *at least* its threshold; L = sigmoid(lambda), in (0, 1).

    A score is never pushed down. Everything else is as `xi_ppo` has it; at lambda 0 half of the weight is the reference's.
    """
    return _constrained("mu_ppo", jax.nn.sigmoid, thresholds, learning_rate, momentum, initial, estimator)


def _constrained(
    name: str, bounded: Callable, thresholds: Sequence[float], rate: float, momentum: float, initial: float, estimator: Experience | None
) -> Stateful:
    theta = jnp.asarray(thresholds, jnp.float32)
    if theta.ndim != 1 or not theta.size:
        raise ValueError(f"thresholds are {thresholds!r}; give a number for each reward model, (0.5, 0.5) say")
    check_range("learning_rate", rate, 0, jnp.inf, "of the multipliers, 0.1 is usual")
    check_range("momentum", momentum, 0, 1, "of the multipliers, 0.1 is usual")
    first = jnp.full(theta.shape, initial, jnp.float32), jnp.zeros(theta.shape, jnp.float32)
    return Stateful(name, first, Partial(_Constrained(bounded), theta, rate, momentum, estimator or leave_one_out()))


@dataclasses.dataclass(frozen=True)
class _Constrained:
    """The static part: other thresholds share its compiled program."""

    bounded: Callable[[jax.Array], jax.Array]

    def __call__(
        self, theta: jax.Array, rate: jax.Array, momentum: jax.Array, estimator: Experience, carry: Multipliers, batch: Batch
    ) -> tuple[Multipliers, Batch]:
        slack, known = _slack(theta, batch)
        L = self.bounded(carry[0])  # [K]
        rewarded = [_kl_alone(batch, known), *(_score_alone(batch, known, k) for k in range(L.size))]
        white = whiten_advantages()
        own = jnp.stack([white(estimator(alone))["advantages"] for alone in rewarded], axis=-1)  # [B, N, T, 1 + K]
        weights = jnp.concatenate([L.size - L.sum(keepdims=True), L])
        multipliers = jnp.broadcast_to(L, (batch["tokens"].shape[0], L.size))
        velocity = momentum * carry[1] + self.gradient(carry[0], slack)
        return (carry[0] - rate * velocity, velocity), batch | {"advantages": own @ weights, "multipliers": multipliers}

    def gradient(self, x: jax.Array, slack: jax.Array) -> jax.Array:
        """Of sum_k L_k slack_k, by lambda x [K]."""
        gradient = jax.grad(lambda x: jnp.sum(self.bounded(x) * slack))(x)
        # At a norm of 0.5: the authors' code clips it as it clips the policy's.
        return gradient * jnp.minimum(1.0, SLOPE / jnp.maximum(jnp.linalg.norm(gradient), 1e-9))


def _slack(theta: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """How far the mean score is above its threshold [K], over responses all of whose scores are there; and where those are [B, N]."""
    scores = field(batch, "scores", "score(ensemble)")
    if scores.shape[-1] != theta.size:
        raise ValueError(f"there are {theta.size} thresholds for {scores.shape[-1]} reward models; give one for each")
    known = batch["completion_mask"].any(axis=-1) & jnp.isfinite(scores).all(axis=-1)
    # Over responses, as the paper's v_k; its code averages what is still to come over tokens, where long responses count more.
    total = jnp.where(known[..., None], scores - theta[None, None], 0.0).sum(axis=(0, 1))
    return total / jnp.maximum(known.sum(), 1), known


def _alone(batch: Batch, known: jax.Array, rewards: dict[str, jax.Array]) -> Batch:
    """The batch with one kind of reward only; missing where any is, and without values, which are a critic's of another reward."""
    rest = {name: x for name, x in batch.items() if name not in ("rewards", "token_rewards", "raw_rewards", "values")}
    missing = lambda x: jnp.where(known.reshape(known.shape + (1,) * (x.ndim - 2)), x, jnp.nan)
    return rest | {name: missing(x) for name, x in rewards.items()}


def _kl_alone(batch: Batch, known: jax.Array) -> Batch:
    # No coefficient: whitening would take it out again.
    old = field(batch, "old_logps", 'logps("old_logps", policy)')
    tokens = jnp.where(batch["completion_mask"], ref_logps(batch) - old, 0.0)
    return _alone(batch, known, {"token_rewards": tokens, "rewards": sequence(tokens, batch)})


def _score_alone(batch: Batch, known: jax.Array, k: int) -> Batch:
    return _alone(batch, known, {"rewards": batch["scores"][..., k]})


# --- thresholds, found on the host ---


def proxy_point(proxy: Sequence[float], gold: Sequence[float], degree: int = 10) -> float:
    """The score of a reward model beyond which the gold reward falls (Moskovitz et al. 2023): a threshold for it.

    The argmax, over the range of scores that was seen, of the polynomial that fits gold over proxy best. The scores are of runs that
    maximise this reward model alone, without a KL penalty. Reward models that are correlated shift one another's points, which this
    does not see: the paper then fits a surface of two.

    Args:
      proxy: mean scores of one reward model at evaluations of such runs: [E].
      gold: gold rewards there: [E].
      degree: of the polynomial; needs more evaluations than that.
    """
    x, y = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) <= degree:
        raise ValueError(
            f"{x.shape} proxy and {y.shape} gold rewards do not fix a polynomial of degree {degree}; give more evaluations, or lower degree"
        )
    fit = np.polynomial.Polynomial.fit(x, y, degree)
    grid = np.linspace(x.min(), x.max(), 10_001)
    return float(grid[np.argmax(fit(grid))])


def nelder_mead(
    objective: Callable[[np.ndarray], float],
    simplex: Sequence[Sequence[float]],
    most: int = 10,
    tolerance: float = 0.01,
    near: float = 5e-3,
) -> tuple[np.ndarray, float]:
    """The thresholds with the largest objective, by the simplex of Nelder and Mead (1965), as NM-PPO searches for them.

    Reflection 1, expansion 2, contraction 1/2, shrinking 1/2. The objective trains a while with the thresholds it is given and returns the
    gold reward: dear, and changed by what it did before, so points near one another are not evaluated twice.

    Args:
      objective: thresholds [K] -> what is to be large.
      simplex: K + 1 thresholds to begin with: [K + 1, K].
      most: iterations.
      tolerance: it stops where the objectives of the simplex have a smaller standard deviation.
      near: points of which no coordinate differs by more are one.

    Returns:
      The best point that was evaluated [K], and its objective.
    """
    start = np.asarray(simplex, np.float64)
    if start.ndim != 2 or start.shape[0] != start.shape[1] + 1:
        raise ValueError(f"the simplex has shape {start.shape}; give K + 1 points of K thresholds")
    check_positive("most", most)
    seen: list[Evaluated] = []

    def evaluated(point: np.ndarray) -> Evaluated:
        found = next((pair for pair in seen if np.abs(pair[0] - point).max() <= near), None)
        if found is None:
            value = float(objective(point.copy()))
            if not np.isfinite(value):
                raise ValueError(f"the objective is {value} at thresholds {point}; let it return a finite number")
            seen.append(found := (point, value))
        return point, found[1]

    points = [evaluated(point) for point in start]
    for _ in range(most):
        points.sort(key=lambda pair: -pair[1])
        if np.std([value for _, value in points]) < tolerance:
            break
        points = _moved(points, evaluated)
    return max(seen, key=lambda pair: pair[1])


def _moved(points: list[Evaluated], evaluated: Callable[[np.ndarray], Evaluated]) -> list[Evaluated]:
    """The simplex, best point first, with its worst point replaced; or shrunk towards the best, where no replacement is better."""
    (best, top), (worst, bottom), centre = points[0], points[-1], np.mean([point for point, _ in points[:-1]], axis=0)
    reflected = evaluated(2 * centre - worst)
    if reflected[1] > top:
        expanded = evaluated(centre + 2 * (centre - worst))
        return [*points[:-1], expanded if expanded[1] > reflected[1] else reflected]
    if reflected[1] > points[-2][1]:
        return [*points[:-1], reflected]
    inside = evaluated((centre + (reflected[0] if reflected[1] > bottom else worst)) / 2)
    if inside[1] > max(reflected[1], bottom):
        return [*points[:-1], inside]
    return [points[0], *(evaluated((best + point) / 2) for point, _ in points[1:])]
