"""A batch that notes which fields code reads, used under `jax.eval_shape`: a field that no code reads is not computed."""

from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any

import jax


@jax.tree_util.register_pytree_node_class
class Noting(dict):
    """A batch that reports to `note` each watched field that code cannot do without.

    These count as a read: `batch[name]`, `batch.get(name)`, and a copy into a plain dict, since reads of the copy are not seen. These do
    not: to ask whether a field is there, and `get` with a default, since such code does without the field. Batches made by `|` and
    `jax.tree.map` note reads too, except of fields that were written since.
    """

    def __init__(self, fields: dict[str, Any], watched: frozenset[str], note: Callable[[str], Any]):
        """A batch of these fields; `note` takes a name, for example a set's `add`."""
        super().__init__(fields)
        self.watched, self.note = watched, note

    def __getitem__(self, name: str) -> Any:
        if name in self.watched:
            self.note(name)
        return super().__getitem__(name)

    def get(self, name: str, *default: Any) -> Any:
        """The field `name`, or the default."""
        return super().get(name, *default) if default or name not in self else self[name]

    def __iter__(self) -> Iterator[str]:
        # Overridden, so that dict(batch), {**batch} and plain | batch take every field through __getitem__.
        return super().__iter__()

    def items(self) -> Any:
        """The pairs of name and field; each pair that is taken is a read."""
        return ItemsView(self)

    def values(self) -> Any:
        """The fields; each field that is taken is a read."""
        return ValuesView(self)

    def copy(self) -> "Noting":
        """A copy of the batch, which notes reads too."""
        return self | {}

    def __or__(self, other: Any) -> "Noting":
        return Noting(dict(dict.items(self)) | dict(other), self.watched - other.keys(), self.note)

    def __ior__(self, other: Any) -> "Noting":  # type: ignore[override]
        return self | other

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """The fields in the order of their names; the structure keeps what is watched."""
        names = sorted(self)
        return [dict.__getitem__(self, name) for name in names], (tuple(names), self.watched, self.note)

    @classmethod
    def tree_unflatten(cls, structure: Any, fields: Any) -> "Noting":
        """A batch of the same structure with other arrays."""
        names, watched, note = structure
        return cls(dict(zip(names, fields, strict=True)), watched, note)
