"""The places of leaves in model files, counted by hand."""

import numpy as np
import pytest

from alignax.models.layout import Tensor, Weight, joined, places, tensors

NAME = "layers.{}.qkv"


def table(**options) -> dict[str, Weight]:
    return {"layers.q": Weight(NAME, **options), "layers.k": Weight(NAME, **options), "layers.v": Weight(NAME, **options)}


def shapes(*columns: int) -> dict[str, tuple[int, ...]]:
    return {f"layers.{leaf}": (2, 5, n) for leaf, n in zip("qkv", columns, strict=True)}


def test_parts_follow_each_other():
    found = places(table(), shapes(8, 4, 4), heads=4)
    assert found["layers.q"].spans(range(2, 6)) == [slice(2, 6)]
    assert found["layers.k"].spans(range(2, 4)) == [slice(10, 12)]
    assert found["layers.v"].spans(range(0, 4)) == [slice(12, 16)]
    assert found["layers.v"].indices([range(1, 3), range(0, 2)]) == [(slice(12, 14), slice(1, 3))]  # stored transposed
    assert places(table(kept=True), shapes(8, 4, 4), 4)["layers.v"].indices([range(1, 3), range(0, 2)]) == [(slice(1, 3), slice(12, 14))]


def test_parts_alternate_by_head():
    found = places(table(by_head=True), shapes(6, 6, 6), heads=3)  # heads of 2: q q k k v v | q q k k v v | q q k k v v
    assert found["layers.q"].spans(range(0, 6)) == [slice(0, 2), slice(6, 8), slice(12, 14)]
    assert found["layers.k"].spans(range(1, 4)) == [slice(3, 4), slice(8, 10)]  # from within a head
    assert found["layers.v"].spans(range(4, 5)) == [slice(16, 17)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_what_is_joined_is_where_it_is_read(kept, by_head):
    weights, sizes = table(kept=kept, by_head=by_head), shapes(6, 6, 6)
    found = places(weights, sizes, heads=3)
    parts = [np.arange(30.0).reshape(5, 6) + 100 * i for i in range(3)]
    whole = joined(parts, found["layers.q"])
    assert whole.shape == ((5, 18) if kept else (18, 5)) and whole.flags.c_contiguous
    for leaf, part in zip("qkv", parts, strict=True):
        index = found[f"layers.{leaf}"].indices([range(1, 4), range(1, 5)])
        read = np.concatenate([whole[i] for i in index], axis=1 if kept else 0)
        np.testing.assert_array_equal(read if kept else read.T, part[1:4, 1:5])


def test_tensors_come_layer_by_layer_and_those_of_no_layer_last():
    weights = {"embed": Weight("embed", kept=True), "layers.up": Weight("layers.{}.experts.{}.up")} | table()
    found = tensors(weights, {"embed": (7, 5), "layers.up": (2, 2, 5, 3)} | shapes(4, 2, 2), heads=2)
    assert found[:3] == [
        Tensor("layers.0.experts.0.up", (3, 5), (0, 0), ("layers.up",)),
        Tensor("layers.0.experts.1.up", (3, 5), (0, 1), ("layers.up",)),
        Tensor("layers.0.qkv", (8, 5), (0,), ("layers.q", "layers.k", "layers.v")),
    ]
    assert [t.name for t in found[3:]] == ["layers.1.experts.0.up", "layers.1.experts.1.up", "layers.1.qkv", "embed"]
