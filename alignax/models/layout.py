"""The layout of parameters in Hugging Face files, and how to convert between it and ours.

Our leaves stack layers and experts on leading axes, and have matrices [in, out]. The files have a tensor for each layer and expert, as a
rule store the transpose, and in some families fuse several of our leaves into one tensor.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Weight(NamedTuple):
    """The tensor that stores a leaf. Leaves with the same name are parts of one fused tensor, in the order of the family's table."""

    name: str  # with a "{}" for each stacked axis of the leaf: layer, expert
    kept: bool = False  # whether the file stores a matrix as [in, out]; otherwise transposed
    by_head: bool = False  # a fused tensor has all parts of the first head, then all parts of the second, and so on


class Place(NamedTuple):
    """The columns of a fused tensor that belong to a leaf. Leaves are fused along their last axis, whose indices are the columns."""

    weight: Weight
    stacked: int  # number of the leaf's stacked axes: layer, expert
    groups: int  # number of equal blocks that the leaf's columns are cut into: 1, or one for each head
    before: int  # columns of other leaves before a block of this one
    ours: int  # columns of a block
    stride: int  # columns from one block to the next in the file

    def spans(self, columns: range) -> list[slice]:
        """The slices of the file's columns that hold a range of the leaf's columns, in order."""
        cuts = range(columns.start // self.ours, -(-columns.stop // self.ours))
        bounds = [(i, max(columns.start, i * self.ours), min(columns.stop, (i + 1) * self.ours)) for i in cuts]
        moved = [(i * (self.stride - self.ours) + self.before, a, b) for i, a, b in bounds]
        return [slice(by + a, by + b) for by, a, b in moved]

    def indices(self, ranges: Sequence[range]) -> list[tuple[slice, ...]]:
        """The slices of the file's tensor that hold part of a leaf, to be concatenated along the tensor's output axis.

        `ranges`: the part of the leaf, a range for each axis that is not stacked.
        """
        rows = tuple(slice(r.start, r.stop) for r in ranges[:-1])
        return [(s, *rows) if self.turned(len(ranges)) else (*rows, s) for s in self.spans(ranges[-1])]

    def turned(self, ndim: int) -> bool:
        """Whether the file stores a tensor of `ndim` axes transposed."""
        return ndim == 2 and not self.weight.kept


class Tensor(NamedTuple):
    """A tensor of the files, and the leaves that it holds: one leaf, or several that are fused."""

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...]  # its indices on the leaves' stacked axes: layer, expert
    leaves: tuple[str, ...]


def leaf_name(path: Any) -> str:
    """The name of a leaf from its tree path: "layers.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaf_shapes(abstract: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a parameter tree, by the leaf's name."""
    return {leaf_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(abstract)}


def fused(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The leaves that each tensor of a family holds, by the tensor's name; only leaves in `shapes` count."""
    return {w.name: [n for n, other in weights.items() if other.name == w.name and n in shapes] for w in weights.values()}


def places(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], heads: int) -> dict[str, Place]:
    """The place of every leaf in the files, by the leaf's name.

    Args:
      weights: the family's table.
      shapes: shapes of the model's leaves.
      heads: attention heads, for tensors that are fused by head.
    """
    parts, found = fused(weights, shapes), {}
    for name in shapes:
        weight = weights[name]
        groups = heads if weight.by_head else 1
        widths = [shapes[other][-1] // groups for other in parts[weight.name]]
        i = parts[weight.name].index(name)
        found[name] = Place(weight, weight.name.count("{}"), groups, sum(widths[:i]), widths[i], sum(widths))
    return found


def tensors(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], heads: int) -> list[Tensor]:
    """All tensors of a model's files, layer by layer, those without a layer last; arguments as in `places`."""
    found, plan = places(weights, shapes, heads), []
    for leaves in filter(None, fused(weights, shapes).values()):
        place, shape = found[leaves[0]], shapes[leaves[0]]
        own = (*shape[place.stacked : -1], place.groups * place.stride)
        own = own[::-1] if place.turned(len(own)) else own
        at = itertools.product(*map(range, shape[: place.stacked]))
        plan += [Tensor(place.weight.name.format(*i), own, i, tuple(leaves)) for i in at]
    return sorted(plan, key=lambda t: (not t.at, t.at[:1]))


def joined(parts: Sequence[np.ndarray], place: Place) -> np.ndarray:
    """The file's tensor from one layer of our leaves: one leaf [.., out], or all parts of a fused tensor in order."""
    blocks = [x.reshape(*x.shape[:-1], place.groups, -1) for x in parts]
    whole = np.concatenate(blocks, axis=-1).reshape(*parts[0].shape[:-1], -1) if len(parts) > 1 else parts[0]
    return np.ascontiguousarray(whole.T if place.turned(whole.ndim) else whole)
