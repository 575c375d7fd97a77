"""What losses on sampled responses share: a loss is a value per token, and an aggregate says how tokens are averaged.

Which surrogate (clipped, weighted, soft, ..), which level of its ratio (`by_token`, `by_mean`, `by_response`) and which aggregate are
independent choices: `ppo(level=by_mean, aggregate=response_mean)` is a loss. An aggregate's weights are of data alone, so microbatches
and shards add up exactly. A surrogate and its KL are one average in the papers, so they take the same aggregate: `differing` says where
they do not.
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

Level = Callable[[jax.Array, Batch], jax.Array]  # log-ratios of tokens [B, N, T] -> those that a loss compares [B, N, T]


def completion_tokens(batch: Batch) -> jax.Array:
    """Weight 1 for each completion token of every response: [B, N, T]."""
    return batch["completion_mask"]


def response_tokens(batch: Batch) -> jax.Array:
    """Weight 1 / length for each completion token: every response counts the same: [B, N, T]."""
    return batch["completion_mask"] / jnp.maximum(lengths(batch), 1.0)[..., None]


def responses(batch: Batch) -> jax.Array:
    """Weight 1 for each response that has a completion token: [B, N]."""
    return batch["completion_mask"].any(axis=-1)


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """How values of tokens become one: the weights that they are averaged over, and what they are multiplied by before.

    The scale is of data too; metrics are averaged without it.
    """

    over: Over  # Batch -> [B, N, T]
    scale: Callable[[Batch], jax.Array] | None = None  # Batch -> [B, N, 1]
    words: str = ""  # what a run says that it averages over; "": it says nothing

    def __call__(self, name: str, value: Value, statistics: tuple[Statistic, ...] = ()) -> Loss:
        """The loss of values [B, N, T], which are of `Outputs.statistics` too; see `make_loss`."""
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
"""The mean over responses of their means over tokens, as GRPO's: a token of a long response counts less."""


def token_sum(max_length: float) -> Aggregate:
    """The mean over responses of their sums over tokens, divided by a constant: no bias by length (Dr. GRPO, arXiv:2503.20783).

    Args:
      max_length: the constant, usually the longest completion that is sampled; 1 sums.
    """
    check_positive("max_length", max_length)
    return Aggregate(response_tokens, lambda batch: (lengths(batch) / max_length)[..., None], f"responses, their sums over {max_length:g}")


def differing(objective: Loss) -> str:
    """One line where terms of tokens are averaged unlike each other, such as a surrogate by response and its KL by token; else ""."""
    said = {term.name: term.averaged for _, term in objective.terms if term.averaged}
    if len(set(said.values())) < 2:
        return ""
    each = ", ".join(f"{name} over {words}" for name, words in said.items())
    return f"the terms of the loss are averaged unlike each other ({each}); where they are one objective, give them one aggregate"


def by_token(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The ratio of each token, as PPO's: [B, N, T] log-ratios, in nats, as they are."""
    return log_ratio


def by_response(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The ratio of the whole response, at each of its tokens: the sum of the log-ratios [B, N, T], in nats."""
    return jnp.broadcast_to(sequence(log_ratio, batch)[..., None], log_ratio.shape)


def by_mean(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The geometric mean of the ratios of a response's tokens, at each of them, as GSPO's: the log-ratios' mean [B, N, T], in nats."""
    return by_response(log_ratio, batch) / jnp.maximum(lengths(batch), 1.0)[..., None]


def log_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """log pi/old of each completion token, in nats, 0 elsewhere: [B, N, T].

    Without `old_logps` the policy is its own old one: 0, with the gradient of log pi.
    """
    logps = token_logps(out)
    old = batch.get("old_logps", jax.lax.stop_gradient(logps))
    return jnp.where(batch["completion_mask"], logps - old, 0.0)


def reference_log_ratios(out: Outputs, batch: Batch) -> jax.Array:
    """log pi/ref of each completion token, in nats, 0 elsewhere: [B, N, T]."""
    ref = field(batch, "ref_logps", 'logps("ref_logps", reference)')
    return jnp.where(batch["completion_mask"], token_logps(out) - ref, 0.0)


def advantages_of(batch: Batch) -> jax.Array:
    """The field `advantages` [B, N, T], or an error that says where it comes from."""
    return field(batch, "advantages", "group_relative(), or another of alignax.experience.advantages")


@jax.custom_jvp
def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d of d = log p/q: at least 0, its mean over samples of p is KL(p || q)."""
    return expm1(-log_ratio) + log_ratio


@k3.defjvp
def _k3_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # As 1 - exp(-d) it would be rounded to what 1 is: near the reference, where d is small, mostly noise.
    (log_ratio,), (tangent,) = primals, tangents
    return k3(log_ratio), -jnp.expm1(jnp.minimum(-log_ratio, CAP)) * tangent


def policy_metrics(log_ratio: jax.Array, out: Outputs, batch: Batch, low: float, high: float) -> Metrics:
    """The field's metrics of a surrogate, each [B, N, T]; `log_ratio` is what it clips, in [1 - low, 1 + high].

    A token counts as clipped where it has no gradient: below with a negative advantage, above with a positive one.
    """
    ratio, advantages, own = exp(log_ratio), advantages_of(batch), log_ratios(out, batch)
    metrics = {
        "clip_ratio/low": ((ratio < 1 - low) & (advantages < 0)).astype(jnp.float32),
        "clip_ratio/high": ((ratio > 1 + high) & (advantages > 0)).astype(jnp.float32),
        "ratio": ratio,
        "kl/old_k3": k3(-own),  # of samples of the old policy: KL(old || pi)
        "entropy": out.entropy,
    }
    if "ref_logps" in batch:
        d = reference_log_ratios(out, batch)
        metrics |= {"kl/ref_k1": d, "kl/ref_k3": k3(d)}
    return metrics


def finished(objective: Loss) -> Loss:
    """The loss without responses that were cut before their EOS: the batch field `truncated` takes their weights.

    What was cut has no fair reward (DAPO's overlong filtering, Yu et al. 2025, arXiv:2503.14476). Where all were cut the loss is 0.
    """
    return objective.mapped(lambda term: term._replace(over=_of_finished(term.over)))


def _of_finished(over: Over) -> Over:
    def weights(batch: Batch) -> jax.Array:
        whole = over(batch)
        truncated = of_rollout(batch, "truncated")
        if whole.shape[: truncated.ndim] != truncated.shape:
            raise ValueError(f"finished() drops responses {truncated.shape}, the loss weighs {whole.shape}; it must be one of responses")
        return jnp.where(jnp.expand_dims(truncated, tuple(range(truncated.ndim, whole.ndim))), 0, whole)

    return weights


def importance_weighted(objective: Loss, cap: float = 2.0, floor: float = 0.0, level: Level = by_token) -> Loss:
    """The loss times truncated importance weights (Yao et al. 2025, "Your efficient RL framework secretly.."): clip(w, floor, cap).

    w = old / sampled of each token; with `level=by_response` of the whole response, at each of its tokens

    For samples of another program, or of another distribution, than the one that computed `old_logps`: `sampled_logps` are those that
    tokens were drawn with. Values are multiplied, not weights, so what is averaged stays the same. Without `old_logps` the policy itself
    is the old one; no gradient goes into the weight. Of a loss whose values are of responses, [B, N], w is the response's.

    Args:
      objective: a loss of samples, such as `ppo()`; a KL is added outside.
      cap: largest weight, above 0; it bounds the variance and costs bias.
      floor: smallest weight, at least 0 and at most `cap`.
      level: whose ratio is the weight. A token's leaves out that its prefix is the sampler's too; a long response's is soon cut off.
    """
    _check_interval("floor", floor, "cap", cap)
    return _weighed(objective, lambda w: jnp.clip(w, floor, cap), level)


def importance_masked(objective: Loss, low: float = 0.5, high: float = 5.0, level: Level = by_token) -> Loss:
    """The loss times importance weights, 0 where they are out of bounds: w where low <= w <= high, else 0.

    Ling team 2025 (IcePop, arXiv:2510.18855) mask tokens, between 0.5 and 5. With `level=by_response` a response is kept or left out as
    a whole. w and its fields are those of `importance_weighted`: what that one cuts off, this one leaves out.

    Args:
      objective: a loss of samples, such as `ppo()`; a KL is added outside.
      low: smallest weight that counts, at least 0.
      high: largest one, above 0.
      level: whose ratio is the weight.
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
    """The loss without bad responses that the policy has left (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556, off-policy masking).

    value * [A >= 0 or mean_t(log sampled - log pi) <= threshold],   the mean over the tokens of a response

    What was better than expected is kept however old; what was worse is kept only while the policy might still say it. Values are
    multiplied, not weights; no gradient goes into the mask.

    Args:
      objective: a loss of samples, such as `grpo()`; a KL is added outside.
      threshold: nats a token, at least 0.
    """
    check_range("threshold", threshold, 0, math.inf, "a distance in nats a token")

    def weight(out: Outputs, batch: Batch, level: Level) -> jax.Array:
        moved = jnp.where(batch["completion_mask"], of_rollout(batch, "sampled_logps") - token_logps(out), 0.0)
        better = level(advantages_of(batch), batch) >= 0
        return (better | (by_mean(moved, batch) <= threshold)).astype(jnp.float32)

    return _times(objective, weight, by_token, "off_policy/kept")


def _times(objective: Loss, weight: Callable[[Outputs, Batch, Level], jax.Array], level: Level, metric: str) -> Loss:
    """Each term's values times weights [B, N, T] of that level, of values of responses by response; no gradient goes into them."""

    def weighed(term: Term) -> Term:
        def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            values, metrics = term.value(out, batch)
            shape = batch["completion_mask"].shape
            if values.shape not in (shape, shape[:2]):
                raise ValueError(
                    f"these weights are of tokens or responses, the term {term.name!r} has values of shape {values.shape}; add it outside"
                )
            own = weight(out, batch, level) if values.shape == shape else weight(out, batch, by_response)[..., 0]
            own = jax.lax.stop_gradient(own)
            return values * own, metrics | {metric: own}

        return term._replace(value=value)

    return objective.mapped(weighed)
