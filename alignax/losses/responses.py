"""The parts of losses on sampled responses: a loss has a value for each token, and an aggregate averages the tokens.

The surrogate (clipped, weighted, soft, ..), the level of its ratio (`by_token`, `by_mean`, `by_response`) and the aggregate are
independent choices: `ppo(level=by_mean, aggregate=response_mean)` is a loss. The weights of an aggregate depend on data alone, so
microbatches and shards add up exactly. In the papers a surrogate and its KL share one average, so they should have the same aggregate;
`differing` reports if they do not.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Over, Term, Value, lengths, sequence, token_logps
from alignax.losses.divergences import CAP, exp, expm1
from alignax.losses.pairs import check_positive, check_range, field, of_rollout
from alignax.models.statistics import Statistic
from alignax.types import Batch, Metrics, Outputs

Level = Callable[[jax.Array, Batch], jax.Array]  # log-ratios of tokens [B, N, T] -> log-ratios that a loss compares [B, N, T]


def completion_tokens(batch: Batch) -> jax.Array:
    """The weight of each token: 1 for completion tokens of all responses, else 0: [B, N, T]."""
    return batch["completion_mask"]


def response_tokens(batch: Batch) -> jax.Array:
    """The weight of each token: 1 / length of its response for completion tokens, else 0: [B, N, T]. Every response counts the same."""
    return batch["completion_mask"] / jnp.maximum(lengths(batch), 1.0)[..., None]


def responses(batch: Batch) -> jax.Array:
    """The weight of each response: 1 if it has a completion token, else 0: [B, N]."""
    return batch["completion_mask"].any(axis=-1)


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """A way to average values of tokens: the weights of the average, and a scale that multiplies the values before.

    The scale depends on data alone, too. Metrics are averaged without it.
    """

    over: Over  # Batch -> [B, N, T]
    scale: Callable[[Batch], jax.Array] | None = None  # Batch -> [B, N, 1]
    words: str = ""  # what the log of a run says about the average; "": nothing

    def __call__(self, name: str, value: Value, statistics: tuple[Statistic, ...] = ()) -> Loss:
        """The loss of these values [B, N, T], averaged this way; name, value and statistics are those of `make_loss`."""
        value = value if self.scale is None else self._scaled(value, self.scale)
        return Loss(((1.0, Term(name, value, self.over, self.words, statistics)),))

    def _scaled(self, value: Value, scale: Callable[[Batch], jax.Array]) -> Value:
        def scaled(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            values, metrics = value(out, batch)
            return values * scale(batch), metrics

        return scaled


token_mean = Aggregate(completion_tokens, words="tokens")
"""The mean over all completion tokens of the global batch: long responses count more (DAPO, Yu et al. 2025, arXiv:2503.14476)."""

response_mean = Aggregate(response_tokens, words="responses")
"""The mean over responses of each response's mean over tokens, as in GRPO: a token of a long response counts less."""


def token_sum(max_length: float) -> Aggregate:
    """The mean over responses of their sums over tokens, divided by a constant: no length bias (Dr. GRPO, arXiv:2503.20783).

    >>> logps = jnp.array([[[0.0, -1.0, -1.0], [0.0, -4.0, 0.0]]])  # [B, N, T]; completions of 2 tokens and of 1
    >>> batch = {"completion_mask": logps < 0}
    >>> loss = token_sum(2)("nll", lambda out, batch: (-out.logps, {}))
    >>> value, _ = loss(Outputs(logps, -logps), batch, loss.normalised(batch))
    >>> print(f"{value:.3f}")  # (2 / 2 + 4 / 2) / 2
    1.500

    Args:
      max_length: the constant, usually the length limit of sampled completions; 1 gives plain sums.
    """
    check_positive("max_length", max_length)
    return Aggregate(
        response_tokens, lambda batch: (lengths(batch) / max_length)[..., None], f"responses, as token sums divided by {max_length:g}"
    )


def differing(objective: Loss) -> str:
    """A warning if two terms average tokens differently, such as a surrogate by response and its KL by token; else ""."""
    said = {term.name: term.averaged for _, term in objective.terms if term.averaged}
    if len(set(said.values())) < 2:
        return ""
    each = ", ".join(f"{name} over {words}" for name, words in said.items())
    return f"the terms of the loss are averaged differently ({each}); if they belong to one objective, give them the same aggregate"


def by_token(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The level of tokens, as in PPO: log-ratios [B, N, T] in nats, unchanged."""
    return log_ratio


def by_response(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The level of responses: the sum of the log-ratios of a response, at each of its tokens: [B, N, T] -> [B, N, T] nats.

    >>> print(by_response(jnp.array([[[0.0, 1.0, 2.0]]]), {"completion_mask": jnp.array([[[False, True, True]]])}))
    [[[3. 3. 3.]]]
    """
    return jnp.broadcast_to(sequence(log_ratio, batch)[..., None], log_ratio.shape)


def by_mean(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The level of mean ratios, as in GSPO: the mean log-ratio of a response, at each of its tokens: [B, N, T] -> [B, N, T] nats.

    The mean of the logs is the log of the geometric mean.

    >>> print(by_mean(jnp.array([[[0.0, 1.0, 2.0]]]), {"completion_mask": jnp.array([[[False, True, True]]])}))
    [[[1.5 1.5 1.5]]]
    """
    return by_response(log_ratio, batch) / jnp.maximum(lengths(batch), 1.0)[..., None]


def log_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """The log-ratio log pi/old of each completion token, in nats, 0 elsewhere: [B, N, T].

    Without `old_logps` the old policy is the policy itself: the log-ratio is 0, with the gradient of log pi.
    """
    logps = token_logps(out)
    old = batch.get("old_logps", jax.lax.stop_gradient(logps))
    return jnp.where(batch["completion_mask"], logps - old, 0.0)


def reference_log_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """The log-ratio log pi/ref of each completion token, in nats, 0 elsewhere: [B, N, T]."""
    ref = field(batch, "ref_logps", 'logps("ref_logps", reference)')
    return jnp.where(batch["completion_mask"], token_logps(out) - ref, 0.0)


def advantages_of(batch: Batch) -> jax.Array:
    """The field `advantages` [B, N, T], or an error that names the experience that writes it."""
    return field(batch, "advantages", "group_relative(), or another of alignax.experience.advantages")


@jax.custom_jvp
def k3(log_ratio: jax.Array) -> jax.Array:
    """The KL estimator k3, exp(-d) - 1 + d of d = log p/q, any shape: at least 0, its mean over samples of p is KL(p || q)."""
    return expm1(-log_ratio) + log_ratio


@k3.defjvp
def _k3_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # 1 - exp(-d) would have the rounding error of 1: mostly noise near the reference, where d is small.
    (log_ratio,), (tangent,) = primals, tangents
    return k3(log_ratio), -jnp.expm1(jnp.minimum(-log_ratio, CAP)) * tangent


def policy_metrics(log_ratio: jax.Array, out: Outputs, batch: Batch, low: float, high: float) -> Metrics:
    """The usual metrics of a surrogate that clips exp(`log_ratio` [B, N, T]) to [1 - low, 1 + high], each [B, N, T].

    A token counts as clipped if it has no gradient: below the range with a negative advantage, above it with a positive one.
    """
    ratio, advantages, own = exp(log_ratio), advantages_of(batch), log_ratios(out, batch)
    metrics = {
        "clip_ratio/low": ((ratio < 1 - low) & (advantages < 0)).astype(jnp.float32),
        "clip_ratio/high": ((ratio > 1 + high) & (advantages > 0)).astype(jnp.float32),
        "ratio": ratio,
        "kl/old_k3": k3(-own),  # its mean over samples of the old policy is KL(old || pi)
        "entropy": out.entropy,
    }
    if "ref_logps" in batch:
        d = reference_log_ratios(out, batch)
        metrics |= {"kl/ref_k1": d, "kl/ref_k3": k3(d)}
    return metrics


def finished(objective: Loss) -> Loss:
    """The loss without truncated responses: the batch field `truncated` [B, N] sets their weights to 0.

    A response that was cut before its EOS has no fair reward (DAPO's overlong filtering, Yu et al. 2025, arXiv:2503.14476). If all
    responses were cut, the loss is 0.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "advantages": jnp.ones((1, 2, 2)), "truncated": jnp.array([[False, True]])}
    >>> value, _ = finished(reinforce())(Outputs(logps, -logps), batch, finished(reinforce()).normalised(batch))
    >>> print(f"{value:.3f}")  # the first response's alone
    1.000
    """
    return objective.mapped(lambda term: term._replace(over=_of_finished(term.over)))


def _of_finished(over: Over) -> Over:
    def weights(batch: Batch) -> jax.Array:
        whole = over(batch)
        truncated = of_rollout(batch, "truncated")
        if whole.shape[: truncated.ndim] != truncated.shape:
            raise ValueError(
                f"finished() drops responses, of shape {truncated.shape}, but the loss has weights of shape {whole.shape}; use a loss of "
                "responses"
            )
        return jnp.where(jnp.expand_dims(truncated, tuple(range(truncated.ndim, whole.ndim))), 0, whole)

    return weights


def importance_weighted(objective: Loss, cap: float = 2.0, floor: float = 0.0, level: Level = by_token) -> Loss:
    """The loss times truncated importance weights clip(w, floor, cap) (Yao et al. 2025, "Your efficient RL framework secretly..").

    w = old / sampled of each token; with `level=by_response` of the whole response, at each of its tokens

    For samples that come from another program, or from another distribution, than `old_logps`. `sampled_logps` are the log-probs at
    sampling time. w multiplies the values, not the weights of the average, so the average stays over the same tokens. Without `old_logps`
    the policy itself is the old one. No gradient goes into w. If the values of the loss are of responses, [B, N], w is the response's.

    >>> logps = jnp.log(jnp.array([[[1.0, 0.6]]]))  # [B, N, T]; w = 0.6 / 0.2, above the cap
    >>> batch = {"completion_mask": logps < 0, "advantages": jnp.ones((1, 1, 2)), "sampled_logps": jnp.log(jnp.array([[[1.0, 0.2]]]))}
    >>> loss = importance_weighted(ppo(), cap=2.0)
    >>> value, _ = loss(Outputs(logps, -logps), batch, loss.normalised(batch))
    >>> print(f"{value:.3f}")
    -2.000

    Args:
      objective: a loss of samples, such as `ppo()`; add a KL outside.
      cap: largest weight, above 0; it bounds the variance, and adds bias.
      floor: smallest weight, at least 0 and at most `cap`.
      level: which ratio is the weight. A token's ratio ignores that its prefix was sampled too; a long response's soon exceeds the cap.
    """
    _check_interval("floor", floor, "cap", cap)
    return _weighed(objective, lambda w: jnp.clip(w, floor, cap), level)


def importance_masked(objective: Loss, low: float = 0.5, high: float = 5.0, level: Level = by_token) -> Loss:
    """The loss times masked importance weights: w where low <= w <= high, else 0.

    Ling team 2025 (IcePop, arXiv:2510.18855) mask tokens, with bounds 0.5 and 5. With `level=by_response` a response is kept or left out
    as a whole. w and the fields that it needs are those of `importance_weighted`, which clips weights where this loss drops them.

    Args:
      objective: a loss of samples, such as `ppo()`; add a KL outside.
      low: smallest weight that is kept, at least 0.
      high: largest weight that is kept, above 0.
      level: which ratio is the weight.
    """
    _check_interval("low", low, "high", high)
    return _weighed(objective, lambda w: jnp.where((w >= low) & (w <= high), w, 0.0), level)


def _check_interval(least: str, low: float, most: str, high: float) -> None:
    check_positive(most, high)
    if not 0 <= low <= high:
        raise ValueError(f"{least} is {low} and {most} {high}; {least} must be at least 0 and at most {most}")


def _weighed(objective: Loss, bounded: Callable[[jax.Array], jax.Array], level: Level) -> Loss:
    def weight(out: Outputs, batch: Batch, level: Level) -> jax.Array:
        old = batch.get("old_logps", token_logps(out))
        moved = jnp.where(batch["completion_mask"], old - of_rollout(batch, "sampled_logps"), 0.0)  # [B, N, T]
        return bounded(exp(level(moved, batch)))

    return _times(objective, weight, level, "importance_weight")


def off_policy_masked(objective: Loss, threshold: float = 0.1) -> Loss:
    """The loss without bad responses that have become off-policy (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556).

    value * [A >= 0 or mean_t(log sampled - log pi) <= threshold],   the mean over the tokens of a response

    Tokens with an advantage of at least 0 are always kept. Tokens with a negative one are kept only while the response is still likely
    under the policy. The mask multiplies the values, not the weights of the average; no gradient goes into it.

    Args:
      objective: a loss of samples, such as `grpo()`; add a KL outside.
      threshold: nats a token, at least 0.
    """
    check_range("threshold", threshold, 0, math.inf, "a distance in nats per token")

    def weight(out: Outputs, batch: Batch, level: Level) -> jax.Array:
        moved = jnp.where(batch["completion_mask"], of_rollout(batch, "sampled_logps") - token_logps(out), 0.0)
        better = level(advantages_of(batch), batch) >= 0
        return (better | (by_mean(moved, batch) <= threshold)).astype(jnp.float32)

    return _times(objective, weight, by_token, "off_policy/kept")


def _times(objective: Loss, weight: Callable[[Outputs, Batch, Level], jax.Array], level: Level, metric: str) -> Loss:
    """Each term's values times weights [B, N, T] of a level (by response if the values are of responses), without gradient."""

    def weighed(term: Term) -> Term:
        def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            values, metrics = term.value(out, batch)
            shape = batch["completion_mask"].shape
            if values.shape not in (shape, shape[:2]):
                raise ValueError(
                    f"these weights are of tokens or responses, but the term {term.name!r} has values of shape {values.shape}; add this "
                    "term outside"
                )
            own = weight(out, batch, level) if values.shape == shape else weight(out, batch, by_response)[..., 0]
            own = jax.lax.stop_gradient(own)
            return values * own, metrics | {metric: own}

        return term._replace(value=value)

    return objective.mapped(weighed)
