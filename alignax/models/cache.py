"""The key-value cache of generation: keys and values of earlier tokens, one row for each sequence.

Each row is filled from position 0 on, to its own length. So prompts of different lengths need no padding before their completions. In
int8 every head's vector at every position has its own scale: its largest absolute value / 127.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from alignax.mesh import sharding
from alignax.models.heads import soft_cap

DTYPES = ("float32", "bfloat16", "int8")


class Cache(NamedTuple):
    """The keys and values of R rows of S positions. Heads come before positions, so that attention reads contiguous matrices."""

    k: jax.Array  # [L, R, KV, S, h]
    v: jax.Array  # [L, R, KV, S, h]
    k_scale: jax.Array | None = None  # [L, R, KV, S] float32, in an int8 cache only, as is v_scale
    v_scale: jax.Array | None = None


def empty(shape: tuple[int, ...], dtype: Any) -> Cache:
    """A cache of zeros, of shape [L, R, KV, S, h]."""
    scale = jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale, scale)


def pack(k: jax.Array, v: jax.Array, dtype: Any) -> Cache:
    """Keys and values [.., h] in the dtype of the cache; in int8 with their scales [..]."""
    if dtype != jnp.int8:
        return Cache(k.astype(dtype), v.astype(dtype))
    (k, k_scale), (v, v_scale) = _round(k), _round(v)
    return Cache(k, v, k_scale, v_scale)


def _round(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def write(cache: Cache, layer: jax.Array, at: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh | None = None) -> Cache:
    """The cache with the keys and values of one more token in each row, for one layer.

    Args:
      cache: [L, R, KV, S, h].
      layer: [] int.
      at: [R] int, the position of each row's token.
      k: [R, KV, h] keys of the tokens.
      v: [R, KV, h] values of the tokens.
      mesh: the mesh that the cache is sharded over; None for one device.
    """

    def local(layer: jax.Array, at: jax.Array, cache: Cache, new: Cache) -> Cache:
        row = jnp.arange(at.shape[0])
        return jax.tree.map(lambda whole, x: whole.at[layer, row, :, at].set(x), cache, new)

    new = pack(k, v, cache.k.dtype)
    if mesh is None:
        return local(layer, at, cache, new)
    # With shard_map, because the partitioner would send every row to every device.
    spec = lambda x, *logical: sharding(mesh, logical, x.shape[: len(logical)]).spec
    whole = jax.tree.map(lambda x: spec(x, None, "batch", "heads"), cache)
    specs = (PartitionSpec(), spec(at, "batch"), whole, jax.tree.map(lambda x: spec(x, "batch", "heads"), new))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(layer, at, cache, new)


def extend(cache: Cache, layer: jax.Array, at: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """The cache with the keys and values of t more tokens, at the same positions of all rows, for one layer.

    Args:
      cache: [L, R, KV, S, h], not in int8.
      layer: [] int.
      at: [] int, the position of the first token.
      k: [R, t, KV, h] keys of the tokens.
      v: [R, t, KV, h] values of the tokens.
    """
    new = pack(k.swapaxes(1, 2), v.swapaxes(1, 2), cache.k.dtype)
    return jax.tree.map(lambda whole, x: jax.lax.dynamic_update_slice(whole, x[None], (layer, 0, 0, at, 0)), cache, new)


def attend_piece(
    q: jax.Array,
    cache: Cache,
    layer: jax.Array,
    at: jax.Array,
    *,
    window: jax.Array | None = None,
    scalar: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Causal attention of t queries per row over the cache, t keys at a time, with the softmax in float32 summed over these blocks.

    Args:
      q: [R, t, H, h] queries.
      cache: [L, R, KV, S, h], not in int8, with the keys and values of the queries' own tokens; S is a multiple of t.
      layer: [] int.
      at: [] int, the position of the first query, a multiple of t.
      window: as in `alignax.models.attention.attention`.
      scalar: as in `alignax.models.attention.attention`.
      cap: as in `alignax.models.attention.attention`.

    Returns:
      [R, t, H, h].
    """
    R, t, H, h = q.shape
    KV, first = cache.k.shape[2], at + jnp.arange(t)
    q = q.reshape(R, t, KV, H // KV, h).transpose(0, 2, 3, 1, 4)

    def visit(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = sums
        k, v = (jax.lax.dynamic_slice(x, (layer, 0, 0, j * t, 0), (1, R, KV, t, h))[0] for x in (cache.k, cache.v))
        scores = jnp.einsum("rkgth,rksh->rkgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(scalar or h)
        distance = first[:, None] - (j * t + jnp.arange(t))[None]
        seen = distance >= 0 if window is None else (distance >= 0) & ((distance < window) | (window == 0))
        scores = jnp.where(seen[None, None, None], soft_cap(scores, cap), -1e30)
        highest = jnp.maximum(top, scores.max(axis=-1))
        e = jnp.where(seen[None, None, None], jnp.exp(scores - highest[..., None]), 0.0)
        lower = jnp.exp(top - highest)  # what was summed so far was relative to the lower maximum
        part = jnp.einsum("rkgts,rksh->rkgth", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * lower[..., None] + part, highest, total * lower + e.sum(axis=-1)

    lowest = jnp.full(q.shape[:-1], -1e30, jnp.float32)
    out, _, total = jax.lax.fori_loop(0, at // t + 1, visit, (jnp.zeros(q.shape, jnp.float32), lowest, jnp.zeros_like(lowest)))
    return (out / total[..., None]).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(R, t, H, h)


def attend(
    q: jax.Array,
    cache: Cache,
    layer: jax.Array,
    at: jax.Array,
    *,
    window: jax.Array | None = None,
    scalar: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention of one query per row over the cache, with the softmax in float32.

    Args:
      q: [R, H, h] queries.
      cache: [L, R, KV, S, h], with the keys and values of each query's own token.
      layer: [] int.
      at: [R] int, the position of each query; it sees the positions up to its own.
      window: as in `alignax.models.attention.attention`.
      scalar: as in `alignax.models.attention.attention`.
      cap: as in `alignax.models.attention.attention`.

    Returns:
      [R, H, h].
    """
    R, H, h = q.shape
    own: Cache = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), cache)
    q = q.reshape(R, own.k.shape[1], -1, h)  # [R, KV, G, h]
    scores = jnp.einsum("rkgh,rksh->rkgs", q, own.k.astype(q.dtype), preferred_element_type=jnp.float32) / math.sqrt(scalar or h)
    if own.k_scale is not None:
        scores = scores * own.k_scale[:, :, None]
    scores = soft_cap(scores, cap)
    distance = at[:, None] - jnp.arange(own.k.shape[2])[None]  # [R, S]
    seen = distance >= 0 if window is None else (distance >= 0) & ((distance < window) | (window == 0))
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
    if own.v_scale is not None:
        weights = weights * own.v_scale[:, :, None]
    return jnp.einsum("rkgs,rksh->rkgh", weights.astype(q.dtype), own.v.astype(q.dtype)).reshape(R, H, h)
