"""Every mesh of every TPU slice, described by the TPU's compiler; none of them is at hand."""

import itertools
import math

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from alignax import placement
from alignax.mesh import AXES, batch_sharding, make_mesh, words

SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


def chips(name: str) -> int:
    return math.prod(map(int, name.partition(":")[2].split("x")))


NAMES = [f"{kind}:{sides}" for kind, sides in SLICES.items() for sides in sides]
CASES = [pytest.param(name, marks=pytest.mark.slow if chips(name) > 64 else ()) for name in NAMES]


def splits(count: int, *contexts: int) -> list[dict[str, int]]:
    """Every split of so many chips, a power of 2, over data, fsdp and tensor, with the given sizes of context or without."""
    own = [2**i for i in range(count.bit_length())]
    return [
        {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
        for data, fsdp, context, tensor in itertools.product(own, own, contexts or (1,), own)
        if data * fsdp * context * tensor == count
    ]


def fills_a_box(devices: np.ndarray) -> bool:
    places = np.array([d.coords for d in devices])
    return bool(np.prod(np.ptp(places, axis=0) + 1) == len(devices))


def groups(devices: np.ndarray, *axes: str) -> np.ndarray:
    """The devices of each group that the axes join, [groups, devices]."""
    taken = [AXES.index(axis) for axis in axes]
    return np.moveaxis(devices, taken, range(-len(taken), 0)).reshape(-1, math.prod(devices.shape[i] for i in taken))


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_split_of_every_slice_is_a_mesh_whose_closest_chips_are_neighbours(name, slices, tpu_slice):
    """The shards of `tensor`, with `context`, and with `fsdp` too, fill a box; slices meet along `data` alone."""
    every, refused = splits(chips(name) * slices, 1, 2, 4, 8), 0
    assert len(every) >= 6
    for shape in every:
        if shape["data"] % slices:
            refused += 1
            nearest = r"must be a multiple of 2; the nearest possible mesh is data 2 x fsdp \d+ x (context \d x )?tensor \d+$"
            with pytest.raises(ValueError, match=nearest):
                tpu_slice(name, shape | {"slices": slices})
            continue
        devices = tpu_slice(name, shape | {"slices": slices}).devices
        assert devices.shape == (1, *shape.values()) and len({d.id for d in devices.flat}) == devices.size
        for axes in (("tensor",), ("context", "tensor"), ("fsdp", "context", "tensor")):
            for group in groups(devices, *axes):
                assert len({getattr(d, "slice_index", 0) for d in group}) == 1
                assert fills_a_box(group), (name, shape, axes)
        if slices > 1:
            halves = np.split(devices, slices, axis=AXES.index("data"))
            assert [{d.slice_index for d in half.flat} for half in halves] == [{i} for i in range(slices)]
    assert refused == (sum(shape["data"] == 1 for shape in every) if slices > 1 else 0)


@pytest.mark.parametrize(("name", "refused"), [("v5p:4x4x4", 18), ("v5p:4x4x8", 18)])
def test_meshes_that_jax_does_not_make(name, refused, tpu_slice):
    found = 0
    for shape in splits(chips(name)):
        devices = list(tpu_slice(name, shape).devices.flat)
        try:
            mesh_utils.create_device_mesh((1, *shape.values()), devices)
        except NotImplementedError:
            found += 1
    assert found == refused


@pytest.mark.parametrize("name", ["v5e:4x8", "v5e:8x8", "v5e:16x16", "v5p:4x4x4", "v5p:4x8x8", "v4:4x4x8"])
def test_no_split_side_is_slower_than_as_jax_splits_it(name, tpu_slice):
    """First the rate of `tensor`, then that of `fsdp`, then hops; for many splits jax lays `fsdp` between the shards of `tensor`."""
    better = 0
    for shape in splits(chips(name)):
        ours = tpu_slice(name, shape).devices
        devices = sorted(ours.flat, key=lambda d: d.id)
        theirs = mesh_utils.create_device_mesh(ours.shape, devices, allow_split_physical_axes=True)
        box, number = placement.box_of(devices), {d.id: i for i, d in enumerate(devices)}
        each = [placement.rates(box, np.array([number[d.id] for d in mesh.flat]).reshape(mesh.shape))[::-1] for mesh in (ours, theirs)]
        found = [[(links, -hops) for links, hops in mesh] for mesh in each]
        assert found[0] >= found[1], (shape, found)
        better += found[0] > found[1]
    assert better >= 3


def test_rates_of_lines_rings_planes_and_groups_between_one_another(tpu_slice):
    """Counted by hand: a line of chips has one link, a ring two, and k groups on one line a k-th each."""

    def rates(name, **shape):
        devices = list(tpu_slice(name, {"fsdp": -1}).devices.flat)
        box = placement.box_of(devices)
        order = np.lexsort(box.places.T[::-1])
        return placement.rates(box, order.reshape(list(shape.values())))

    assert rates("v5e:4x4", a=4, b=4) == [(1, 1), (1, 1)]  # no ring on a side of 4
    assert rates("v5e:16x16", a=16, b=16) == [(2, 1), (2, 1)]
    assert rates("v5e:16x16", a=16, b=2, c=8) == [(2, 1), (1 / 4, 8), (1, 1)]
    assert rates("v5p:4x4x4", a=1, b=4, c=16) == [(float("inf"), 0), (2, 1), (4, 1)]
    assert rates("v5p:2x2x4", a=2, b=8) == [(1, 1), (2, 1)]


def test_devices_that_fill_no_box_keep_their_order(tpu_slice):
    devices = list(tpu_slice("v5e:4x4", {"fsdp": -1}).devices.flat)
    three = [next(d for d in devices if tuple(d.coords[:2]) == place) for place in ((0, 0), (3, 3), (1, 0))]
    assert list(make_mesh({"fsdp": 3}, three).devices.flat) == three
    assert list(make_mesh({}, devices[5:6]).devices.flat) == devices[5:6]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("v5e:4x4", {"fsdp": 8}, r"does not cover 16 devices; .*; the nearest possible mesh is data 1 x fsdp 16 x tensor 1$"),
        ("v5e:4x4", {"data": 3, "fsdp": -1}, r"the nearest possible mesh is data 4 x fsdp 4 x tensor 1$"),
        ("v5p:4x4x4", {"data": 1, "fsdp": -1, "slices": 2}, r"data 1 x fsdp 128 x tensor 1 of 2 slices: .* data 2 x fsdp 64 x tensor 1$"),
        ("v5e:4x4", {"data": 2, "fsdp": 4, "tensor": 8, "slices": 4}, r"nearest possible mesh is data 4 x fsdp 4 x tensor 4$"),
        ("v5e:4x4", {"fsdp": -1, "slices": -1}, r"^mesh.slices is -1; give the number of slices"),
        ("v5e:3x3", {"fsdp": -1}, r"^TPU slice 'v5e:3x3' is unknown to libtpu .*such as v5e:4x4"),
        ("v5litepod-16", {"fsdp": -1}, r"^TPU slice 'v5litepod-16' is unknown to libtpu"),
    ],
)  # fmt: skip
def test_an_impossible_mesh_is_one_line_that_names_the_nearest(name, shape, message, tpu_slice):
    with pytest.raises(ValueError, match=message) as found:
        tpu_slice(name, shape)
    assert "\n" not in str(found.value)


def test_slices_that_the_devices_do_not_report(tpu_slice):
    devices = list(tpu_slice("v5e:4x4", {"data": 2, "fsdp": -1, "slices": 2}).devices.flat)
    with pytest.raises(ValueError, match="mesh.slices is 4, but the TPUs are of 2; leave mesh.slices out"):
        make_mesh({"data": 4, "fsdp": -1, "slices": 4}, devices)
    assert words(make_mesh({"data": 2, "fsdp": -1}, devices)) == "data 2 x fsdp 16 x tensor 1"
    mesh = make_mesh({"data": 4, "fsdp": -1, "slices": 2})
    assert list(mesh.devices.flat) == jax.devices(), "elsewhere devices keep their order"
    with pytest.raises(ValueError, match="mesh.slices is 3, which does not divide 8 devices"):
        make_mesh({"data": -1, "slices": 3})


def test_a_host_has_whole_rows_of_a_batch_on_two_slices(tpu_slice):
    """Each slice has a half of the rows, in the order of slices, so no row crosses the network between them."""
    mesh = tpu_slice("v5e:4x4", {"data": 4, "fsdp": 4, "tensor": 2, "slices": 2})
    rows = batch_sharding(mesh).devices_indices_map((32, 8))
    of = {index: {row for d, (own, _) in rows.items() if d.slice_index == index for row in range(*own.indices(32))} for index in (0, 1)}
    assert of == {0: set(range(16)), 1: set(range(16, 32))}
