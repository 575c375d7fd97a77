"""Experience: what is not differentiated is data, written by pure functions `Batch -> Batch`, one after another.

An experience function is a pytree of the parameters that it reads (`jax.tree_util.Partial`), so it goes through `jit` as an
argument: its parameters stay sharded where they are and are never compiled into the program.

What an experience remembers from one batch to the next (a running log Z, an adaptive coefficient, multipliers) is its carry: a
`Stateful` function takes it and gives the next one. Carries live in the training state, so they are in every checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp

from alignax.blame import check_call
from alignax.data.files import short
from alignax.types import Batch

Experience = Callable[[Batch], Batch]
AXES = {  # of fields that experience functions write and others read
    "rewards": 2, "raw_rewards": 2, "advantages": 3, "token_rewards": 3, "ref_logps": 3, "old_logps": 3, "old_entropy": 3,
}  # fmt: skip
Carry = dict[str, Any]  # name of a stateful function -> what it remembers


@flax.struct.dataclass
class Stateful:
    """An experience with a carry. Called with a batch alone it reads the carry that it begins with."""

    name: str = flax.struct.field(pytree_node=False)  # of its carry; unique in a chain
    first: Any  # the carry at step 0: a pytree of arrays
    function: Callable[[Any, Batch], tuple[Any, Batch]]  # pure; a pytree of what it reads

    def __call__(self, batch: Batch) -> Batch:
        """The batch that the first carry gives."""
        return self.function(self.first, batch)[1]


@flax.struct.dataclass
class Chain:
    """Functions one after another."""

    functions: tuple[Experience, ...]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with what all of them write."""
        for function in self.functions:
            batch = function(batch)
        return batch


def chain(*functions: Experience) -> Experience:
    """The functions one after another, first to last; without any, the identity.

    Raises:
      ValueError: for what is no function of a batch.
    """
    for i, function in enumerate(functions):
        check_call(function, f"function {i} of chain(..)", "batch")
    return Chain(functions)


def first_carry(experience: Experience) -> Carry:
    """The carry at step 0 of every stateful function.

    Raises:
      ValueError: for two of one name.
    """
    if isinstance(experience, Stateful):
        return {experience.name: experience.first}
    carry: Carry = {}
    for function in experience.functions if isinstance(experience, Chain) else ():
        own = first_carry(function)
        if twice := sorted(own.keys() & carry.keys()):
            raise ValueError(f"two stateful experience functions are called {twice[0]!r}; give one of them another name")
        carry |= own
    return carry


def advance(experience: Experience, carry: Carry, batch: Batch) -> tuple[Carry, Batch]:
    """The batch, and the carry for the next one."""
    if isinstance(experience, Stateful):
        own, batch = experience.function(carry[experience.name], batch)
        return carry | {experience.name: own}, batch
    if isinstance(experience, Chain):
        for function in experience.functions:
            carry, batch = advance(function, carry, batch)
        return carry, batch
    given = experience(batch)
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{short(experience)} returns {type(given).__name__}; an experience function returns the batch, with the fields that it writes"
        )
    check_shapes(experience, batch, given)
    return carry, given


def check_shapes(function: Any, before: Batch, after: Mapping[str, Any]) -> None:
    """Refuses known fields of another shape than theirs, which jax would stretch over responses, or over prompts, without a word."""
    if "completion_mask" not in after:
        return
    whole = after["completion_mask"].shape
    for name, axes in AXES.items():
        if name in after and after[name] is not before.get(name) and jnp.shape(after[name]) != whole[:axes]:
            raise ValueError(
                f"{short(function)} writes {name!r} of shape {jnp.shape(after[name])}; they are {'[B, N, T]' if axes == 3 else '[B, N]'}, "
                f"{whole[:axes]} here"
            )
