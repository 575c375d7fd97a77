"""Constrained RLHF (Moskovitz et al. 2023, arXiv:2310.04373): rewards are held at thresholds beyond which more reward is not better.

    experience = chain(logps("ref_logps", reference), score(ensemble), xi_ppo((0.48, 0.23)))

Each of K reward models is a constraint. Its threshold is the proxy point, up to which a higher score was better. L_k is the paper's bounded
multiplier, a function of lambda_k, which is learnt with the policy and kept in the carry. The policy ascends the Lagrangian, lambda
descends it:

    advantages = w_0 A_0 + sum_k w_k A_k,   A_0 of the reward -KL, A_k of reward model k, each whitened over the batch

    xi_ppo     smallest KL, score_k =  threshold_k               w_k = L_k,       w_0 = K - sum_k L_k,   L_k = tanh(lambda_k)
    mu_ppo     smallest KL, score_k >= threshold_k               the same                                L_k = sigmoid(lambda_k)
    all_ppo    largest sum of scores, score_k <= threshold_k     w_k = 1 - L_k,   w_0 = 1                L_k = sigmoid(lambda_k)

Multipliers are bounded, so a threshold may be out of reach. Then `constraint/multiplier_k` of a run stays near its bound, while
`score/member_k` stays away from its threshold. `ppo_sat` has no multipliers: its reward is largest where each score is at its threshold.

All rewards need the same kind of baseline: the group's, or that of a critic with a value head for each (`model.critic_heads` = 1 + K).

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.advantages import leave_one_out, whiten_advantages
from alignax.experience.chain import Experience, Stateful, numbered, report
from alignax.experience.ensembles import Aggregate
from alignax.losses.algebra import sequence
from alignax.losses.pairs import check_range, field, ref_logps
from alignax.types import Batch

Multipliers = tuple[jax.Array, jax.Array]  # lambda [K], where L is a bounded function of lambda, and the momentum of its descent [K]
SLOPE = 0.5  # largest norm of lambda's gradient
OWN = ("rewards", "token_rewards", "raw_rewards", "values", "returns")  # fields that belong to a single reward


def xi_ppo(
    thresholds: Sequence[float],
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """xi-PPO: the smallest KL at which each reward model's mean score *equals* its threshold; L = tanh(lambda), in (-1, 1).

    A score above its threshold is pushed down once its multiplier is below 0. Writes `advantages` [B, N, T] for `ppo()` or `grpo()`, and
    reports L as `constraint/multiplier_k`, k from 0 on. Reads `scores` [B, N, K], `old_logps` and `ref_logps` [B, N, T]. With a critic it
    also reads `values` [B, N, T, 1 + K], head 0 for the KL and head k for reward model k, and writes `returns` of the same shape.

    After a batch  m <- momentum m + g,  lambda <- lambda - learning_rate m,  where g is the gradient of
    sum_k w_k (mean score_k - threshold_k), its norm clipped to 0.5.

    Args:
      thresholds: one for each reward model, in the units of its scores; see `proxy_point`.
      learning_rate: of lambda, at least 0; 0 keeps lambda constant.
      momentum: of lambda's descent, in [0, 1).
      initial: lambda at step 0. At 0 only the reference counts. The authors' code draws one number from N(0, 0.01^2) for all lambdas.
      estimator: the advantage function, applied to each reward alone; default `leave_one_out()`. `rewards_to_go()` needs no group, `gae()`
        needs a critic.

    Raises:
      ValueError: in the chain, if the number of scores, or of a critic's heads, does not match the thresholds.
    """
    return _stateful("xi_ppo", XI, thresholds, learning_rate, momentum, initial, estimator)


def mu_ppo(
    thresholds: Sequence[float],
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """mu-PPO: the smallest KL at which each mean score is *at least* its threshold; L = sigmoid(lambda), in (0, 1).

    A score is never pushed down. Everything else is as in `xi_ppo`; at lambda 0 the reference has half of the weight.
    """
    return _stateful("mu_ppo", MU, thresholds, learning_rate, momentum, initial, estimator)


def all_ppo(
    thresholds: Sequence[float],
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """All-PPO: the largest sum of the scores less the KL where each mean score is *at most* its threshold; L = sigmoid(lambda), in (0, 1).

    The weights are those of the Lagrangian  v_0 + sum_k v_k - sum_k L_k (v_k - threshold_k).  So lambda rises where a score is above its
    threshold. No score is pushed down: with a multiplier near 1 only the KL acts. The paper does not say how its baseline of this name
    mixes advantages; this is the gradient of the problem. Everything else is as in `xi_ppo`.
    """
    return _stateful("all_ppo", ALL, thresholds, learning_rate, momentum, initial, estimator)


def ppo_sat(thresholds: Sequence[float]) -> Aggregate:
    """PPO-SAT: a reward that is largest where each score is at its threshold, - sum_k (score_k - threshold_k)^2.

        chain(score(ensemble), ppo_sat((0.48, 0.23)), kl_reward(0.05), leave_one_out())

    The square is taken of each response, so the variance between responses costs as much as an offset of their mean. Like `uwo` it is an
    aggregate of `scores`: [K, ...] -> [...].

    >>> print(ppo_sat((1.0, 0.0))(jnp.array([[1.0, 3.0], [2.0, 1.0]])))  # scores of 2 models, 2 responses
    [-4. -5.]

    Args:
      thresholds: one for each reward model, in the units of its scores; see `proxy_point`.

    Raises:
      ValueError: in the chain, for another number of scores.
    """
    _checked(thresholds)
    return Aggregate(_satisfied, tuple(map(float, thresholds)))


def _satisfied(scores: jax.Array, *thresholds: float) -> jax.Array:
    if len(scores) != len(thresholds):
        raise ValueError(f"there are {len(thresholds)} thresholds for {len(scores)} reward models; give one for each")
    theta = jnp.asarray(thresholds, jnp.float32).reshape(-1, *(1,) * (scores.ndim - 1))  # [K, ...]
    return -jnp.square(scores - theta).sum(axis=0)


def _checked(thresholds: Sequence[float]) -> jax.Array:
    theta = jnp.asarray(thresholds, jnp.float32)
    if theta.ndim != 1 or not theta.size or any(isinstance(x, float) and not math.isfinite(x) for x in thresholds):
        raise ValueError(f"thresholds are {thresholds!r}; give a number for each reward model, for example (0.5, 0.5)")
    return theta


def _stateful(
    name: str, kind: "Constrained", thresholds: Sequence[float], rate: float, momentum: float, initial: float, estimator: Experience | None
) -> Stateful:
    theta = _checked(thresholds)
    check_descent(rate, momentum)
    return Stateful(name, first_multipliers(theta.size, initial), Partial(kind, theta, rate, momentum, estimator or leave_one_out()))


def check_descent(rate: float, momentum: float) -> None:
    """Refuses a learning rate or momentum of lambda that is out of range."""
    check_range("learning_rate", rate, 0, jnp.inf, "the learning rate of the multipliers (0.1 is usual)")
    check_range("momentum", momentum, 0, 1, "the momentum of the multipliers (0.1 is usual)")


def first_multipliers(K: int, initial: float) -> Multipliers:
    """The multipliers at step 0: lambda [K] at `initial`, and a momentum [K] of 0."""
    return jnp.full(K, initial, jnp.float32), jnp.zeros(K, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Constrained:
    """A method of constrained RLHF, without its arrays, so that all thresholds share one compiled program."""

    bounded: Callable[[jax.Array], jax.Array]  # lambda [K] -> L [K]
    weights: Callable[[jax.Array], jax.Array]  # L [K] -> w_0, w_1 .. w_K: [1 + K]

    def __call__(
        self, theta: jax.Array, rate: jax.Array, momentum: jax.Array, estimator: Experience, carry: Multipliers, batch: Batch
    ) -> tuple[Multipliers, Batch]:
        """The multipliers after the batch, and the batch with the advantages of the multipliers before it."""
        slack, known = slack_of(theta, batch)
        L = self.bounded(carry[0])  # [K]
        white = whiten_advantages()
        _check_heads(batch, L.size)
        alone = [estimator(x) for x in (_kl_alone(batch, known), *(_score_alone(batch, known, k) for k in range(L.size)))]
        own = jnp.stack([white(x)["advantages"] for x in alone], axis=-1)  # [B, N, T, 1 + K]
        written = {"advantages": own @ self.weights(L)}
        if all("returns" in x for x in alone):  # with a critic, if the estimator uses it
            written["returns"] = jnp.stack([x["returns"] for x in alone], axis=-1)  # [B, N, T, 1 + K]
        velocity = momentum * carry[1] + self.gradient(carry[0], slack)
        return (carry[0] - rate * velocity, velocity), report(batch | written, **numbered("constraint/multiplier", L))

    def gradient(self, x: jax.Array, slack: jax.Array) -> jax.Array:
        """The gradient [K] of the Lagrangian sum_k w_k slack_k with respect to lambda x [K], clipped."""
        gradient = jax.grad(lambda x: jnp.sum(self.weights(self.bounded(x))[1:] * slack))(x)
        # The authors' code clips this gradient at the norm of the policy's, 0.5.
        return gradient * jnp.minimum(1.0, SLOPE / jnp.maximum(jnp.linalg.norm(gradient), 1e-9))


def _between(L: jax.Array) -> jax.Array:
    """The weights [1 + K] of xi_ppo and mu_ppo, which sum to K."""
    return jnp.concatenate([L.size - L.sum(keepdims=True), L])


def _beside(L: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.ones(1), 1.0 - L])


XI, MU, ALL = Constrained(jnp.tanh, _between), Constrained(jax.nn.sigmoid, _between), Constrained(jax.nn.sigmoid, _beside)


def slack_of(theta: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The mean score minus its threshold [K], over responses with all scores known; and the mask of those responses [B, N]."""
    scores = field(batch, "scores", "score(ensemble)")
    if scores.shape[-1] != theta.size:
        raise ValueError(f"there are {theta.size} thresholds for {scores.shape[-1]} reward models; give one for each")
    known = batch["completion_mask"].any(axis=-1) & jnp.isfinite(scores).all(axis=-1)
    # The mean is over responses, as the paper's v_k. Its code averages returns over tokens, so long responses count more there.
    total = jnp.where(known[..., None], scores - theta[None, None], 0.0).sum(axis=(0, 1))
    return total / jnp.maximum(known.sum(), 1), known


def _check_heads(batch: Batch, K: int) -> None:
    """Refuses a critic without a head for each reward."""
    if "values" not in batch:
        return
    heads = batch["values"].shape[3] if batch["values"].ndim == 4 else 1
    if heads != 1 + K:
        raise ValueError(
            f"the critic has {heads} value heads for the KL and {K} reward models; set model.critic_heads={1 + K}, or train without a "
            "critic"
        )


def _alone(batch: Batch, known: jax.Array, head: int, rewards: dict[str, jax.Array]) -> Batch:
    """The batch with one kind of reward only, NaN where a response lacks any score, and with the values of its head."""
    rest = {name: x for name, x in batch.items() if name not in OWN}
    if "values" in batch:
        rest["values"] = batch["values"][..., head]
    missing = lambda x: jnp.where(known.reshape(known.shape + (1,) * (x.ndim - 2)), x, jnp.nan)
    return rest | {name: missing(x) for name, x in rewards.items()}


def _kl_alone(batch: Batch, known: jax.Array) -> Batch:
    # Without a coefficient, which whitening would remove.
    old = field(batch, "old_logps", 'logps("old_logps", policy)')
    tokens = jnp.where(batch["completion_mask"], ref_logps(batch) - old, 0.0)
    return _alone(batch, known, 0, {"token_rewards": tokens, "rewards": sequence(tokens, batch)})


def _score_alone(batch: Batch, known: jax.Array, k: int) -> Batch:
    return _alone(batch, known, 1 + k, {"rewards": batch["scores"][..., k]})
