"""Causal attention over whole sequences, in blocks of queries, with a hand-written backward pass.

`attention` is for padded rows. `packed_attention` is for rows that hold several sequences: it visits only the blocks of keys that a block
of queries may see, so its work grows with the lengths of the sequences and not with that of the row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from alignax import mesh as meshes
from alignax.models.heads import soft_cap
from alignax.models.rows import Sight

KEPT = "attention"  # name of the outputs and log Z, which the backward pass reads: policies that keep them compute no attention again


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    block: int = 0,
    *,
    window: jax.Array | None = None,
    scalar: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention over whole sequences, with the softmax in float32.

    Each block of queries attends only to keys before the block's end, so memory and work are those of the causal half. No attention
    weights are stored for the backward pass, which recomputes them: see `attend`.

    Args:
      q: [R, T, H, h] queries; h is the size of a head.
      k: [R, T, KV, h] keys of the KV key-value heads.
      v: [R, T, KV, h] values.
      mask: [R, T] bool, True for real tokens.
      block: queries per block; 0: an eighth of T, at least 64 and at most 512.
      window: [] int, the number of keys that a query sees, with its own; 0 or None: all.
      scalar: scores are divided by sqrt(scalar); None: by sqrt(h).
      cap: scores become cap * tanh(score / cap); None: scores are not capped.

    Returns:
      [R, T, H, h].
    """
    R, T, H, h = q.shape
    KV = k.shape[2]
    # Heads come before tokens, so that each product reads contiguous matrices: 1.5 times as fast at 1,024 tokens on a CPU.
    q = q.reshape(R, T, KV, H // KV, h).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def part(first: int, end: int) -> jax.Array:
        scale = 1 / math.sqrt(scalar or h)
        return attend(first, scale, cap, q[:, :, :, first:end], k[:, :, :end], v[:, :, :end], mask[:, :end], window)

    block = block or min(max(-(-T // 8), 64), 512)
    out = jnp.concatenate([part(t, min(t + block, T)) for t in range(0, T, block)], axis=3)  # [R, KV, G, T, h]
    return out.transpose(0, 3, 1, 2, 4).reshape(R, T, H, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    first: int, scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, window: jax.Array | None
) -> jax.Array:
    """Attention of one block of queries: softmax(scale q k^T) v, [R, KV, G, t, h].

    The backward pass is hand-written, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135). It needs the inputs, the output o and
    each query's log Z, the log of the softmax's denominator, where z are the scores:

        p = exp(z - log Z),   dz = p (do . v - do . o),   dq = scale dz k,   dk = scale dz^T q,   dv = p^T do

    Automatic differentiation would store [t, s] arrays of scores and weights for every layer, and pass over them four times.

    Args:
      first: the position of the first query.
      scale: the factor of the scores.
      cap: as in `attention`.
      q: [R, KV, G, t, h] queries, G for each of the KV key-value heads.
      k: [R, KV, s, h] keys, from position 0 on.
      v: [R, KV, s, h] values.
      mask: [R, s] bool, True for real tokens.
      window: as in `attention`.
    """
    return _attend(first, scale, cap, q, k, v, mask, window)[0]


def _attend(
    first: int, scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, window: jax.Array | None
) -> tuple[jax.Array, Any]:
    scores = _scores(first, scale, cap, q, k, mask, window)
    top = scores.max(axis=-1, keepdims=True)
    e = jnp.exp(scores - top)
    total = e.sum(axis=-1, keepdims=True)
    out = jnp.einsum("rkgts,rksh->rkgth", (e / total).astype(v.dtype), v)
    out, log_z = checkpoint_name((out, (top + jnp.log(total))[..., 0]), KEPT)
    return out, (q, k, v, mask, window, out, log_z)


def _attend_backward(first: int, scale: float, cap: float | None, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, mask, window, out, log_z = saved
    scores = _scores(first, scale, cap, q, k, mask, window)
    p = jnp.exp(scores - log_z[..., None])
    along = jnp.einsum("rkgth,rkgth->rkgt", dout, out, preferred_element_type=jnp.float32)
    ds = p * (jnp.einsum("rkgth,rksh->rkgts", dout, v, preferred_element_type=jnp.float32) - along[..., None]) * scale
    if cap is not None:
        ds = ds * (1 - jnp.square(jnp.maximum(scores / cap, -1.0)))  # 0 for a key that is not seen
    ds, p = ds.astype(q.dtype), p.astype(v.dtype)
    dk, dv = jnp.einsum("rkgts,rkgth->rksh", ds, q), jnp.einsum("rkgts,rkgth->rksh", p, dout)
    return jnp.einsum("rkgts,rksh->rkgth", ds, k), dk, dv, None, None


attend.defvjp(_attend, _attend_backward)


def _scores(
    first: int, scale: float, cap: float | None, q: jax.Array, k: jax.Array, mask: jax.Array, window: jax.Array | None
) -> jax.Array:
    """The attention scores [R, KV, G, t, s] float32; -1e30 for a key that its query does not see."""
    query = first + jnp.arange(q.shape[3])[None, :, None]  # positions, [1, t, 1]
    key = jnp.arange(k.shape[2])[None, None, :]
    seen = query >= key if window is None else (query >= key) & ((query - key < window) | (window == 0))
    # A padding query sees itself, so that its softmax is finite; its output is never read.
    visible = seen & mask[:, None, :] | (query == key)  # [R, t, s]
    scores = jnp.einsum("rkgth,rksh->rkgts", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(visible[:, None, None], soft_cap(scores, cap), -1e30)


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sight: Sight,
    mesh: Mesh | None = None,
    *,
    kernel: str = "xla",
    window: jax.Array | None = None,
    scalar: float | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Grouped-query attention over packed rows, in which each token sees the earlier tokens of its own sequence; softmax in float32.

    On a mesh every device visits its own blocks, of its own rows and heads. With a context axis it has a part of each row's queries, and
    gathers the keys and values of the row, which are a small part of the activations.

    Args:
      q: [S, P, H, h] queries; h is the size of a head, P is a whole number of blocks.
      k: [S, P, KV, h] keys of the KV key-value heads.
      v: [S, P, KV, h] values.
      sight: which tokens see which.
      mesh: the mesh that the arrays are sharded over; None for one device.
      kernel: "xla", or on TPUs "splash": `alignax.models.packed_kernel`.
      window: as in `attention`; distances are those of positions in a sequence.
      scalar: as in `attention`.
      cap: as in `attention`.
      interpret: whether the kernel is interpreted, on any platform and slowly, for tests.

    Returns:
      [S, P, H, h]; 0 for padding.
    """
    h, KV = q.shape[3], k.shape[2]
    window = jnp.zeros((), jnp.int32) if window is None else window
    blocks: Any = attend_blocks
    if kernel == "splash":
        from alignax.models import packed_kernel  # imports Pallas, which takes a tenth of a second that other platforms need not spend

        blocks = functools.partial(packed_kernel.attend_blocks, interpret)
    run = functools.partial(_packed_rows, functools.partial(blocks, 1 / math.sqrt(scalar or h), cap), q.shape[1] // sight.blocks)
    if (C := sight.count.shape[-1]) > 1 and (mesh is None or mesh.shape["context"] != C):
        raise ValueError(f"the rows are laid out for {C} context shards, and the mesh is {meshes.words(mesh) if mesh else 'one device'}")
    if mesh is None or mesh.size == 1:
        return run(q, k, v, sight, window)
    split = lambda x, *axes: meshes.sharding(mesh, axes, x.shape).spec
    heads = "heads" if KV % mesh.shape["tensor"] == 0 else None  # all key-value heads, where the shards do not divide them
    tokens = "tokens" if C > 1 else None
    specs: Any = tuple(split(x, "batch", tokens, heads, None) for x in (q, k, v))
    queries, keys, count = split(sight.branch, "batch", tokens), split(sight.branch, "batch", None), split(sight.count, "batch", tokens)
    pairs = split(sight.pairs, "batch", tokens, None, None)
    parts: Any = queries, queries, queries, keys, keys, pairs, pairs, count
    sights = Sight(*parts)

    def own(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, window: jax.Array) -> jax.Array:
        if C > 1:
            k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        return run(q, k, v, sight, window)

    return jax.shard_map(own, mesh=mesh, in_specs=(*specs, sights, PartitionSpec()), out_specs=specs[0], check_vma=False)(
        q, k, v, sight, window
    )


def _packed_rows(
    blocks: Callable[..., jax.Array], t: int, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, window: jax.Array
) -> jax.Array:
    """The attention of a device's rows in blocks of t tokens, given the function of blocks [n, KV, G t, h] of queries, and of keys."""
    S, P, H, h = q.shape
    KV, n = k.shape[2], P // t
    q = q.reshape(S, n, t, KV, H // KV, h).transpose(0, 1, 3, 4, 2, 5).reshape(S, n, KV, -1, h)
    k, v = (x.reshape(S, -1, t, KV, h).swapaxes(2, 3) for x in (k, v))
    sight = sight._replace(pairs=sight.pairs[:, 0], by_key=sight.by_key[:, 0], count=sight.count[:, 0])  # of this context shard
    row: Any = lambda q, k, v, sight: blocks(q, k, v, sight, window)
    # A device has one row as a rule: a vmap would let each pair of blocks copy all that the loop has summed.
    out = row(*jax.tree.map(lambda x: x[0], (q, k, v, sight)))[None] if S == 1 else jax.vmap(row)(q, k, v, sight)
    return out.reshape(S, n, KV, H // KV, t, h).transpose(0, 1, 4, 2, 3, 5).reshape(S, P, H, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_blocks(scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, window: jax.Array) -> jax.Array:
    """Attention of one packed row in blocks, [n, KV, G t, h], with the softmax and the gradient of `attend` summed over pairs of blocks.

    Args:
      scale: the factor of the scores.
      cap: as in `attention`.
      q: [n, KV, G t, h] queries of n blocks with t tokens, G for each of the KV key-value heads.
      k: [m, KV, t, h] keys of all m blocks of the row.
      v: [m, KV, t, h] values.
      sight: of the row, without the axis S.
      window: [] int32; 0: no window.
    """
    return _attend_blocks(scale, cap, q, k, v, sight, window)[0]


def _attend_blocks(
    scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, window: jax.Array
) -> tuple[jax.Array, Any]:
    def visit(p: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = sums
        i, j = sight.pairs[p]
        scores, visible = _block_scores(scale, cap, q[i], k[j], sight, i, j, window)
        highest = jnp.maximum(top[i], scores.max(axis=-1))
        e = jnp.where(visible, jnp.exp(scores - highest[..., None]), 0.0)
        lower = jnp.exp(top[i] - highest)  # what was summed so far was relative to the lower maximum
        part = jnp.einsum("kqs,ksh->kqh", e.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
        out = out.at[i].set(out[i] * lower[..., None] + part)
        return out, top.at[i].set(highest), total.at[i].set(total[i] * lower + e.sum(axis=-1))

    lowest = jnp.full(q.shape[:3], -1e30, jnp.float32)
    out, top, total = jax.lax.fori_loop(0, sight.count, visit, (jnp.zeros(q.shape, jnp.float32), lowest, jnp.zeros_like(lowest)))
    out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(v.dtype)
    out, log_z = checkpoint_name((out, top + jnp.log(jnp.maximum(total, 1e-30))), KEPT)
    return out, (q, k, v, sight, window, out, log_z)


def _attend_blocks_backward(scale: float, cap: float | None, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, sight, window, out, log_z = saved
    along = jnp.einsum("nkqh,nkqh->nkq", dout, out, preferred_element_type=jnp.float32)

    def visit(p: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk, dv = sums
        i, j = sight.pairs[p]
        scores, visible = _block_scores(scale, cap, q[i], k[j], sight, i, j, window)
        weight = jnp.where(visible, jnp.exp(scores - log_z[i][..., None]), 0.0)
        ds = jnp.einsum("kqh,ksh->kqs", dout[i], v[j], preferred_element_type=jnp.float32) - along[i][..., None]
        ds = weight * ds * scale
        if cap is not None:
            ds = ds * (1 - jnp.square(jnp.maximum(scores / cap, -1.0)))
        ds, weight = ds.astype(q.dtype), weight.astype(v.dtype)
        product: Any = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dq = dq.at[i].add(product("kqs,ksh->kqh", ds, k[j]))
        return dq, dk.at[j].add(product("kqs,kqh->ksh", ds, q[i])), dv.at[j].add(product("kqs,kqh->ksh", weight, dout[i]))

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, sight.count, visit, zeros)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend_blocks.defvjp(_attend_blocks, _attend_blocks_backward)


def _block_scores(
    scale: float, cap: float | None, q: jax.Array, k: jax.Array, sight: Sight, i: jax.Array, j: jax.Array, window: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The scores [KV, G t, s] float32 of a block of queries and one of keys, -1e30 where not seen; and what is seen, [1, G t, s] bool."""
    t = k.shape[1]
    block = lambda x, at: x.reshape(-1, t)[at]
    branch, root, seen = block(sight.branch, i)[:, None], block(sight.root, i)[:, None], block(sight.key_branch, j)[None]
    distance = block(sight.positions, i)[:, None] - block(sight.key_positions, j)[None]
    visible = (distance >= 0) & (branch >= 0) & ((seen == branch) | (seen == root)) & ((distance < window) | (window == 0))  # [t, s]
    visible = jnp.tile(visible, (q.shape[1] // t, 1))[None]
    scores = jnp.einsum("kqh,ksh->kqs", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(visible, soft_cap(scores, cap), -1e30), visible
