"""The device mesh, and the one table from logical axes to mesh axes.

Parameters, optimizer state, batches and activations name their axes by meaning: "embed", "heads", "batch". `RULES` says over which
mesh axes each logical axis is sharded. A new mesh axis, or another sharding, is a line here. `DECODING` says the same of weights that are
laid out for sampling.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignax.chips import MEMORY
from alignax.compiled import compile_anew
from alignax.moments import is_blocks
from alignax.placement import OVER_DCN, arranged, slices_of

AXES = ("member", "data", "fsdp", "context", "tensor")  # what sends most comes last
SLICES = "slices"  # of `config.mesh`: no axis, but the number of TPU slices
# Shards of `tensor` come first, so that the shards of a weight within one shard of `tensor` are the heads that it has in the cache.
WIDE = ("tensor", "fsdp")
RULES: dict[str, Any] = {
    "member": "member",  # K of an ensemble; its members exchange nothing
    "batch": ("data", "fsdp"),  # B, and R = B * N
    "lookup": "data",  # R while tokens look up their embeddings; D is sharded over fsdp there, as in the table
    "stream": ("data", "fsdp"),  # R of activations between attention and attention: of norms, products and the residual stream
    "tokens": "context",  # P of packed rows between attention and attention; only keys and values are gathered
    "scored": ("data", "fsdp", "context"),  # the scored positions of all batch shards, dealt to the devices for the head
    "layers": None,  # L, the axis of the scan over layers
    "embed": "fsdp",  # D of a weight; D of an activation is sharded only at the lookup
    "heads": "tensor",  # H * head_dim
    "mlp": "tensor",  # F
    "vocab": "tensor",  # V
    "table": WIDE,  # D of an embedding table that is no head
    "split": "tensor",  # D of embeddings on their way from such a table to their batch shards
    "expert": "tensor",  # E; a shard has all tokens of its stream shard, so no token travels and one sum joins the results
}
DECODING: dict[str, dict[str, Any]] = {
    "train": RULES,
    "replicated": RULES | {"embed": None, "table": "tensor"},
    # No weight travels: a step's activations, which are tiny, are summed over `fsdp`, and change to rows and back around attention.
    "tensor": RULES | {"embed": None, "stream": "data", "heads": WIDE, "mlp": WIDE, "vocab": WIDE, "expert": WIDE},
}


SIMULATED = "--xla_force_host_platform_device_count"
ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def order_collectives(several: bool = False) -> None:
    """Lets all CPU devices start their collectives in one order, where there are several: simulated ones, or with `several` processes.

    XLA's default schedule may start a collective that follows a loop before those of the loop's last turns. If the devices of a busy
    machine differ in that, they wait for each other for ever; seen with jax 0.10.2. The flag has no effect once a device was used.
    Programs of simulated devices are not read from a cache, see `alignax.compiled.compile_anew`.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    counts = [jax.config.values["jax_num_cpu_devices"], *map(int, re.findall(rf"{SIMULATED}=(\d+)", flags))]
    simulated = max(counts) > 1
    if (several or simulated) and ORDERED.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ORDERED}".strip()
    if simulated:
        compile_anew()


def make_mesh(shape: Mapping[str, int], devices: Any = None) -> Mesh:
    """Makes a mesh with the axes member, data, fsdp, context and tensor.

        make_mesh({"data": 2, "fsdp": -1})  # on 8 devices: data 2 x fsdp 4 x tensor 1

    TPU chips of one `tensor` shard, then those of one `fsdp` shard, are neighbours, see `alignax.placement`. TPU slices are apart along the
    data axis, since the network between them is slow: its size is a multiple of their number.

    Args:
      shape: axis name -> size. One size may be -1: that axis takes the remaining devices. An axis left out has size 1. "slices" is no
        axis but the number of slices; 0 or left out: as many as the TPUs report, and else one.
      devices: default: all devices of all processes.

    Raises:
      ValueError: for an unknown axis, for two sizes of -1, for sizes that do not multiply to the number of devices, for a data axis that
        the slices do not divide, and for a number of slices that the TPUs do not report.
    """
    unknown = sorted(set(shape) - {*AXES, SLICES})
    if unknown:
        raise ValueError(f"mesh axes {unknown} are unknown; use {', '.join(AXES)}")
    order_collectives()
    asked = {a: int(shape.get(a, 1)) for a in AXES}
    free = [a for a, size in asked.items() if size == -1]
    if len(free) > 1 or any(s == 0 or s < -1 for s in asked.values()):
        raise ValueError(f"mesh {asked}: sizes must be positive, and at most one may be -1 (the size that alignax chooses)")
    if devices is None:
        devices = sorted(jax.devices(), key=lambda d: d.id)
    slices = _slices(int(shape.get(SLICES, 0)), devices)
    count = len(devices)
    sizes = asked | {a: count // math.prod(s for s in asked.values() if s != -1) for a in free}
    nearest = lambda: f"the nearest possible mesh is {_words(_nearest(asked, count, slices))}"
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"mesh {dict(shape)} does not cover {count} devices; sizes must multiply to {count}, or set one to -1; {nearest()}"
        )
    if sizes[OVER_DCN] % slices:
        raise ValueError(
            f"mesh {_words(sizes)} of {slices} slices: the slices follow one another along {OVER_DCN}, so mesh.{OVER_DCN} must be a "
            f"multiple of {slices}; {nearest()}"
        )
    auto = (AxisType.Auto,) * len(AXES)  # jax's default are Explicit axes, under which plain gathers raise
    return Mesh(arranged(sizes, devices), AXES, axis_types=auto)


def _slices(asked: int, devices: Sequence[Any]) -> int:
    """The number of slices; `asked` 0: as many as the devices report."""
    found = len(slices_of(devices))
    if asked < 0:
        raise ValueError(f"mesh.{SLICES} is {asked}; give the number of slices, or 0 for as many as the devices report")
    if asked and asked != found and devices[0].platform == "tpu":
        raise ValueError(f"mesh.{SLICES} is {asked}, but the TPUs are of {found}; leave mesh.{SLICES} out")
    if asked and len(devices) % asked:
        raise ValueError(f"mesh.{SLICES} is {asked}, which does not divide {len(devices)} devices; leave mesh.{SLICES} out")
    return asked or found


def _nearest(asked: Mapping[str, int], count: int, slices: int) -> dict[str, int]:
    """The sizes of a possible mesh that differ least from those asked for; the axis of -1 may have any size, and fsdp takes the rest."""

    def products(left: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
        if not axes:
            yield from ({},) if left == 1 else ()
            return
        for size in (size for size in range(1, left + 1) if left % size == 0):
            if axes[0] != OVER_DCN or size % slices == 0:
                yield from ({axes[0]: size} | others for others in products(left // size, axes[1:]))

    def far(sizes: dict[str, int]) -> tuple[float, int, list[int]]:
        moved = [abs(math.log2(size / asked[axis])) for axis, size in sizes.items() if asked[axis] != -1]
        return round(sum(moved), 6), sum(step > 0 for step in moved), [sizes[axis] for axis in reversed(AXES) if axis != "fsdp"]

    return min(products(count, AXES), key=far)


def words(mesh: Mesh) -> str:
    """A mesh as text for the console: "data 2 x fsdp 4 x tensor 1". The axes member and context are shown only if they are used."""
    return _words(mesh.shape)


def _words(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis not in ("member", "context") or size > 1)


def batch_shards(mesh: Mesh) -> int:
    """The number of shards that the batch axis is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def device_memory(mesh: Mesh) -> int:
    """The bytes of memory of one of a mesh's devices, in whole GiB; 0 if it is not known. CPU devices share the memory of their host.

    A table has it by the kind of device, also for devices that are not at hand; other devices tell it. So all processes find the same.
    """
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    device = (own or list(mesh.devices.flat))[0]
    if device.device_kind in MEMORY:
        return MEMORY[device.device_kind]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(own) >> 30 << 30
    return (device.memory_stats() or {}).get("bytes_limit", 0) >> 30 << 30


def device_bytes(abstract: Any) -> int:
    """The bytes that a tree of arrays or of their shapes takes on one device."""
    shape = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def sharding(
    mesh: Mesh, logical: tuple[str | None, ...] = (), shape: tuple[int, ...] | None = None, rules: Mapping[str, Any] = RULES
) -> NamedSharding:
    """The sharding of an array, by the names of its logical axes.

    With `shape`, a dimension that its mesh axes do not divide is replicated (a vocabulary of 50,257 over 8 devices, say). One of a weight
    over both `WIDE` axes is split over the larger of the two that divides it: no weight of a large model is then whole on every device.
    """
    spec = [rules[name] if name else None for name in logical]
    if shape is not None:
        spec = [_dividing(mesh, axes, size) for axes, size in zip(spec, shape, strict=True)]
    return NamedSharding(mesh, P(*spec))


def _dividing(mesh: Mesh, axes: Any, size: int) -> Any:
    """The mesh axes that a dimension of this size is split over, of those that it asks for; None: it is replicated."""
    fewer = sorted(WIDE, key=lambda axis: mesh.shape[axis], reverse=True) if axes == WIDE else ()
    return next((some for some in (axes, *fewer) if some and size % _size(mesh, some) == 0), None)


def _size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def constrain(x: jax.Array, mesh: Mesh | None, *logical: str | None, rules: Mapping[str, Any] = RULES) -> jax.Array:
    """Pins the sharding of an activation, by its logical axes; without a mesh, returns the activation unchanged."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, logical, x.shape, rules))


def param_shardings(mesh: Mesh, abstract: Any, rules: Mapping[str, Any] = RULES) -> Any:
    """The shardings of abstract Flax variables whose leaves are boxed with logical axes (`nn.with_logical_partitioning`)."""
    logical = nn.get_partition_spec(abstract)
    shapes = nn.unbox(abstract)
    is_spec = lambda x: isinstance(x, P)
    return jax.tree.map(lambda spec, x: sharding(mesh, tuple(spec), x.shape, rules), logical, shapes, is_leaf=is_spec)


def optimizer_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, opt_state: Any, params: Any) -> Any:
    """The shardings of an optimizer state: moments, and the scales of their blocks, as their parameters; all else is replicated.

    All else are counters and factored moments (adafactor), and axes that their mesh axes do not divide.
    """
    divides = lambda size, axes: axes is not None and size % _size(mesh, axes) == 0

    def as_parameter(x: Any, s: NamedSharding) -> NamedSharding:
        if len(s.spec) != len(x.shape):
            return sharding(mesh)
        return NamedSharding(mesh, P(*(axes if divides(size, axes) else None for size, axes in zip(x.shape, s.spec, strict=True))))

    moment = lambda x, s: jax.tree.map(lambda part: as_parameter(part, s), x)  # one array, or codes and scales
    other = lambda _: sharding(mesh)
    return optax.tree_map_params(optimizer, moment, opt_state, params, transform_non_params=other, is_leaf=is_blocks)


def batch_sharding(mesh: Mesh, members: bool = False) -> NamedSharding:
    """The sharding of a batch: its leading axis B over data and fsdp, the other axes replicated.

    With `members`, the leading axes are [K, B] of an ensemble, and K is sharded over the member axis.
    """
    return sharding(mesh, ("member", "batch") if members else ("batch",))


def put_batch(mesh: Mesh, make: Callable[..., Mapping[str, np.ndarray]], *sizes: int) -> dict[str, jax.Array]:
    """Builds a global batch of sharded arrays [B, ...], or [K, B, ...] of an ensemble.

    Each process builds only the slices of its own devices, and each slice once.

    Args:
      mesh: the mesh that the batch is sharded over.
      make: builds the fields of any part of the batch, given one slice for each of `sizes`.
      sizes: B, or K and B. On a mesh with one member K may be any number, and every device holds all of K.
    """
    layout = batch_sharding(mesh, len(sizes) == 2)
    parts: dict[tuple[tuple[int, ...], ...], Mapping[str, np.ndarray]] = {}

    def part(index: Sequence[slice]) -> Mapping[str, np.ndarray]:
        index = (*index, *(slice(None),) * len(sizes))  # jax leaves out the slices of whole axes
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
    """A sharded array of any shape as one whole host array, on every process; all processes must call this."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
