"""Packing: which examples of a batch are computed together, so that few of the positions that a model reads are padding.

A batch [B, N, T] is padded to its longest row. Where rows differ in length, most of its positions are padding. Packing deals the examples
of each batch shard into parts, first fit by decreasing length. A part holds as many examples as fit into one row of P positions, with all
N responses of each. The forward pass lays a part out as that row (`alignax.models.rows`). A loop computes part after part, and ends when
the fullest shard is done. So one compiled program serves every batch, and nothing depends on the lengths but the number of turns.

Losses, experiences and metrics do not know of it. A part is an ordinary batch, with padding rows up to its fixed size. Losses are sums of
values with weights of the whole batch, so they add up over parts exactly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.types import Batch, Params

SLOTS = 32  # examples of a part, for every N * T positions of it; real examples are seldom 32 times shorter than the longest


@dataclasses.dataclass(frozen=True)
class Packing:
    """How examples are packed. On a mesh with a context axis every row is: that axis shards the positions of packed rows.

    Attributes:
      positions: P, the positions that a batch shard computes at a time. A part has at least N * T, so that every example fits.
      mesh: the mesh that batches are sharded over; None for one device.
      shared: whether the N responses of an example share one copy of their prompt.
      block: the queries, and the keys, that attention computes together. A multiple of it are the positions of a part.
    """

    positions: int
    mesh: Mesh | None = None
    shared: bool = True
    block: int = 64

    @property
    def context(self) -> int:
        """The shards that the positions of a row are split over."""
        return 1 if self.mesh is None else self.mesh.shape["context"]

    @property
    def unit(self) -> int:
        """What P is a multiple of: a block; with several context shards two for each, see `alignax.models.rows`."""
        return self.block * (2 * self.context if self.context > 1 else 1)

    def shards(self, batch: Batch) -> int:
        """The number of batch shards; 1 for a batch that the shards do not divide."""
        shards = 1 if self.mesh is None else meshes.batch_shards(self.mesh)
        return shards if batch["mask"].shape[0] % shards == 0 else 1

    def size(self, batch: Batch, microbatches: int = 1) -> int:
        """P for a batch, whole units: no more positions than a padded microbatch has, and at least those of one padded example."""
        _, N, T = batch["mask"].shape
        most = batch["mask"].size // self.shards(batch) // microbatches
        return -(-max(min(self.positions, most), N * T) // self.unit) * self.unit

    def pays(self, batch: Batch, microbatches: int = 1) -> bool:
        """Whether a shard's part of the batch, padded, has more positions than one packed part."""
        return self.context > 1 or batch["mask"].size // self.shards(batch) > self.size(batch, microbatches)


PARTS = "parts"  # the scope of the loop over parts, in profiles and plans
FEW = 128  # parts of a padded batch; with more of them a half-empty last part is no matter
READ = ("tokens", "mask", "completion_mask")  # the fields that a model reads
ALSO_READ = ("ref_tokens", "ref_mask")  # what a teacher reads, if the batch has them


class Form(NamedTuple):
    """The form of packed rows: one row of `positions` on each of `shards` batch shards; for the rest see `Packing`."""

    positions: int
    shards: int
    shared: bool = True
    block: int = 64
    examples: int = 0  # of the batch; a batch of another number has been changed and is padded; 0: any number
    context: int = 1  # the shards that the positions of a row are dealt to


@jax.tree_util.register_pytree_with_keys_class
class Packed(dict):
    """A batch that the forward pass packs, because its rows fit into the rows of a `Form`; `Parts.part` makes such batches.

    A new batch that is made of it by `batch | {..}` is a plain dict, and is padded, since its rows may be longer. So is a batch of another
    number of examples.
    """

    def __init__(self, batch: Batch, form: Form):
        """Marks a batch."""
        super().__init__(batch)
        self.form = form

    def tree_flatten_with_keys(self) -> tuple[list[Any], Any]:
        """The fields by name, and what is static."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], (names, self.form)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Packed":
        """The batch from its fields."""
        names, form = static
        return cls(dict(zip(names, children, strict=True)), form)


def shared_tokens(tokens: jax.Array, mask: jax.Array, scored: jax.Array) -> jax.Array:
    """Whether all N rows of an example have the same token at a position and all before, none of them scored: [B, 1, T] bool.

    Args:
      tokens: [B, N, T] int32.
      mask: [B, N, T] bool, True for real tokens.
      scored: [B, N, T] bool, True for completion tokens.
    """
    alike = (mask == mask[:, :1]) & ((tokens == tokens[:, :1]) | ~mask) & ~scored
    return jnp.cumprod(alike.all(axis=1, keepdims=True), axis=-1).astype(bool)


def sizes(batch: Batch, shared: bool) -> jax.Array:
    """The positions that each example takes in a packed row: [B] int32; those of `ref_tokens` if they take more."""

    def size(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        total = mask.sum(axis=(1, 2), dtype=jnp.int32)
        if not shared or mask.shape[1] == 1:
            return total
        common = shared_tokens(tokens, mask, batch["completion_mask"]) & mask[:, :1]
        return total - (mask.shape[1] - 1) * common.sum(axis=(1, 2), dtype=jnp.int32)

    own = size(batch["tokens"], batch["mask"])
    if not {"ref_tokens", "ref_mask"} & batch.keys():
        return own
    return jnp.maximum(own, size(batch.get("ref_tokens", batch["tokens"]), batch.get("ref_mask", batch["mask"])))


class Parts(NamedTuple):
    """Parts of one size: which examples of each batch shard go into which part."""

    index: jax.Array  # [S, C, m] int32: examples of each of S shards in each of C parts, counted within the shard; b: none
    count: jax.Array  # [] int32: the parts that are computed
    examples: int  # b = B / S, the examples of a shard
    form: Form
    mesh: Mesh | None

    @property
    def computed(self) -> jax.Array:
        """The positions that are computed, of all shards and parts, padding included: [] int32."""
        return self.count * self.form.positions * self.form.shards

    def part(self, i: jax.Array, batch: Batch, beside: Any = ()) -> tuple[Packed, Any]:
        """Part i of the batch, S * m examples, and of a tree `beside` it with leaves [B, ...]; where there is no example, 0 and False."""
        at = jax.lax.dynamic_index_in_dim(self.index, i, axis=1, keepdims=False)  # [S, m]
        S, m = at.shape
        real = at < self.examples

        def take(x: jax.Array) -> jax.Array:
            own = x.reshape(S, self.examples, *x.shape[1:])
            found = jax.vmap(lambda a, rows: a[rows])(own, jnp.where(real, at, 0))
            found = jnp.where(real.reshape(S, m, *(1,) * (x.ndim - 1)), found, jnp.zeros((), x.dtype))
            return meshes.constrain(found.reshape(S * m, *x.shape[1:]), self.mesh, "batch", *(None,) * (x.ndim - 1))

        form = self.form._replace(examples=S * m)
        return Packed(jax.tree.map(take, dict(batch)), form), jax.tree.map(take, beside)

    def put(self, whole: Any, part: Any, i: jax.Array) -> Any:
        """A tree of leaves [B, ...] with those of part i, [S * m, ...], in their places."""
        at = jax.lax.dynamic_index_in_dim(self.index, i, axis=1, keepdims=False)
        S, m = at.shape

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            own = x.reshape(S, self.examples, *x.shape[1:])
            own = jax.vmap(lambda a, rows, values: a.at[rows].set(values, mode="drop"))(own, at, new.reshape(S, m, *x.shape[1:]))
            return own.reshape(x.shape)

        return jax.tree.map(put, whole, part)

    def each(self, turn: Callable[[jax.Array, Any], Any], sums: Any) -> Any:
        """What `turn(i, sums)` makes of the sums, one part i after another."""
        with jax.named_scope(PARTS):
            return jax.lax.fori_loop(0, self.count, turn, sums)

    def zeros(self, part: Any) -> Any:
        """A tree of zeros with leaves [B, ...], for parts of the given shapes [S * m, ...]."""
        B = self.form.shards * self.examples
        return jax.tree.map(lambda x: jnp.zeros((B, *x.shape[1:]), x.dtype), part)


def deal(batch: Batch, packing: Packing, microbatches: int = 1) -> list[Parts]:
    """Deals the examples of each batch shard into parts, first fit by decreasing size; padding examples go into none.

    Where a batch has few parts of P positions, the last one is often nearly empty. If its examples fit into fewer than four parts of P / 4
    positions, on each shard that has a last part, those are computed in its place.
    """
    P, S, (B, N, T) = packing.size(batch, microbatches), packing.shards(batch), batch["mask"].shape
    b = B // S
    slots = lambda P: min(b, max(SLOTS * P // (N * T), 1))
    size, small = sizes(batch, packing.shared).reshape(S, b), P // 4 // packing.unit * packing.unit
    mesh = packing.mesh if S > 1 else None
    parts = lambda index, count, P: Parts(index, count, b, Form(P, S, packing.shared, packing.block, context=packing.context), mesh)
    index, part = jax.vmap(lambda size: first_fit(size, P, slots(P), b))(size)
    counts = part.max(axis=1) + 1  # [S]
    count = counts.max()
    if not small or b * N * T > FEW * P:
        return [parts(index, count, P)]
    last = jnp.where((part == count - 1) & (part >= 0), size, 0)
    rest, placed = jax.vmap(lambda size: first_fit(size, small, slots(small), 3))(last)
    fits = ((placed >= 0) | (last == 0)).all()
    return [parts(index, count - fits, P), parts(rest, jnp.where(fits, placed.max() + 1, 0), small)]


def first_fit(size: jax.Array, P: int, slots: int, parts: int) -> tuple[jax.Array, jax.Array]:
    """First fit by decreasing size: the examples of each part, [parts, slots] int32, and the part of each example, [b] int32; -1: none.

    Args:
      size: [b] int32, positions of each example; those with 0 go into no part.
      P: positions of a part.
      slots: the most examples of a part.
      parts: the most parts; an example that fits into none of them is left out.
    """
    b, order = len(size), jnp.argsort(-size, stable=True)

    def place(k: jax.Array, state: Any) -> Any:
        load, used, index, part = state
        i = order[k]
        room = (load + size[i] <= P) & (used < slots)
        c = jnp.where(room.any() & (size[i] > 0), jnp.argmax(room), parts)  # beyond the last part: dropped
        index = index.at[c, used.at[c].get(mode="fill", fill_value=0)].set(i, mode="drop")
        part = part.at[i].set(jnp.where(c < parts, c, -1))
        return load.at[c].add(size[i], mode="drop"), used.at[c].add(1, mode="drop"), index, part

    zeros = jnp.zeros(parts, jnp.int32)
    start = zeros, zeros, jnp.full((parts, slots), b, jnp.int32), jnp.full(b, -1, jnp.int32)
    _, _, index, part = jax.lax.fori_loop(0, b, place, start)
    return index, part


@dataclasses.dataclass(frozen=True)
class PartByPart:
    """The forward pass of a frozen model that computes a batch in packed parts; equal ones share compiled programs.

    Its loop has no fixed number of turns, so it has no gradient. A batch for which packing does not pay is computed as it is.

    Attributes:
      apply: the forward pass, `(params, batch)` to a tree of arrays [B, ...], of a batch's tokens and masks and of a teacher's.
      packing: how examples are packed.
      role: the model reads `ROLE_tokens`, `ROLE_mask` and `ROLE_completion_mask` where the batch has all of them.
    """

    apply: Callable[[Params, Batch], Any]
    packing: Packing
    role: str = ""

    def read(self, batch: Batch) -> Batch:
        """The fields that the model reads: its own tokens and masks where the batch has such, else those of the batch."""
        own = {name: f"{self.role}_{name}" for name in READ}
        if self.role and all(field in batch for field in own.values()):
            return {name: batch[field] for name, field in own.items()}
        return {name: batch[name] for name in (*READ, *ALSO_READ) if name in batch}

    def pays(self, batch: Batch) -> bool:
        """Whether the batch is packed."""
        return self.packing.pays(self.read(batch))

    def __call__(self, params: Params, batch: Batch) -> Any:
        """The outputs of the whole batch."""
        if isinstance(batch, Packed):
            return self.apply(params, batch)
        batch = self.read(batch)
        if not self.packing.pays(batch):
            return self.apply(params, batch)
        whole = None
        for parts in deal(batch, self.packing):
            out = lambda i, parts=parts: self.apply(params, parts.part(i, batch)[0])
            if whole is None:
                whole = parts.zeros(jax.eval_shape(out, jnp.zeros((), jnp.int32)))
            whole = parts.each(lambda i, whole, parts=parts, out=out: parts.put(whole, out(i), i), whole)
        return whole


def part_by_part(apply: Callable[[Params, Batch], Any], packing: Packing | None, role: str = "") -> Callable[[Params, Batch], Any]:
    """A frozen model's forward pass in packed parts, see `PartByPart`; `apply` itself without packing."""
    return apply if packing is None else PartByPart(apply, packing, role)
