"""A batch that notes which of its fields code reads, so that what nobody reads is not computed; on shapes, under `jax.eval_shape`."""

from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Noting(dict):
    """A batch that tells `note` the names of the watched fields that code cannot do without.

    A read is `batch[name]`, `batch.get(name)`, and a copy into a plain dict, as what is read of that one is not seen. To ask whether a
    field is there, or to `get` it with a default, is none: such code does without the field. What `|` and `jax.tree.map` make of the
    batch notes as it does, but for fields that were written since.
    """

    def __init__(self, fields: dict[str, Any], watched: frozenset[str], note: Callable[[str], Any]):
        """`note`: a set's `add`, say."""
        super().__init__(fields)
        self.watched, self.note = watched, note

    def __getitem__(self, name: str) -> Any:
        if name in self.watched:
            self.note(name)
        return super().__getitem__(name)

    def get(self, name: str, *default: Any) -> Any:
        """The field, or the default."""
        return super().get(name, *default) if default or name not in self else self[name]

    def __iter__(self) -> Iterator[str]:
        # Overridden, so that dict(batch), {**batch} and plain | batch take every field through __getitem__.
        return super().__iter__()

    def items(self) -> Any:
        """Names and fields; each that is taken is read."""
        return ItemsView(self)

    def values(self) -> Any:
        """Fields; each that is taken is read."""
        return ValuesView(self)

    def copy(self) -> "Noting":
        """A batch of the same fields, which goes on noting."""
        return self | {}

    def __or__(self, other: Any) -> "Noting":
        return Noting(dict(dict.items(self)) | dict(other), self.watched - other.keys(), self.note)

    def __ior__(self, other: Any) -> "Noting":  # type: ignore[override]
        return self | other

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """Fields in the order of their names; what is noted goes on in the structure."""
        names = sorted(self)
        return [dict.__getitem__(self, name) for name in names], (tuple(names), self.watched, self.note)

    @classmethod
    def tree_unflatten(cls, structure: Any, fields: Any) -> "Noting":
        """The batch of other arrays."""
        names, watched, note = structure
        return cls(dict(zip(names, fields, strict=True)), watched, note)
