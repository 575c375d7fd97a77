"""The mesh and the one table from logical to mesh axes.

Parameters, optimizer state, batches and activations name their axes by what they mean; `RULES` says over which mesh axes each is
laid out. Adding an axis to the mesh, or sharding something otherwise, is a line here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("member", "data", "fsdp", "tensor")
RULES: dict[str, Any] = {
    "member": "member",  # K of an ensemble, whose members send each other nothing
    "batch": ("data", "fsdp"),  # B, and R = B * N
    "layers": None,  # L: the axis of the scan
    "embed": "fsdp",  # D of a weight; D of an activation is not sharded
    "heads": "tensor",  # H * head_dim
    "mlp": "tensor",  # F
    "vocab": "tensor",  # V
    "expert": "tensor",  # E: every shard has all tokens of its batch shard, so none travels; one sum joins, as for a dense MLP
}


def make_mesh(shape: Mapping[str, int], devices: Any = None) -> Mesh:
    """A mesh of axes member, data, fsdp and tensor; one size may be -1, the rest of the devices.

    Args:
      shape: axis name -> size; axes left out have size 1.
      devices: default: all devices of all processes, in the order that suits their interconnect.

    Raises:
      ValueError: for an unknown axis, two free ones, or sizes that do not multiply to the number of devices.
    """
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axes {unknown} are unknown; use {', '.join(AXES)}")
    sizes = [int(shape.get(a, 1)) for a in AXES]
    count = len(devices) if devices is not None else jax.device_count()
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive and at most one is -1 (the free one)")
    sizes = [count // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != count:
        raise ValueError(f"mesh {dict(shape)} does not cover {count} devices; sizes must multiply to {count}, or leave one at -1")
    auto = (AxisType.Auto,) * len(AXES)  # make_mesh defaults to Explicit axes, under which plain gathers raise
    if devices is None:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=auto)
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=auto)


def words(mesh: Mesh) -> str:
    """The mesh for the console: data 2 x fsdp 4 x tensor 1; members only where there are several."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if axis != "member" or size > 1)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def sharding(mesh: Mesh, logical: tuple[str | None, ...] = (), shape: tuple[int, ...] | None = None) -> NamedSharding:
    """The sharding of an array with these logical axes.

    A dimension that its mesh axes do not divide is replicated (a vocabulary of 50,257 over 8, say): give `shape` for that.
    """
    spec = [RULES[name] if name else None for name in logical]
    if shape is not None:
        spec = [axes if axes and size % _size(mesh, axes) == 0 else None for axes, size in zip(spec, shape, strict=True)]
    return NamedSharding(mesh, P(*spec))


def _size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def constrain(x: jax.Array, mesh: Mesh | None, *logical: str | None) -> jax.Array:
    """Pins an activation's layout; without a mesh, does nothing."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, logical, x.shape))


def param_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Shardings for abstract Flax variables whose leaves are boxed with logical axes (`nn.with_logical_partitioning`)."""
    logical = nn.get_partition_spec(abstract)
    shapes = nn.unbox(abstract)
    is_spec = lambda x: isinstance(x, P)
    return jax.tree.map(lambda spec, x: sharding(mesh, tuple(spec), x.shape), logical, shapes, is_leaf=is_spec)


def optimizer_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, opt_state: Any, params: Any) -> Any:
    """Moments are laid out as the parameters that they belong to; counters and factored moments (adafactor) are replicated."""
    replicated = sharding(mesh)

    def as_parameter(x: Any, s: NamedSharding) -> NamedSharding:
        fits = all(axes is None or size % _size(mesh, axes) == 0 for size, axes in zip(x.shape, s.spec, strict=False))
        return s if fits and len(s.spec) == len(x.shape) else replicated

    return optax.tree_map_params(optimizer, as_parameter, opt_state, params, transform_non_params=lambda _: replicated)


def batch_sharding(mesh: Mesh, members: bool = False) -> NamedSharding:
    """The leading axis B over data and fsdp, with members [K, B] of an ensemble in front; everything else whole."""
    return sharding(mesh, ("member", "batch") if members else ("batch",))


def put_batch(mesh: Mesh, make: Callable[..., Mapping[str, np.ndarray]], *sizes: int) -> dict[str, jax.Array]:
    """A global batch of `sizes` [B], or [K, B], examples from a function that builds any slice of them, given a slice for each size.

    K are members; where there are none it may be anything, which every device then has the whole of.
    Each process builds the slices of its own devices, once each, and no others.
    """
    layout = batch_sharding(mesh, len(sizes) == 2)
    parts: dict[tuple[tuple[int, ...], ...], Mapping[str, np.ndarray]] = {}

    def part(index: Sequence[slice]) -> Mapping[str, np.ndarray]:
        index = (*index, *(slice(None),) * len(sizes))  # jax leaves out what is whole
        key = tuple(rows.indices(size)[:2] for rows, size in zip(index, sizes, strict=False))
        if key not in parts:
            parts[key] = make(*(slice(*ends) for ends in key))
        return parts[key]

    own = layout.addressable_devices_indices_map(sizes)
    fields = part(next(index for index in own.values() if index is not None))

    def build(name: str, shape: tuple[int, ...]) -> jax.Array:
        return jax.make_array_from_callback((*sizes, *shape), layout, lambda index: part(index or ())[name])

    return {name: build(name, x.shape[len(sizes) :]) for name, x in fields.items()}


def gathered(x: jax.Array) -> np.ndarray:
    """The whole of an array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
