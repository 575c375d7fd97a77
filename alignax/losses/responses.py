"""What losses on sampled responses share: a loss is a value per token, and an aggregate says how tokens are averaged.

Which surrogate (clipped, weighted, soft, ..), which ratio (of a token, of a response) and which aggregate are independent choices:
`ppo(aggregate=response_mean)` is a loss. An aggregate's weights are of data alone, so microbatches and shards add up exactly.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Over, Term, Value, lengths, make_loss, sequence, token_logps
from alignax.losses.divergences import CAP, exp, expm1
from alignax.losses.pairs import check_positive, field
from alignax.types import Batch, Metrics, Outputs

Ratio = Callable[[jax.Array, Batch], jax.Array]  # log-ratios of tokens [B, N, T] -> those that a loss compares [B, N, T]


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

    def __call__(self, name: str, value: Value) -> Loss:
        """The loss of values [B, N, T]."""
        return make_loss(name, value if self.scale is None else self._scaled(value, self.scale), self.over)

    def _scaled(self, value: Value, scale: Callable[[Batch], jax.Array]) -> Value:
        def scaled(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            values, metrics = value(out, batch)
            return values * scale(batch), metrics

        return scaled


token_mean = Aggregate(completion_tokens)
"""The mean over all completion tokens of the global batch: long responses count more (DAPO, Yu et al. 2025, arXiv:2503.14476)."""

response_mean = Aggregate(response_tokens)
"""The mean over responses of their means over tokens, as GRPO's: a token of a long response counts less."""


def token_sum(max_length: float) -> Aggregate:
    """The mean over responses of their sums over tokens, divided by a constant: no bias by length (Dr. GRPO, arXiv:2503.20783).

    Args:
      max_length: the constant, usually the longest completion that is sampled; 1 sums.
    """
    check_positive("max_length", max_length)
    return Aggregate(response_tokens, lambda batch: (lengths(batch) / max_length)[..., None])


def by_token(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The ratio of each token, as PPO's."""
    return log_ratio


def by_response(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The ratio of the whole response, at each of its tokens: the sum of the log-ratios."""
    return jnp.broadcast_to(sequence(log_ratio, batch)[..., None], log_ratio.shape)


def by_mean(log_ratio: jax.Array, batch: Batch) -> jax.Array:
    """The geometric mean over the tokens of a response, at each of them."""
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
    return field(batch, "advantages", "group_relative()) or another of alignax.experience.advantages")


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
    return Loss(tuple((coefficient, term._replace(over=_of_finished(term.over))) for coefficient, term in objective.terms))


def _of_finished(over: Over) -> Over:
    def weights(batch: Batch) -> jax.Array:
        whole = over(batch)
        truncated = field(batch, "truncated", "a rollout")
        if whole.shape[: truncated.ndim] != truncated.shape:
            raise ValueError(f"finished() drops responses {truncated.shape}, the loss weighs {whole.shape}; it must be one of responses")
        return jnp.where(jnp.expand_dims(truncated, tuple(range(truncated.ndim, whole.ndim))), 0, whole)

    return weights


def importance_weighted(objective: Loss, cap: float = 2.0) -> Loss:
    """The loss times the truncated importance weight of each token (Yao et al. 2025, "Your efficient RL framework secretly..").

    min(old / sampled, cap), of a loss of whole responses, such as `rloo()`, that of the response

    For samples of another program, or of another distribution, than the one that computed `old_logps`: `sampled_logps` are those that
    tokens were drawn with. Values are multiplied, not weights, so what is averaged stays the same. Without `old_logps` the policy itself
    is the old one; no gradient goes into the weight.

    Args:
      objective: a loss of samples, such as `ppo()`; a KL is added outside.
      cap: largest weight, above 0; it bounds the variance and costs bias.
    """
    check_positive("cap", cap)
    return Loss(tuple((coefficient, term._replace(value=_weighed(term, cap))) for coefficient, term in objective.terms))


def _weighed(term: Term, cap: float) -> Value:
    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        values, metrics = term.value(out, batch)
        old = batch.get("old_logps", jax.lax.stop_gradient(token_logps(out)))
        ratio = jnp.where(batch["completion_mask"], old - field(batch, "sampled_logps", "a rollout"), 0.0)  # [B, N, T]
        if values.shape == ratio.shape[:2]:
            ratio = ratio.sum(axis=-1)
        elif values.shape != ratio.shape:
            raise ValueError(
                f"importance weights are of tokens or responses, the term {term.name!r} has values of shape {values.shape}; add it outside"
            )
        weight = jnp.minimum(exp(ratio), cap)
        return values * weight, metrics | {"importance_weight": weight}

    return value
