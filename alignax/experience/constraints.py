"""Constrained RLHF (Moskovitz et al. 2023, arXiv:2310.04373): rewards held at thresholds, beyond which they stop being worth having.

    experience = chain(logps("ref_logps", reference), score(ensemble), xi_ppo((0.48, 0.23)))

Each of K reward models is a constraint, its threshold the proxy point up to which more of its score was better. What the paper calls
L_k, a bounded multiplier, is learnt beside the policy and lives in the carry. The policy ascends the Lagrangian, lambda descends it:

    advantages = w_0 A_0 + sum_k w_k A_k,   A_0 of the reward -KL, A_k of reward model k, each whitened over the batch

    xi_ppo     KL least, score_k =  threshold_k                  w_k = L_k,       w_0 = K - sum_k L_k,   L_k = tanh(lambda_k)
    mu_ppo     KL least, score_k >= threshold_k                  the same                                L_k = sigmoid(lambda_k)
    all_ppo    sum of scores most, score_k <= threshold_k        w_k = 1 - L_k,   w_0 = 1                L_k = sigmoid(lambda_k)

Multipliers are bounded, so a threshold may be out of reach, and `constraint/multiplier_k` of a run then stands still near its bound while
`score/member_k` stays off its threshold. `ppo_sat` has no multipliers: its reward is largest where each score is at its threshold.

All rewards need one kind of baseline: a group's, or that of a critic with a value head for each (`model.critic_heads` = 1 + K).
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

Multipliers = tuple[jax.Array, jax.Array]  # lambda [K], of which L is a bounded function, and the momentum of its descent [K]
SLOPE = 0.5  # largest norm of lambda's gradient
OWN = ("rewards", "token_rewards", "raw_rewards", "values", "returns")  # fields that are of one reward


def xi_ppo(
    thresholds: Sequence[float],
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    initial: float = 0.0,
    estimator: Experience | None = None,
) -> Stateful:
    """xi-PPO: the smallest KL at which each reward model's mean score *equals* its threshold; L = tanh(lambda), in (-1, 1).

    A score above its threshold is pushed down, once its multiplier is below 0. Writes `advantages` [B, N, T] for `ppo()` or `grpo()`, and
    reports L as `constraint/multiplier_k`, k from 0 on. Reads `scores` [B, N, K], `old_logps` and `ref_logps`; of a critic `values`
    [B, N, T, 1 + K], head 0 the KL's and head k reward model k's, for whose heads it writes `returns` of the same shape.

    After a batch  m <- momentum m + g,  lambda <- lambda - learning_rate m,  g the gradient of  sum_k w_k (mean score_k - threshold_k),
    its norm at most 0.5.

    Args:
      thresholds: of each reward model, in the units of its scores; see `proxy_point`.
      learning_rate: of lambda, at least 0; 0 keeps it.
      momentum: of its descent, in [0, 1).
      initial: lambda at step 0. At 0 the reference alone counts; the authors' code draws one number from N(0, 0.01^2) for all.
      estimator: the advantage of one reward against others, run on each alone; default `leave_one_out()`. `rewards_to_go()` needs no group,
        `gae()` takes a critic.

    Raises:
      ValueError: in the chain, for other numbers of scores or of a critic's heads than thresholds ask for.
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

    A score is never pushed down. Everything else is as `xi_ppo` has it; at lambda 0 half of the weight is the reference's.
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

    Weights are those of the Lagrangian  v_0 + sum_k v_k - sum_k L_k (v_k - threshold_k),  so lambda rises where a score is above its
    threshold, and no score is pushed down: a multiplier near 1 leaves it to the KL. The paper does not print how its baseline of this
    name mixes advantages; this is the problem's own gradient. Everything else is as `xi_ppo` has it.
    """
    return _stateful("all_ppo", ALL, thresholds, learning_rate, momentum, initial, estimator)


def ppo_sat(thresholds: Sequence[float]) -> Aggregate:
    """PPO-SAT: a reward that is largest where each score is at its threshold, - sum_k (score_k - threshold_k)^2.

        chain(score(ensemble), ppo_sat((0.48, 0.23)), kl_reward(0.05), leave_one_out())

    Of responses, not of their mean: variance between responses costs as much as a mean that is off. An aggregate of `scores`, as `uwo` is.

    Args:
      thresholds: of each reward model, in the units of its scores; see `proxy_point`.

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
        raise ValueError(f"thresholds are {thresholds!r}; give a number for each reward model, (0.5, 0.5) say")
    return theta


def _stateful(
    name: str, kind: "Constrained", thresholds: Sequence[float], rate: float, momentum: float, initial: float, estimator: Experience | None
) -> Stateful:
    theta = _checked(thresholds)
    check_descent(rate, momentum)
    return Stateful(name, first_multipliers(theta.size, initial), Partial(kind, theta, rate, momentum, estimator or leave_one_out()))


def check_descent(rate: float, momentum: float) -> None:
    """Refuses what lambda cannot descend with."""
    check_range("learning_rate", rate, 0, jnp.inf, "of the multipliers, 0.1 is usual")
    check_range("momentum", momentum, 0, 1, "of the multipliers, 0.1 is usual")


def first_multipliers(K: int, initial: float) -> Multipliers:
    """Lambda at step 0, at rest."""
    return jnp.full(K, initial, jnp.float32), jnp.zeros(K, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Constrained:
    """One of the methods: the static part, so that other thresholds share its compiled program."""

    bounded: Callable[[jax.Array], jax.Array]  # lambda [K] -> L [K]
    weights: Callable[[jax.Array], jax.Array]  # L [K] -> w_0, w_1 .. w_K: [1 + K]

    def __call__(
        self, theta: jax.Array, rate: jax.Array, momentum: jax.Array, estimator: Experience, carry: Multipliers, batch: Batch
    ) -> tuple[Multipliers, Batch]:
        """The multipliers after the batch, and the batch with the advantages that those before it give."""
        slack, known = slack_of(theta, batch)
        L = self.bounded(carry[0])  # [K]
        white = whiten_advantages()
        _check_heads(batch, L.size)
        alone = [estimator(x) for x in (_kl_alone(batch, known), *(_score_alone(batch, known, k) for k in range(L.size)))]
        own = jnp.stack([white(x)["advantages"] for x in alone], axis=-1)  # [B, N, T, 1 + K]
        written = {"advantages": own @ self.weights(L)}
        if all("returns" in x for x in alone):  # of a critic that the estimator takes
            written["returns"] = jnp.stack([x["returns"] for x in alone], axis=-1)  # [B, N, T, 1 + K]
        velocity = momentum * carry[1] + self.gradient(carry[0], slack)
        return (carry[0] - rate * velocity, velocity), report(batch | written, **numbered("constraint/multiplier", L))

    def gradient(self, x: jax.Array, slack: jax.Array) -> jax.Array:
        """Of sum_k w_k slack_k, by lambda x [K]: the Lagrangian's."""
        gradient = jax.grad(lambda x: jnp.sum(self.weights(self.bounded(x))[1:] * slack))(x)
        # At a norm of 0.5: the authors' code clips it as it clips the policy's.
        return gradient * jnp.minimum(1.0, SLOPE / jnp.maximum(jnp.linalg.norm(gradient), 1e-9))


def _between(L: jax.Array) -> jax.Array:
    """Weights that sum to K."""
    return jnp.concatenate([L.size - L.sum(keepdims=True), L])


def _beside(L: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.ones(1), 1.0 - L])


XI, MU, ALL = Constrained(jnp.tanh, _between), Constrained(jax.nn.sigmoid, _between), Constrained(jax.nn.sigmoid, _beside)


def slack_of(theta: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """How far the mean score is above its threshold [K], over responses all of whose scores are there; and where those are [B, N]."""
    scores = field(batch, "scores", "score(ensemble)")
    if scores.shape[-1] != theta.size:
        raise ValueError(f"there are {theta.size} thresholds for {scores.shape[-1]} reward models; give one for each")
    known = batch["completion_mask"].any(axis=-1) & jnp.isfinite(scores).all(axis=-1)
    # Over responses, as the paper's v_k; its code averages what is still to come over tokens, where long responses count more.
    total = jnp.where(known[..., None], scores - theta[None, None], 0.0).sum(axis=(0, 1))
    return total / jnp.maximum(known.sum(), 1), known


def _check_heads(batch: Batch, K: int) -> None:
    """Refuses a critic that does not know each reward."""
    if "values" not in batch:
        return
    heads = batch["values"].shape[3] if batch["values"].ndim == 4 else 1
    if heads != 1 + K:
        raise ValueError(
            f"value heads are {heads} for the KL and {K} reward models; set model.critic_heads={1 + K}, or train without a critic"
        )


def _alone(batch: Batch, known: jax.Array, head: int, rewards: dict[str, jax.Array]) -> Batch:
    """The batch with one kind of reward only, missing where any is, and with the values of its head."""
    rest = {name: x for name, x in batch.items() if name not in OWN}
    if "values" in batch:
        rest["values"] = batch["values"][..., head]
    missing = lambda x: jnp.where(known.reshape(known.shape + (1,) * (x.ndim - 2)), x, jnp.nan)
    return rest | {name: missing(x) for name, x in rewards.items()}


def _kl_alone(batch: Batch, known: jax.Array) -> Batch:
    # No coefficient: whitening would take it out again.
    old = field(batch, "old_logps", 'logps("old_logps", policy)')
    tokens = jnp.where(batch["completion_mask"], ref_logps(batch) - old, 0.0)
    return _alone(batch, known, 0, {"token_rewards": tokens, "rewards": sequence(tokens, batch)})


def _score_alone(batch: Batch, known: jax.Array, k: int) -> Batch:
    return _alone(batch, known, 1 + k, {"rewards": batch["scores"][..., k]})
