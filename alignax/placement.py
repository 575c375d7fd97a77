"""Where the devices of a mesh lie: TPU chips that send each other most are neighbours, and slices are apart along the data axis alone.

The chips of a slice are a box in a torus. A mesh axis has whole sides of that box where its size allows, as `jax.make_mesh` places it.
Else sides are split: an axis then has a part of a side, and the axis named last, which sends most, has the inner part.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils

OVER_DCN = "data"  # the axis along which slices follow one another: its devices exchange gradients alone


class Box(NamedTuple):
    """The chips of a slice: every chip of a box in its torus."""

    places: np.ndarray  # [devices, sides] where each device lies: x, y, z, and core of its chip
    sides: tuple[int, ...]
    rings: tuple[bool, ...]  # whether the two ends of a side are linked


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each TPU slice, in the order of slices; of devices that are no TPUs all at once."""
    found: dict[int, list[Any]] = defaultdict(list)
    for device in devices:  # one slice that is described ahead of time has no index
        found[(getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0].append(device)
    return [found[index] for index in sorted(found)]


def arranged(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """An array of devices with one dimension for each axis of a mesh.

    Args:
      sizes: axis name -> size, the axis that sends most last. The sizes multiply to the number of devices, and the number of slices
        divides the size of `data`.
      devices: of TPUs in any order, others in the order that they keep. TPUs that are no whole boxes keep their order, too.
    """
    slices = slices_of(devices)
    own = dict(sizes) | {OVER_DCN: sizes[OVER_DCN] // len(slices)}
    parts = [_within_slice(list(own.values()), part) for part in slices]
    return np.concatenate(parts, axis=list(sizes).index(OVER_DCN))


def _within_slice(sizes: list[int], devices: list[Any]) -> np.ndarray:
    box = box_of(devices)
    if box is None:
        return np.array(devices).reshape(sizes)
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # a side must be split
        order = np.lexsort(box.places.T[::-1])  # by x, then y, z and core
        best = max(_splits(sizes, box.sides), key=lambda numbers: [(links, -hops) for links, hops in rates(box, order[numbers])[::-1]])
        return np.array(devices)[order[best]]


def box_of(devices: Sequence[Any]) -> Box | None:
    """The box that TPU devices of one slice fill; None if they leave a part of it out, and for devices that are no TPUs.

    Which sides are rings: of v5e and v6e those of 16, of v4, v5p and TPU7x all sides of slices that are made of cubes of 4 x 4 x 4. Austin
    et al. 2025, How to scale your model, chapter 2 (jax-ml.github.io/scaling-book/tpus).
    """
    if devices[0].platform != "tpu":
        return None
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    places -= places.min(0)
    sides = tuple(int(side) for side in places.max(0) + 1)
    if np.prod(sides) != len(devices):
        return None
    flat = "lite" in devices[0].device_kind
    cubes = all(side % 4 == 0 for side in sides[:3])
    return Box(places, sides, (*(side == 16 if flat else cubes for side in sides[:3]), False))


def rates(box: Box, numbers: np.ndarray) -> list[tuple[float, int]]:
    """The `rate` along each axis of an array of the devices' numbers in `box.places`."""
    return [rate(box, np.moveaxis(numbers, axis, -1).reshape(-1, size)[0]) for axis, size in enumerate(numbers.shape)]


def rate(box: Box, group: Sequence[int] | np.ndarray) -> tuple[float, int]:
    """The rate of an all-gather in a group of devices in links of a chip, infinite for one device, and hops to the next device.

    A chip at the end of a line receives all by one link, and a chip of a ring by two; along several sides, links add up. Groups that lie
    between one another along a side share its links.
    """
    links, hops = 0.0, 0
    for side, (size, ring) in enumerate(zip(box.sides, box.rings, strict=True)):
        taken = np.unique(box.places[np.asarray(group), side])
        if len(taken) > 1:
            stride = int(np.diff(taken).min())
            links, hops = links + (2 if ring and len(taken) * stride == size else 1) / stride, max(hops, stride)
    return links or float("inf"), hops


def _splits(sizes: Sequence[int], sides: Sequence[int]) -> Iterator[np.ndarray]:
    """All ways to give every axis a part of every side, as arrays of the numbers of a box's devices."""
    box = np.arange(np.prod(sides))
    for parts in _assignments(sizes, sides):  # [axes][sides]
        split = box.reshape([part for side in zip(*parts, strict=True) for part in side])
        grouped = [side * len(sizes) + axis for axis in range(len(sizes)) for side in range(len(sides))]
        yield split.transpose(grouped).reshape(sizes)


def _assignments(sizes: Sequence[int], room: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All parts [axes][sides] whose products are the sizes of axes and of sides. There is always one: the prime factors agree."""
    if not sizes:
        yield ()
        return
    for parts in _factored(sizes[-1], room):
        left = [side // part for side, part in zip(room, parts, strict=True)]
        yield from ((*others, parts) for others in _assignments(sizes[:-1], left))


def _factored(size: int, room: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All factors of a size, one for each side, that divide what is left of the sides."""
    if not room:
        if size == 1:
            yield ()
        return
    for part in (part for part in range(1, size + 1) if size % part == 0 and room[0] % part == 0):
        yield from ((part, *others) for others in _factored(size // part, room[1:]))
