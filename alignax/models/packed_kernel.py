"""Attention over a packed row as Pallas kernels for TPUs: `alignax.models.attention.attend_blocks`, with no scores in the main memory.

A grid step computes a pair of blocks for all G query heads of a key-value head. Which pairs see each other is known on the device alone,
so the grid has a dynamic size, and each step looks its pair up. Scores stand as [s, t], keys by queries: what belongs to a query is then a
row, and the softmax reduces over rows of the vector unit and not across its lanes.

Outputs and gradients are those of one softmax over prompt and response together: nothing is merged afterwards.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from alignax.models.attention import KEPT
from alignax.models.heads import soft_cap
from alignax.models.rows import Sight

# A score that is not seen lies so far below the lowest maximum that its exponential is 0, also for a query that sees nothing.
UNSEEN, LOWEST = -1e30, -1e29


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_blocks(
    interpret: bool, scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, window: jax.Array
) -> jax.Array:
    """Attention of one packed row in blocks, [n, KV, G t, h], by the kernels.

    Args:
      interpret: whether the kernels are interpreted, on any platform and slowly, for tests.
      scale: the factor of the scores.
      cap: as in `alignax.models.attention.attention`.
      q: [n, KV, G t, h] queries of n blocks with t tokens, G for each of the KV key-value heads.
      k: [m, KV, t, h] keys of all m blocks of the row.
      v: [m, KV, t, h] values.
      sight: of the row, without the axis S.
      window: [] int32; 0: no window.
    """
    return _attend_blocks(interpret, scale, cap, q, k, v, sight, window)[0]


def _attend_blocks(
    interpret: bool, scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, window: jax.Array
) -> tuple[jax.Array, Any]:
    n, (_, KV, t, h) = len(q), k.shape
    G = q.shape[2] // t
    block, run = _blocks(interpret, scale, cap, q, k, sight, window)
    out, log_z = run(
        _forward,
        sight.pairs,
        [q.reshape(n, KV, G, t, h), k, v],
        [block("query", G, t, h), block("key", t, h), block("key", t, h)],
        [((n, KV, G, t, h), v.dtype, block("query", G, t, h)), ((n, KV, G, t), jnp.float32, block("query", G, t))],
        [pltpu.VMEM((G, h, t), jnp.float32), pltpu.VMEM((G, 1, t), jnp.float32), pltpu.VMEM((G, 1, t), jnp.float32)],
    )
    # Blocks of padding are in no pair, so nothing was written there.
    real = sight.branch.reshape(n, 1, 1, t) >= 0
    out = jnp.where(real[..., None], out, jnp.zeros((), out.dtype)).reshape(q.shape)
    out, log_z = checkpoint_name((out, jnp.where(real, log_z, 0.0)), KEPT)
    return out, (q, k, v, sight, window, out, log_z)


def _attend_blocks_backward(interpret: bool, scale: float, cap: float | None, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, sight, window, out, log_z = saved
    n, (m, KV, t, h) = len(q), k.shape
    G = q.shape[2] // t
    along = jnp.einsum("nkqh,nkqh->nkq", dout, out, preferred_element_type=jnp.float32).reshape(log_z.shape)
    heads = lambda x: x.reshape(n, KV, G, t, h)
    block, run = _blocks(interpret, scale, cap, q, k, sight, window)
    queries, keys, numbers = block("query", G, t, h), block("key", t, h), block("query", G, t)
    read = [heads(q), k, v, heads(dout), log_z, along], [queries, keys, keys, queries, numbers, numbers]
    (dq,) = run(_backward_queries, sight.pairs, *read, [((n, KV, G, t, h), q.dtype, queries)], [pltpu.VMEM((G, t, h), jnp.float32)])
    sums = [pltpu.VMEM((t, h), jnp.float32)] * 2
    dk, dv = run(_backward_keys, sight.by_key, *read, [(k.shape, k.dtype, keys), (v.shape, v.dtype, keys)], sums)
    # A context shard's queries do not see every block of keys.
    used = jnp.arange(len(sight.pairs)) < sight.count
    seen = jnp.zeros(m, bool).at[jnp.where(used, sight.pairs[:, 1], m)].set(True, mode="drop")
    kept = lambda x, real: jnp.where(real, x, jnp.zeros((), x.dtype))
    of_key = (sight.key_branch.reshape(m, 1, t, 1) >= 0) & seen[:, None, None, None]
    return kept(dq, sight.branch.reshape(n, 1, 1, t, 1) >= 0).reshape(q.shape), kept(dk, of_key), kept(dv, of_key), None, None


attend_blocks.defvjp(_attend_blocks, _attend_blocks_backward)


def _blocks(
    interpret: bool, scale: float, cap: float | None, q: jax.Array, k: jax.Array, sight: Sight, window: jax.Array
) -> tuple[Callable[..., pl.BlockSpec], Callable[..., Any]]:
    """A function that gives the block of an array which goes with a pair, and one that runs a kernel over all pairs and KV heads."""
    _, KV, t, _ = k.shape

    def block(of: str, *shape: int) -> pl.BlockSpec:
        pair = {"query": 0, "key": 1}[of]
        return pl.BlockSpec((1, 1, *shape), lambda head, p, pairs, window: (pairs[2 * p + pair], head, *(0,) * len(shape)))

    # What a query is lies along the lanes, what a key is along the rows.
    query = jnp.stack([sight.branch, sight.root, sight.positions]).reshape(3, -1, t).swapaxes(0, 1)  # [n, 3, t]
    key = jnp.stack([sight.key_branch, sight.key_positions], axis=-1).reshape(-1, t, 2)
    of_query = pl.BlockSpec((1, 3, t), lambda head, p, pairs, window: (pairs[2 * p], 0, 0))
    of_key = pl.BlockSpec((1, t, 2), lambda head, p, pairs, window: (pairs[2 * p + 1], 0, 0))

    def run(kernel: Any, pairs: jax.Array, given: list[Any], blocks: list[Any], results: list[Any], scratch: list[Any]) -> Any:
        shapes, dtypes, places = zip(*results, strict=True)
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(KV, sight.count),
            in_specs=[of_query, of_key, *blocks],
            out_specs=list(places),
            scratch_shapes=scratch,
        )
        call = pl.pallas_call(
            functools.partial(kernel, scale, cap),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)],
            grid_spec=grid,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name=kernel.__name__.strip("_") + "_packed_attention",
        )
        return call(pairs.reshape(-1), window[None], query, key, *given)

    return block, run


def _edges(pairs: Any, side: int) -> tuple[jax.Array, jax.Array]:
    """Whether the pair of this grid step is the first, and the last, of its block of queries (side 0) or of keys (side 1)."""
    p, count = pl.program_id(1), pl.num_programs(1)
    at = lambda p: pairs[2 * p + side]
    return (p == 0) | (at(jnp.maximum(p - 1, 0)) != at(p)), (p == count - 1) | (at(jnp.minimum(p + 1, count - 1)) != at(p))


def _visible(window: Any, query: Any, key: Any) -> jax.Array:
    """Which keys [s] are seen by which queries [t] of this grid step's pair, [s, t] bool."""
    branch, root, position = (query[0, row : row + 1] for row in range(3))  # [1, t]
    seen, its = key[0, :, 0:1], key[0, :, 1:2]  # [s, 1]
    distance = position - its
    near = (distance < window[0]) | (window[0] == 0)
    return (distance >= 0) & (branch >= 0) & ((seen == branch) | (seen == root)) & near


def _scores(scale: float, cap: float | None, q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
    """The scores [s, t] float32 of keys [s, h] and queries [t, h]; `UNSEEN` where a key is not seen."""
    scores = _product(k, q, 1, 1) * scale
    return jnp.where(visible, soft_cap(scores, cap), UNSEEN)


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """The product of two matrices in float32, summed over an axis of each."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(scale: float, cap: float | None, *refs: Any) -> None:
    """A pair's part of the output, relative to the highest score so far; the output itself at the last pair of a block of queries."""
    pairs, window, query, key, q, k, v, out, log_z, sums, top, total = refs
    first, last = _edges(pairs, 0)

    @pl.when(first)
    def _() -> None:
        sums[...], top[...], total[...] = jnp.zeros_like(sums), jnp.full_like(top, LOWEST), jnp.zeros_like(total)

    visible, keys, values = _visible(window, query, key), k[0, 0], v[0, 0]

    def head(g: jax.Array, state: None) -> None:
        scores = _scores(scale, cap, q[0, 0, g], keys, visible)
        highest = jnp.maximum(top[g], scores.max(axis=0, keepdims=True))  # [1, t]
        e, lower = jnp.exp(scores - highest), jnp.exp(top[g] - highest)
        sums[g] = sums[g] * lower + _product(values, e.astype(values.dtype), 0, 0)  # [h, t]
        total[g] = total[g] * lower + e.sum(axis=0, keepdims=True)
        top[g] = highest

    jax.lax.fori_loop(0, q.shape[2], head, None)

    @pl.when(last)
    def _() -> None:
        def head(g: jax.Array, state: None) -> None:
            whole = jnp.maximum(total[g], 1e-30)
            out[0, 0, g] = (sums[g] / whole).T.astype(out.dtype)
            log_z[0, 0, pl.ds(g, 1)] = top[g] + jnp.log(whole)

        jax.lax.fori_loop(0, q.shape[2], head, None)


def _pair_gradient(
    scale: float,
    cap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    log_z: jax.Array,
    along: jax.Array,
    visible: Any,
) -> tuple[jax.Array, jax.Array]:
    """The weights of a pair of blocks, and the gradient of its scores before the scale, both [s, t] float32."""
    scores = _scores(scale, cap, q, k, visible)
    weight = jnp.exp(scores - log_z)
    ds = weight * (_product(v, dout, 1, 1) - along) * scale
    if cap is not None:
        ds = ds * (1 - jnp.square(jnp.maximum(scores / cap, -1.0)))
    return weight, ds


def _backward_queries(scale: float, cap: float | None, *refs: Any) -> None:
    """A pair's part of the gradient of its queries."""
    pairs, window, query, key, q, k, v, dout, log_z, along, dq, sums = refs
    first, last = _edges(pairs, 0)

    @pl.when(first)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    visible, keys, values = _visible(window, query, key), k[0, 0], v[0, 0]

    def head(g: jax.Array, state: None) -> None:
        row = pl.ds(g, 1)
        _, ds = _pair_gradient(scale, cap, q[0, 0, g], keys, values, dout[0, 0, g], log_z[0, 0, row], along[0, 0, row], visible)
        sums[g] += _product(ds.astype(keys.dtype), keys, 0, 0)  # [t, h]

    jax.lax.fori_loop(0, q.shape[2], head, None)

    @pl.when(last)
    def _() -> None:
        dq[0, 0] = sums[...].astype(dq.dtype)


def _backward_keys(scale: float, cap: float | None, *refs: Any) -> None:
    """A pair's part of the gradients of its keys and values, summed over the G heads that read them."""
    pairs, window, query, key, q, k, v, dout, log_z, along, dk, dv, of_keys, of_values = refs
    first, last = _edges(pairs, 1)

    @pl.when(first)
    def _() -> None:
        of_keys[...], of_values[...] = jnp.zeros_like(of_keys), jnp.zeros_like(of_values)

    visible, keys, values = _visible(window, query, key), k[0, 0], v[0, 0]

    def head(g: jax.Array, state: None) -> None:
        row, queries, cotangent = pl.ds(g, 1), q[0, 0, g], dout[0, 0, g]
        weight, ds = _pair_gradient(scale, cap, queries, keys, values, cotangent, log_z[0, 0, row], along[0, 0, row], visible)
        of_values[...] += _product(weight.astype(values.dtype), cotangent, 1, 0)  # [s, h]
        of_keys[...] += _product(ds.astype(keys.dtype), queries, 1, 0)

    jax.lax.fori_loop(0, q.shape[2], head, None)

    @pl.when(last)
    def _() -> None:
        dk[0, 0], dv[0, 0] = of_keys[...].astype(dk.dtype), of_values[...].astype(dv.dtype)
