"""From logits to a token: temperature, repetition penalty, top-k, top-p and min-p, and one draw a row. No sort, no noise over all tokens.

The k-th largest logit is found by bisection on the whole numbers that order as the floats do, at most 32 passes of a comparison and a
sum; so is the probability at which those above reach p. On a CPU core that takes 2 to 3 ms each for 64 rows of 8,192, where `jax.lax.top_k`
takes 144, and finds the same sets. The draw inverts the cumulative distribution at one uniform number a row.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignax.models.statistics import most_probable

BLOCK = 128  # of the vocabulary, in the two levels of the draw


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is sampled from: the model's distribution, changed in this order, as transformers has it."""

    temperature: float = 1.0  # 0: the most probable token
    top_k: int = 0  # the k most probable tokens (and those as probable as the last of them); 0: all
    top_p: float = 1.0  # the fewest tokens whose probabilities reach p
    min_p: float = 0.0  # tokens at least so probable, relative to the most probable one
    repetition_penalty: float = 1.0  # divides positive logits of tokens that the row holds, and multiplies negative ones, first of all

    def __post_init__(self) -> None:
        """Raises ValueError for values that mean nothing."""
        for name, fine, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "1 or more, or 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is none"),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")

    @property
    def exact(self) -> bool:
        """Whether samples are drawn from the model's own distribution, so that its log-probs are those of the samples."""
        return self == Sampling()

    def __str__(self) -> str:
        """What differs from the model's own distribution."""
        fields = (f.name for f in dataclasses.fields(self))
        changed = [f"{name} {getattr(self, name)}" for name in fields if getattr(self, name) != getattr(Sampling(), name)]
        return ", ".join(changed) or "the model's own distribution"


class Drawn(NamedTuple):
    """A token of each row [R] int32, and log-probs of it [R] float32 in nats."""

    token: jax.Array
    logp: jax.Array  # under the logits as they are
    drawn: jax.Array  # under what it was drawn from


def draw(sampling: Sampling, logits: jax.Array, row: jax.Array, real: jax.Array, uniform: jax.Array) -> Drawn:
    """A token of each row, and its log-probs.

    Args:
      sampling: what to draw from.
      logits: [R, V] float32.
      row: [R, S] int, the tokens so far.
      real: [R, S] bool, which of them there are.
      uniform: [R] float32 in [0, 1).
    """
    z, w = penalised(logits, row, real, sampling.repetition_penalty), None
    if sampling.temperature == 0:
        token = first(z == z.max(axis=-1, keepdims=True))
    else:
        w = weights(sampling, z)
        token = pick(w, uniform)
    at = lambda x: jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
    top = logits.max(axis=-1, keepdims=True)
    # As a product: where nothing else reads the exponentials, XLA on CPU makes their sum a loop of scalar code.
    total = jnp.matmul(jnp.exp(logits - top), jnp.ones(logits.shape[1], jnp.float32), precision="highest")
    logp = at(logits - top) - jnp.log(total)
    if w is None:
        return Drawn(token, logp, jnp.zeros_like(logp))
    return Drawn(token, logp, logp if sampling.exact else jnp.log(at(w)) - jnp.log(w.sum(axis=-1)))


def penalised(logits: jax.Array, row: jax.Array, real: jax.Array, penalty: float) -> jax.Array:
    """The logits of tokens that stand in `row` made smaller (Keskar et al. 2019, arXiv:1909.05858, as transformers has it)."""
    if penalty == 1:
        return logits
    own = jnp.take_along_axis(logits, row, axis=-1)
    own = jnp.where(own < 0, own * penalty, own / penalty)
    at = jnp.where(real, row, logits.shape[1])
    return jax.vmap(lambda z, i, x: z.at[i].set(x, mode="drop"))(logits, at, own)


def weights(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """Probabilities [R, V] up to a factor of each row, the largest being 1; 0 for tokens that are left out."""
    z = logits / sampling.temperature
    w = jnp.exp(z - z.max(axis=-1, keepdims=True))
    if 0 < sampling.top_k < z.shape[1]:
        w = jnp.where(most_probable(z, sampling.top_k), w, 0.0)
    if sampling.top_p < 1:
        w = jnp.where(nucleus(w, sampling.top_p), w, 0.0)
    return jnp.where(w >= sampling.min_p, w, 0.0) if sampling.min_p > 0 else w


def nucleus(weights: jax.Array, p: float) -> jax.Array:
    """The fewest of each row's largest weights [R, V], from 0 to 1, that hold a share p of their sum: [R, V] bool."""
    enough = p * weights.sum(axis=-1)
    # Bits of floats that are not negative order as the floats do; those of 1 begin at the 30th.
    least = lambda t: jax.lax.bitcast_convert_type(t, jnp.float32)[:, None]

    def body(i: jax.Array, t: jax.Array) -> jax.Array:
        higher = t + jnp.left_shift(jnp.int32(1), 29 - i)
        return jnp.where(jnp.where(weights >= least(higher), weights, 0.0).sum(axis=-1) >= enough, higher, t)

    return weights >= least(jax.lax.fori_loop(0, 30, body, jnp.zeros(weights.shape[0], jnp.int32)))


def pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the cumulative distribution passes `uniform` [R], of `weights` [R, V]; never one of weight 0."""
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
    """The first part whose end is above the target, [R] int32; by rounding there may be none: then the last that is not 0."""
    last = parts.shape[1] - 1 - first(parts[:, ::-1] > 0)
    return jnp.minimum(first((ends > target[:, None]) & (parts > 0)), last)


def first(hits: jax.Array) -> jax.Array:
    """The index of the first hit in each row, [R] int32; without one, the last index."""
    n = hits.shape[1]
    return jnp.where(hits, jnp.arange(n, dtype=jnp.int32)[None], n - 1).min(axis=-1)
