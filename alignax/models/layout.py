"""How the leaves of our parameters lie in the tensors of the files: layers and experts apart, matrices turned, some side by side."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Weight(NamedTuple):
    """Where the files hold a leaf. Leaves of one name are the parts of one fused tensor, in the order of the family's table."""

    name: str  # a "{}" for each stacked axis of ours: layer, expert
    kept: bool = False  # a matrix is stored as ours, [in, out]; otherwise as its transpose
    by_head: bool = False  # a fused tensor holds the parts of the first head, then those of the second, and so on


class Place(NamedTuple):
    """Where columns of a leaf lie. It is our last axis that a fused tensor shares out."""

    weight: Weight
    stacked: int  # axes of ours that the name counts
    groups: int  # equal blocks that our columns are cut into: 1, or a head each
    before: int  # columns of a block's neighbours that stand before it
    ours: int  # columns of a block
    stride: int  # columns from block to block in the file

    def spans(self, columns: range) -> list[slice]:
        """Where those columns of ours stand in the file, in order."""
        cuts = range(columns.start // self.ours, -(-columns.stop // self.ours))
        bounds = [(i, max(columns.start, i * self.ours), min(columns.stop, (i + 1) * self.ours)) for i in cuts]
        moved = [(i * (self.stride - self.ours) + self.before, a, b) for i, a, b in bounds]
        return [slice(by + a, by + b) for by, a, b in moved]

    def indices(self, ranges: Sequence[range]) -> list[tuple[slice, ...]]:
        """Parts of the file's tensor that, joined along its output axis, are these rows and columns of ours (turned, if it is)."""
        rows = tuple(slice(r.start, r.stop) for r in ranges[:-1])
        return [(s, *rows) if self.turned(len(ranges)) else (*rows, s) for s in self.spans(ranges[-1])]

    def turned(self, ndim: int) -> bool:
        """Whether a tensor of that many axes is the transpose of ours."""
        return ndim == 2 and not self.weight.kept


class Tensor(NamedTuple):
    """A tensor of the files, and the leaves that it holds: one, or several side by side."""

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...]  # layer and expert
    leaves: tuple[str, ...]


def leaf_name(path: Any) -> str:
    """`layers.q`, from a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaf_shapes(abstract: Any) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape."""
    return {leaf_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(abstract)}


def fused(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Tensor name -> the leaves that it holds, of those that the model has."""
    return {w.name: [n for n, other in weights.items() if other.name == w.name and n in shapes] for w in weights.values()}


def places(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], heads: int) -> dict[str, Place]:
    """Leaf name -> where it lies."""
    parts, found = fused(weights, shapes), {}
    for name in shapes:
        weight = weights[name]
        groups = heads if weight.by_head else 1
        widths = [shapes[other][-1] // groups for other in parts[weight.name]]
        i = parts[weight.name].index(name)
        found[name] = Place(weight, weight.name.count("{}"), groups, sum(widths[:i]), widths[i], sum(widths))
    return found


def tensors(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], heads: int) -> list[Tensor]:
    """All tensors of the files, layer by layer."""
    found, plan = places(weights, shapes, heads), []
    for leaves in filter(None, fused(weights, shapes).values()):
        place, shape = found[leaves[0]], shapes[leaves[0]]
        own = (*shape[place.stacked : -1], place.groups * place.stride)
        own = own[::-1] if place.turned(len(own)) else own
        at = itertools.product(*map(range, shape[: place.stacked]))
        plan += [Tensor(place.weight.name.format(*i), own, i, tuple(leaves)) for i in at]
    return sorted(plan, key=lambda t: (not t.at, t.at[:1]))


def joined(parts: Sequence[np.ndarray], place: Place) -> np.ndarray:
    """The file's tensor from ours: a leaf's layer, or the parts of a fused one."""
    blocks = [x.reshape(*x.shape[:-1], place.groups, -1) for x in parts]
    whole = np.concatenate(blocks, axis=-1).reshape(*parts[0].shape[:-1], -1) if len(parts) > 1 else parts[0]
    return np.ascontiguousarray(whole.T if place.turned(whole.ndim) else whole)
