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
    response is the prompt's branch; every other branch is its own root. A context shard has some of a row's queries, and all of its keys.
    """

    branch: jax.Array  # [S, P] int32 of queries; -1: padding
    root: jax.Array  # [S, P] int32 of queries
    positions: jax.Array  # [S, P] int32 of queries, in a token's own sequence
    key_branch: jax.Array  # [S, P] int32 of keys
    key_positions: jax.Array  # [S, P] int32 of keys
    # [S, C, n (n + 1) / 2 C, 2] int32 of C context shards and the n blocks of a row: blocks of queries, counted in the shard, and blocks
    # of keys of which they may see some. Those of a block of queries follow one another.
    pairs: jax.Array
    by_key: jax.Array  # the same pairs; those of a block of keys follow one another
    count: jax.Array  # [S, C] int32: the pairs that are used

    @property
    def blocks(self) -> int:
        """n, the blocks of a row."""
        return (math.isqrt(8 * self.pairs.shape[-2] * self.pairs.shape[-3] + 1) - 1) // 2


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
        places, packed = _dealt_place(places, batch.form.positions, C), [jax.vmap(lambda x: _dealt(x, C))(x) for x in packed]
    token, position, length, branch, root = packed
    visited = jax.vmap(functools.partial(_pairs, batch.form.block, batch.form.context))(branch, root)
    sight = Sight(branch, root, position, branch, position, *visited)
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

    A shard has an early stripe and a late one, so the queries of all shards see equally many keys of a long sequence.
    """
    return [stripe for c in range(context) for stripe in (c, 2 * context - 1 - c)]


def _dealt(x: jax.Array, context: int) -> jax.Array:
    """An array [P] with its stripes in the order of the context shards."""
    return x.reshape(2 * context, -1)[jnp.asarray(_stripes(context))].reshape(x.shape)


def _dealt_place(x: jax.Array, size: int, context: int) -> jax.Array:
    """Where `_dealt` puts what stands at the places x of an array of the given size."""
    if context == 1:
        return x
    wide = size // (2 * context)
    stripe = x // wide
    return jnp.where(stripe < context, 2 * stripe, 2 * (2 * context - 1 - stripe) + 1) * wide + x % wide


def _pairs(block: int, C: int, branch: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pairs of blocks of a packed row [P] that may see each other, as `Sight` has them: by query, by key, and their number [C].

    Branches and roots ascend in a row. So a block sees the keys of two ranges of blocks: those of its roots, and those of its own branches
    up to itself. The queries that see a block of keys are two ranges, too.
    """
    n = branch.shape[0] // block
    index = jnp.arange(n)
    place = _dealt_place(index, n, C)  # where a block stands
    branch, root = (x.reshape(n, block)[place] for x in (branch, root))
    real, far = branch >= 0, jnp.iinfo(jnp.int32).max
    used = real.any(axis=1)  # the others are padding, at the end of the row
    low, low_root = (jnp.where(real, x, far).min(axis=1) for x in (branch, root))
    high, high_root = (jnp.where(used, x.max(axis=1), far) for x in (branch, root))
    below = lambda x, than: (x[None] < than[:, None]).sum(axis=1)  # how many are less than each
    upto = lambda x, than: (x[None] <= than[:, None]).sum(axis=1)
    first, end = below(high, low), upto(low, high)  # the first block of keys, and the end of the queries, of a block's branches
    keys = (below(high, low_root), jnp.minimum(upto(low, high_root), first)), (first, index + 1)
    queries = (index, end), (jnp.maximum(below(high_root, low), end), upto(low_root, high))
    keys, queries = (jnp.where(used, jnp.asarray(ranges), 0).transpose(1, 2, 0) for ranges in (keys, queries))  # [2, n, 2]: begins, ends

    def of_shard(c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The pairs of a context shard's queries, which are one stripe of the row's blocks, or two."""
        wide, most = (n, n * (n + 1) // 2) if C == 1 else (n // (2 * C), n * (n + 1) // (2 * C))
        stripes = wide * (jnp.zeros(1, jnp.int32) if C == 1 else jnp.stack([c, 2 * C - 1 - c]))[None, None, None]
        own = jnp.argsort(place)[c * (n // C) + jnp.arange(n // C)]
        query, key, count = _listed(keys[0, own], keys[1, own], most)
        begin, ends = jnp.clip(queries[..., None], stripes, stripes + wide).reshape(2, n, -1)
        its_key, its_query, _ = _listed(begin, ends, most)
        at = lambda blocks: _dealt_place(blocks, n, C)
        pair = lambda queries, keys: jnp.maximum(jnp.stack([queries, at(keys)], axis=1), 0).astype(jnp.int32)
        return pair(query, key), pair(at(its_query) - c * (n // C), its_key), count.astype(jnp.int32)

    return jax.vmap(of_shard)(jnp.arange(C))


def _listed(begin: jax.Array, end: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows and the values of ranges [n, r] in their order, both [most], padded with 0; and their number []."""
    sizes = jnp.maximum(end - begin, 0).ravel()
    ends, at = jnp.cumsum(sizes), jnp.arange(most)
    of = jnp.minimum(jnp.searchsorted(ends, at, side="right"), len(sizes) - 1)
    used = at < ends[-1]
    return jnp.where(used, of // begin.shape[1], 0), jnp.where(used, begin.ravel()[of] + at - (ends - sizes)[of], 0), ends[-1]
