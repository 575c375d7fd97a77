"""A mixture of experts: every token goes through the MLPs of its k experts; no token is dropped.

Assignments (token, expert) are sorted by expert and cut into blocks, each of one expert. A loop over the blocks gathers the block's rows,
applies the expert and adds the results to the output. So the work is that of k experts per token, and the memory that of one block. The
gradient is a second loop of this kind, over the vector-Jacobian products of the blocks.

Measured on 2 CPU cores in float32, for 4,096 tokens of D = 256, experts of F = 256 and k = 2. Times are without and with the gradient:

    one MLP over the 8,192 rows: 34 and 166 ms
    this module: 24 and 96 ms with 8 experts (smaller blocks stay in the cache), 36 and 135 ms with 32, 45 and 245 ms with 128

`jax.lax.ragged_dot` is a grouped product on TPUs; elsewhere it multiplies every row by every expert. On the CPU one product of 1,024
rows, 1 ms of work, took 10, 16 and 93 ms over 4, 16 and 64 experts, and 17, 80 and 532 ms with its gradient. No accelerator has been
measured yet.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from alignax import mesh as meshes

BLOCKS = "experts"  # the scope of the loops over blocks, in profiles and plans
Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]


def experts(
    x: jax.Array,
    router: jax.Array,
    weights: Weights,
    *,
    k: int,
    normalise: bool,
    activation: Callable[[jax.Array], jax.Array],
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] = meshes.RULES,
) -> jax.Array:
    """The output of a mixture of experts: the sum of probability * down(activation(gate(x)) * up(x)) over each token's top k experts.

    Shazeer et al. 2017, arXiv:1701.06538, with the softmax before the choice (Jiang et al. 2024, arXiv:2401.04088, and Qwen3). On a mesh
    each shard of the "expert" axis holds some experts whole. It applies them to the tokens of its stream shard, which it has already. A
    sum over that axis joins the results, as for a dense MLP. No token moves between devices.

    Args:
      x: [R, T, D] in the compute dtype.
      router: [D, E] in the compute dtype.
      weights: gate [E, D, F], up [E, D, F] and down [E, F, D] in the compute dtype.
      k: experts per token.
      normalise: whether to divide the k probabilities by their sum.
      activation: the function after the gate.
      mesh: the mesh that the arrays are sharded over; None for one device.
      rules: the table from logical axes to mesh axes, see `alignax.mesh`.

    Returns:
      [R, T, D] in the dtype of x.
    """
    run = functools.partial(_local, k, normalise, activation)
    if mesh is None:
        return run(None, 1, x, router, *weights)
    rows = meshes.sharding(mesh, ("stream", "tokens", None), x.shape, rules).spec
    split = meshes.sharding(mesh, ("expert", None, None), weights[0].shape, rules).spec
    axis: Any = split[0]  # None if the shards do not divide the experts; then each shard has all of them
    shards = math.prod(mesh.shape[a] for a in jax.tree.leaves(axis))
    specs = (rows, PartitionSpec(), split, split, split)
    return jax.shard_map(functools.partial(run, axis, shards), mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(
        x, router, *weights
    )


def _local(k: int, normalise: bool, activation: Callable, axis: Any, shards: int, x: jax.Array, router: jax.Array, *weights: Any) -> Any:
    """The output [R, T, D] for the tokens of a stream shard: computed from this shard's experts, then summed over all shards."""
    flat = x.reshape(-1, x.shape[-1])  # [P, D]
    probs = jax.nn.softmax((flat @ router).astype(jnp.float32), axis=-1)
    share, chosen = jax.lax.top_k(probs, k)  # [P, k]
    if normalise:
        share = share / share.sum(axis=-1, keepdims=True)
    first = jax.lax.axis_index(axis) * weights[0].shape[0] if axis else 0
    y: Any = apply_experts(activation, flat, share, weights, chosen - first)
    return (jax.lax.psum(y, axis) if shards > 1 else y).reshape(x.shape).astype(x.dtype)


def block_rows(assignments: int, experts: int) -> int:
    """The rows of a block: the number of assignments per expert under equal load, within 16 to 512.

    Larger blocks would waste work, because the last block of each expert is half empty on average.
    """
    return min(max(assignments // experts, 16), 512)


def _blocks(chosen: jax.Array, experts: int) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    """The number of blocks, and a function from a block's index to (its expert, [b] its assignments, [b] bool: which rows are used)."""
    expert = chosen.reshape(-1)  # [A]
    inside = (expert >= 0) & (expert < experts)
    order = jnp.argsort(jnp.where(inside, expert, experts), stable=True)  # [A] assignments by expert; those of other shards come last
    sizes = jnp.zeros(experts, jnp.int32).at[jnp.where(inside, expert, experts)].add(1, mode="drop")
    b = block_rows(expert.size, experts)
    ends = jnp.cumsum(-(-sizes // b))  # [E] blocks of the experts up to and including each
    starts = jnp.cumsum(sizes) - sizes  # [E] rows before each expert

    def block(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        e = jnp.searchsorted(ends, i, side="right")
        row = (i - ends[e] + -(-sizes[e] // b)) * b + jnp.arange(b)
        real = row < sizes[e]
        return e, order[jnp.where(real, starts[e] + row, 0)], real

    return ends[-1], block


def _expert(activation: Callable, x: jax.Array, share: jax.Array, weights: Weights) -> jax.Array:
    """The weighted output of one expert: share [b] * MLP(x [b, D]), [b, D] float32."""
    gate, up, down = weights
    y = (activation(x @ gate) * (x @ up)) @ down
    return share[:, None] * y.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_experts(activation: Callable, x: jax.Array, share: jax.Array, weights: Weights, chosen: jax.Array) -> jax.Array:
    """The weighted sum of a shard's experts for each token: sum_j share[p, j] * MLP_chosen[p, j](x[p]), [P, D] float32.

    Args:
      activation: the function after the gate.
      x: [P, D] tokens.
      share: [P, k] float32 weights of the token's experts.
      weights: gate [E, D, F], up [E, D, F] and down [E, F, D] of the shard's E experts.
      chosen: [P, k] int indices of the token's experts; an index outside 0 .. E - 1 is another shard's and adds nothing.
    """
    return _forward(activation, x, share, weights, chosen)[0]


def _forward(activation: Callable, x: jax.Array, share: jax.Array, weights: Weights, chosen: jax.Array) -> Any:
    count, block = _blocks(chosen, weights[0].shape[0])
    k = chosen.shape[1]

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        e, at, real = block(i)
        y = _expert(activation, x[at // k], share.reshape(-1)[at], jax.tree.map(lambda w: w[e], weights))
        return out.at[jnp.where(real, at // k, x.shape[0])].add(y, mode="drop")

    with jax.named_scope(BLOCKS):
        return jax.lax.fori_loop(0, count, body, jnp.zeros(x.shape, jnp.float32)), (x, share, weights, chosen)


def _backward(activation: Callable, saved: Any, dy: jax.Array) -> Any:
    x, share, weights, chosen = saved
    count, block = _blocks(chosen, weights[0].shape[0])
    k = chosen.shape[1]

    def body(i: jax.Array, sums: Any) -> Any:
        dx, dshare, dweights = sums
        e, at, real = block(i)
        inputs = (x[at // k], share.reshape(-1)[at], jax.tree.map(lambda w: w[e], weights))
        part = jnp.where(real[:, None], dy[at // k], 0.0)
        px, pshare, pweights = jax.vjp(functools.partial(_expert, activation), *inputs)[1](part)
        dx = dx.at[jnp.where(real, at // k, x.shape[0])].add(px.astype(jnp.float32), mode="drop")
        dshare = dshare.at[jnp.where(real, at, share.size)].add(pshare, mode="drop")
        return dx, dshare, jax.tree.map(lambda a, b: a.at[e].add(b.astype(jnp.float32)), dweights, pweights)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (x, share.reshape(-1), weights))
    with jax.named_scope(BLOCKS):
        dx, dshare, dweights = jax.lax.fori_loop(0, count, body, zeros)
    return dx.astype(x.dtype), dshare.reshape(share.shape), jax.tree.map(lambda a, w: a.astype(w.dtype), dweights, weights), None


apply_experts.defvjp(_forward, _backward)
