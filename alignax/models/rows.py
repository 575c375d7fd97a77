"""Rows as the decoder reads them: padded, as the batch has them, or packed behind one another, where responses may share their prompt.

A packed row holds the rows of several examples. With shared prompts an example is its prompt, then its responses: each response reads the
prompt and itself. Positions count within an example's own sequence, so the outputs are those of the padded rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignax.packing import Packed, shared_tokens
from alignax.types import Batch, rows


class Sight(NamedTuple):
    """Which tokens of packed rows [S, P] see which: earlier ones of their own branch and of its root.

    A branch is a run of tokens that follow one another: a row, or where responses share a prompt, the prompt or one response. The root of a
    response is the prompt's branch; every other branch is its own root.
    """

    branch: jax.Array  # [S, P] int32, ascending in a row; -1: padding
    root: jax.Array  # [S, P] int32
    positions: jax.Array  # [S, P] int32, in a token's own sequence
    pairs: jax.Array  # [S, n (n + 1) / 2, 2] int32: blocks of queries, and blocks of keys of which they may see some; query blocks ascend
    by_key: jax.Array  # the same pairs in the order of their key blocks
    count: jax.Array  # [S] int32: the pairs that are used
    first: jax.Array  # [S] int32: the block from which query blocks are counted; not 0 where a device has only some of a row's queries

    @property
    def blocks(self) -> int:
        """n, the blocks of a row; there is a place for each of its n (n + 1) / 2 pairs."""
        return (math.isqrt(8 * self.pairs.shape[-2] + 1) - 1) // 2


class Laid(NamedTuple):
    """Rows for the decoder, and where the batch's own tokens are among them."""

    tokens: jax.Array  # [R, T] of padded rows, [S, P] of packed ones
    mask: jax.Array  # the same shape; True for real tokens
    places: jax.Array | None = None  # [R, T] int32: the position of each token of the batch in its shard's packed row; None: padded
    lengths: jax.Array | None = None  # [S, P] int32: the length of a token's own sequence
    sight: Sight | None = None


def at_places(states: jax.Array, places: jax.Array | None) -> jax.Array:
    """The states [R, n, ...] at the places [R, n] of packed rows [S, P, ...], counted in each batch shard; without places all states."""
    if places is None:
        return states
    found = jax.vmap(lambda x, at: x[at])(states, places.reshape(states.shape[0], -1))
    return found.reshape(*places.shape, *states.shape[2:])


def laid_out(batch: Batch, tokens: str = "tokens", mask: str = "mask") -> Laid:
    """Lays the rows of a batch out for the decoder: packed if the batch is `Packed`, else padded.

    Args:
      batch: the batch.
      tokens: the field of the tokens [B, N, T] that the model reads.
      mask: the field that marks the real ones among them.
    """
    if not isinstance(batch, Packed) or batch.form.examples not in (0, len(batch[mask])):
        return Laid(rows(batch[tokens]), rows(batch[mask]))
    S, shared = batch.form.shards, batch.form.shared and batch[mask].shape[1] > 1
    split = lambda x: x.reshape(S, -1, *x.shape[1:])
    places, *packed = jax.vmap(functools.partial(_packed, batch.form.positions, shared))(
        *(split(batch[name]) for name in (tokens, mask, "completion_mask"))
    )
    if (C := batch.form.context) > 1:
        size = batch.form.positions // (2 * C)
        stripe = places // size
        places = jnp.where(stripe < C, 2 * stripe, 2 * (2 * C - 1 - stripe) + 1) * size + places % size
        packed = [_dealt(x, C) for x in packed]
    token, position, length, branch, root = packed
    visited = jax.vmap(functools.partial(_pairs, batch.form.block, batch.form.context))(branch, root)
    sight = Sight(branch, root, position, *visited, jnp.zeros(S, jnp.int32))
    return Laid(token, branch >= 0, rows(places.reshape(batch[mask].shape)), length, sight)


def _packed(P: int, shared: bool, tokens: jax.Array, mask: jax.Array, scored: jax.Array) -> tuple[jax.Array, ...]:
    """The packed row of a shard's examples [b, N, T]: the places [b, N, T], and tokens, positions, lengths, branches and roots [P]."""
    b, N, T = mask.shape
    index = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1  # place of a real token in its own row
    lengths = mask.sum(axis=-1, dtype=jnp.int32)  # [b, N]
    common = shared_tokens(tokens, mask, scored) & mask[:, :1] if shared else jnp.zeros((b, 1, T), bool)
    prompt = common.sum(axis=(1, 2), dtype=jnp.int32)[:, None]  # [b, 1]
    own = lengths - prompt  # [b, N] tokens behind the shared prompt
    size = prompt[:, 0] + own.sum(axis=1)
    first = (jnp.cumsum(size) - size)[:, None]  # [b, 1] of each example
    behind = first + prompt + jnp.cumsum(own, axis=1) - own  # [b, N] of each row's own tokens
    # Padding among a row's tokens has the place of the last token before it.
    before, last = index < prompt[..., None], jnp.maximum(index, 0)
    places = jnp.where(before, first[..., None] + last, behind[..., None] + last - prompt[..., None])
    places = jnp.clip(places, 0, P - 1)
    kept = mask & ~(common & (jnp.arange(N) > 0)[None, :, None])  # one copy of a shared prompt
    source = jnp.full(P, b * N * T, jnp.int32)
    source = source.at[jnp.where(kept, places, P).ravel()].set(jnp.arange(b * N * T, dtype=jnp.int32), mode="drop")
    at = lambda x, fill: jnp.append(jnp.broadcast_to(x, mask.shape).ravel(), jnp.asarray(fill, x.dtype))[source]
    example, row = jnp.arange(b)[:, None, None] * (N + 1), 1 + jnp.arange(N)[None, :, None]
    branch = example + jnp.where(common, 0, row)
    root = jnp.broadcast_to(example, mask.shape) if shared else branch
    return places, at(tokens, 0), at(index, 0), at(lengths[..., None], 1), at(branch, -1), at(root, -1)


def _stripes(context: int) -> list[int]:
    """The order in which the 2 C equal stripes of a row stand on C context shards: 0, 2C - 1 | 1, 2C - 2 | ..

    A shard has an early stripe and a late one, so that all shards see about as many pairs.
    """
    return [stripe for c in range(context) for stripe in (c, 2 * context - 1 - c)]


def _dealt(x: jax.Array, context: int) -> jax.Array:
    """An array [.., P] with the stripes of its last axis in the order of the context shards."""
    return x.reshape(*x.shape[:-1], 2 * context, -1)[..., jnp.asarray(_stripes(context)), :].reshape(x.shape)


def _pairs(block: int, context: int, branch: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pairs of blocks (queries, keys) of a packed row [P] that may see each other, by query and by key; and their number []."""
    n = branch.shape[0] // block
    rank = _dealt(jnp.arange(n), context) if context > 1 else jnp.arange(n)  # the place of a block before rows were dealt to shards
    branch, root = branch.reshape(n, block), root.reshape(n, block)
    real, far = branch >= 0, jnp.iinfo(jnp.int32).max
    lowest = lambda x: jnp.where(real, x, far).min(axis=1)
    # A block of keys has the branches from its lowest to its highest; so do blocks of queries, and the roots that they see.
    low, high, low_root, high_root = lowest(branch), branch.max(axis=1), lowest(root), root.max(axis=1)
    meet = lambda first, last: (first[:, None] <= high[None]) & (low[None] <= last[:, None])
    seen = (meet(low, high) | meet(low_root, high_root)) & (rank[:, None] >= rank[None])
    found = functools.partial(jnp.nonzero, size=n * (n + 1) // 2, fill_value=0)
    pair = lambda queries, keys: jnp.stack([queries, keys], axis=1).astype(jnp.int32)
    return pair(*found(seen)), pair(*found(seen.T)[::-1]), seen.sum(dtype=jnp.int32)
