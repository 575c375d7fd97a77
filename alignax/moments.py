"""Optimizer moments in fewer bits: any optax optimizer, with its moments held in bfloat16 or in 8-bit blocks between steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MOMENTS = ("float32", "bfloat16", "int8")
BLOCK = 256  # values along the last axis that share a scale
# Levels and power of the code: level k of a block with the scale s is s (k / levels)^power.
SIGNED, SQUARED = (127, 3), (255, 4)


class Blocks(NamedTuple):
    """A moment in 8 bits."""

    codes: jax.Array  # [.., n] int8, or uint8 where no value is below 0: the shape of the parameter
    scales: jax.Array  # [.., n / BLOCK, rounded up] float32: the largest magnitude of each block


class Compact(NamedTuple):
    """The state of `compact`."""

    count: jax.Array  # [] int32 steps, the seed of the rounding
    state: Any  # the inner optimizer's, with its moments in fewer bits


def compact(optimizer: optax.GradientTransformation, moments: str) -> optax.GradientTransformation:
    """An optimizer that holds its moments in fewer bits, and computes in float32.

    "bfloat16" takes 2 bytes a value. "int8" takes 1.016: each block of 256 values along the last axis has a scale s, its largest magnitude,
    and a value is one of the levels s (k / 127)^3 and their negatives, or, of second moments (optax calls them `nu`), s (k / 255)^4.
    Block-wise codes with levels that lie denser near 0 are of Dettmers et al. 2022, arXiv:2110.02861; theirs are in a table. Levels at
    equal distances would make small second moments 0, by which an update divides: here only 0 becomes 0.

    Rounding is stochastic, and right on average. To the nearest value, a second moment would never fall: b2 = 0.999 changes it by a
    thousandth a step, which is less than half the distance to the next value.

    Args:
      optimizer: an optimizer whose state holds moments as arrays of the parameters' shapes, and second moments as fields `nu`.
      moments: one of `MOMENTS`.

    Raises:
      ValueError: for another name.
    """
    if moments not in MOMENTS:
        raise ValueError(f"optimizer.moments {moments!r} is unknown; use {', '.join(MOMENTS)}")
    if moments == "float32":
        return optimizer

    def packed(state: Any, count: jax.Array) -> Compact:
        key, places = jax.random.fold_in(jax.random.key(0), count), iter(range(len(jax.tree.leaves(state))))

        def pack(path: Any, x: Any) -> Any:
            own = jax.random.fold_in(key, next(places))
            if not (jnp.ndim(x) and x.dtype == jnp.float32):
                return x
            return to_bfloat16(x, own) if moments == "bfloat16" else to_blocks(x, own, jax.tree_util.GetAttrKey("nu") in path)

        return Compact(count, jax.tree_util.tree_map_with_path(pack, state))

    def init(params: Any) -> Compact:
        return packed(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Compact]:
        updates, new = optimizer.update(updates, unpacked(state.state), params)
        return updates, packed(new, state.count + 1)

    return optax.GradientTransformation(init, update)


def unpacked(state: Any) -> Any:
    """A state with its moments in float32."""

    def unpack(x: Any) -> Any:
        if isinstance(x, Blocks):
            return from_blocks(x)
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(unpack, state, is_leaf=is_blocks)


def is_blocks(x: Any) -> bool:
    """Whether x is a moment in 8 bits."""
    return isinstance(x, Blocks)


def to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """x, float32, rounded to one of the two nearest bfloat16 numbers at random, right on average."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def to_blocks(x: jax.Array, key: jax.Array, squared: bool = False) -> Blocks:
    """x [.., n] in 8 bits, see `compact`; `squared`: no value is below 0, and only 0 becomes 0."""
    levels, power = SQUARED if squared else SIGNED
    x, n = _split(x), x.shape[-1]
    scales = jnp.abs(x).max(axis=-1)
    r = jnp.abs(x) / jnp.where(scales > 0, scales, 1.0)[..., None]
    root = jnp.sqrt(jnp.sqrt(r)) if squared else jnp.cbrt(r)
    low = jnp.clip(jnp.floor(levels * root), 0, levels - 1)
    below, above = (low / levels) ** power, ((low + 1) / levels) ** power
    k = low + (jax.random.uniform(key, x.shape) * (above - below) < r - below)
    if squared:
        return Blocks(_joined(jnp.where(r > 0, jnp.maximum(k, 1), 0), n).astype(jnp.uint8), scales)
    return Blocks(_joined(jnp.sign(x) * k, n).astype(jnp.int8), scales)


def from_blocks(blocks: Blocks) -> jax.Array:
    """The values [.., n] float32 of a moment in 8 bits."""
    levels, power = SQUARED if blocks.codes.dtype == jnp.uint8 else SIGNED
    k = _split(blocks.codes.astype(jnp.float32))
    return _joined(jnp.sign(k) * (jnp.abs(k) / levels) ** power * blocks.scales[..., None], blocks.codes.shape[-1])


def _split(x: jax.Array) -> jax.Array:
    """x [.., n] in blocks, [.., blocks, BLOCK], the last one filled with 0; a single block is as long as x."""
    n = x.shape[-1]
    block = min(BLOCK, n)
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -n % block),)).reshape(*x.shape[:-1], -1, block)


def _joined(x: jax.Array, n: int) -> jax.Array:
    """Blocks as one axis of n values again."""
    return x.reshape(*x.shape[:-2], -1)[..., :n]
