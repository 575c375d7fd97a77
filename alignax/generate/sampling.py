"""Sampling a token from logits: repetition penalty, temperature, top-k, top-p and min-p, without a sort and with one random number a row.

The k-th largest logit is found by bisection over integers that order as the floats do: at most 32 passes, each a comparison and a sum.
The probability threshold of top-p is found in the same way. For 64 rows of 8,192 tokens each of the two takes 2 to 3 ms on a CPU core.
`jax.lax.top_k` finds the same set in 144 ms. The token is drawn by inverting the cumulative distribution at a uniform random number.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignax.models.statistics import most_probable

BLOCK = 128  # tokens of a block: `pick` first chooses a block of the vocabulary, then a token inside


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of sampling; as in transformers, they apply in the order repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0  # 0: greedy, the most probable token
    top_k: int = 0  # keeps the k most probable tokens, with ties of the k-th; 0: all
    top_p: float = 1.0  # keeps the fewest tokens whose probabilities sum to p or more
    min_p: float = 0.0  # keeps the tokens with at least this share of the highest probability
    repetition_penalty: float = 1.0  # for tokens of the prompt and completion: divides positive logits, multiplies negative ones

    def __post_init__(self) -> None:
        """Refuses impossible values with a ValueError."""
        for name, fine, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "1 or more, or 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is no penalty)"),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")

    @property
    def exact(self) -> bool:
        """Whether the settings change nothing: the model's own log-probs are then those of the samples."""
        return self == Sampling()

    def __str__(self) -> str:
        """The settings that change the model's distribution, as text for messages."""
        fields = (f.name for f in dataclasses.fields(self))
        changed = [f"{name} {getattr(self, name)}" for name in fields if getattr(self, name) != getattr(Sampling(), name)]
        return ", ".join(changed) or "the model's own distribution"


class Drawn(NamedTuple):
    """The sampled tokens of R rows, and their log-probs in nats."""

    token: jax.Array  # [R] int32
    logp: jax.Array  # [R] float32, under the unchanged logits
    drawn: jax.Array  # [R] float32, under the distribution that was sampled from; 0 for greedy sampling


@jax.named_scope("sample")
def draw(sampling: Sampling, logits: jax.Array, row: jax.Array, real: jax.Array, uniform: jax.Array) -> Drawn:
    """Samples a token of each row, and gives its log-probs.

    Args:
      sampling: the settings.
      logits: [R, V] float32.
      row: [R, S] int, the tokens of each row so far.
      real: [R, S] bool, False where `row` holds no token yet.
      uniform: [R] float32, random numbers in [0, 1).
    """
    z, w = penalised(logits, row, real, sampling.repetition_penalty), None
    if sampling.temperature == 0:
        token = first(z == z.max(axis=-1, keepdims=True))
    else:
        w = weights(sampling, z)
        token = pick(w, uniform)
    at = lambda x: jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
    top = logits.max(axis=-1, keepdims=True)
    # A product, because XLA on CPU makes a sum of exponentials a loop of scalar code if nothing else reads them.
    total = jnp.matmul(jnp.exp(logits - top), jnp.ones(logits.shape[1], jnp.float32), precision="highest")
    logp = at(logits - top) - jnp.log(total)
    if w is None:
        return Drawn(token, logp, jnp.zeros_like(logp))
    return Drawn(token, logp, logp if sampling.exact else jnp.log(at(w)) - jnp.log(w.sum(axis=-1)))


def penalised(logits: jax.Array, row: jax.Array, real: jax.Array, penalty: float) -> jax.Array:
    """The logits [R, V] with a repetition penalty on tokens that the row holds, as in transformers.

    Keskar et al. 2019, arXiv:1909.05858: a positive logit is divided by the penalty, a negative one multiplied.

    Args:
      logits: [R, V].
      row: [R, S] int, the tokens of each row so far.
      real: [R, S] bool, False where `row` holds no token yet.
      penalty: 1 changes nothing.
    """
    if penalty == 1:
        return logits
    own = jnp.take_along_axis(logits, row, axis=-1)
    own = jnp.where(own < 0, own * penalty, own / penalty)
    at = jnp.where(real, row, logits.shape[1])
    return jax.vmap(lambda z, i, x: z.at[i].set(x, mode="drop"))(logits, at, own)


def weights(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """The unnormalised probabilities [R, V] of a row's tokens after temperature, top-k, top-p and min-p, from logits [R, V].

    The largest of each row is 1; a token that is removed has 0.
    """
    z = logits / sampling.temperature
    w = jnp.exp(z - z.max(axis=-1, keepdims=True))
    if 0 < sampling.top_k < z.shape[1]:
        w = jnp.where(most_probable(z, sampling.top_k), w, 0.0)
    if sampling.top_p < 1:
        w = jnp.where(nucleus(w, sampling.top_p), w, 0.0)
    return jnp.where(w >= sampling.min_p, w, 0.0) if sampling.min_p > 0 else w


def nucleus(weights: jax.Array, p: float) -> jax.Array:
    """The mask of top-p: the fewest largest weights of each row whose sum is at least p times the row's sum; [R, V] bool.

    `weights`: [R, V], from 0 to 1. Ties of the smallest kept weight are kept too.

    >>> nucleus(jnp.array([[1.0, 0.2, 0.5]]), 0.8).tolist()
    [[True, False, True]]
    """
    enough = p * weights.sum(axis=-1)
    # Bits of non-negative floats order as the floats do; the highest bit of 1.0 is bit 29.
    least = lambda t: jax.lax.bitcast_convert_type(t, jnp.float32)[:, None]

    def body(i: jax.Array, t: jax.Array) -> jax.Array:
        higher = t + jnp.left_shift(jnp.int32(1), 29 - i)
        return jnp.where(jnp.where(weights >= least(higher), weights, 0.0).sum(axis=-1) >= enough, higher, t)

    return weights >= least(jax.lax.fori_loop(0, 30, body, jnp.zeros(weights.shape[0], jnp.int32)))


def pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token [R] int32 at which a row's cumulative distribution passes a uniform random number; never a token of weight 0.

    Args:
      weights: [R, V] unnormalised probabilities.
      uniform: [R] in [0, 1).
    """
    R, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    block = passes(ends, sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [R, BLOCK]
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    return block * BLOCK + passes(jnp.cumsum(inside, axis=-1), inside, target - before)


def passes(ends: jax.Array, parts: jax.Array, target: jax.Array) -> jax.Array:
    """The index of the first part that ends above a target, [R] int32. If rounding leaves none: the last part that is not 0.

    Args:
      ends: [R, n] cumulative sums of the parts.
      parts: [R, n], at least 0.
      target: [R].
    """
    last = parts.shape[1] - 1 - first(parts[:, ::-1] > 0)
    return jnp.minimum(first((ends > target[:, None]) & (parts > 0)), last)


def first(hits: jax.Array) -> jax.Array:
    """The index of the first True in each row of `hits` [R, n] bool: [R] int32; the last index if there is none."""
    n = hits.shape[1]
    return jnp.where(hits, jnp.arange(n, dtype=jnp.int32)[None], n - 1).min(axis=-1)
