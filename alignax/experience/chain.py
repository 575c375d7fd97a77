"""Experience: what is not differentiated is data, written by pure functions `Batch -> Batch`, one after another.

An experience function is a pytree of the parameters that it reads (`jax.tree_util.Partial`), so it goes through `jit` as an
argument: its parameters stay sharded where they are and are never compiled into the program.

What an experience remembers from one batch to the next (a running log Z, an adaptive coefficient, multipliers) is its carry: a
`Stateful` function takes it and gives the next one. Carries live in the training state, so they are in every checkpoint.

What it has to say to the log alone is no field: a function returns `report(batch, name=value)`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from alignax.config.blame import check_call
from alignax.text import short
from alignax.types import Batch, Metrics

Experience = Callable[[Batch], Batch]
AXES = {  # of fields that experience functions write and others read
    "rewards": 2, "raw_rewards": 2, "advantages": 3, "token_rewards": 3, "ref_logps": 3, "old_logps": 3, "old_entropy": 3,
}  # fmt: skip
Carry = dict[str, Any]  # name of a stateful function -> what it remembers
REPORTED = "reported/"  # what the fields of metrics begin with, on their way from `report` to `advance`


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
        """The batch with what all of them write and report."""
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


def report(batch: Batch, /, **metrics: Any) -> Batch:
    """The batch to return from an experience function, with metrics for the log: `report(batch, kl_coefficient=beta)`.

    A run logs them with its other metrics, by these names; of other names: `report(batch, **{"constraint/slack": x})`. An experience
    sees the whole global batch, so its metrics are of that, however many microbatches and devices there are.

    Args:
      batch: its fields; `completion_mask` is one of them.
      metrics: scalars [], numbers or arrays.

    Raises:
      ValueError: for what is no scalar.
    """
    B = batch["completion_mask"].shape[0]
    for name, x in metrics.items():
        if jnp.shape(x) != ():
            raise ValueError(f"report(..) is given {name!r} of shape {jnp.shape(x)}; a metric is a scalar, its mean say")
    # As long as the batch, so that what splits, orders or selects all fields takes them for others.
    return batch | {REPORTED + name: jnp.broadcast_to(jax.lax.stop_gradient(x), B) for name, x in metrics.items()}


def numbered(name: str, values: jax.Array) -> Metrics:
    """Metrics `name_0`, `name_1` .. of an array [K], for `report`."""
    return {f"{name}_{k}": x for k, x in enumerate(values)}


def advance(experience: Experience, carry: Carry, batch: Batch) -> tuple[Carry, Batch, Metrics]:
    """The carry for the next batch, this batch with what the experience writes, and the metrics that it reports, each [].

    Raises:
      ValueError: for what is no batch, for fields of a wrong shape, and for two functions that report one metric.
    """
    if isinstance(experience, Chain):
        metrics: Metrics = {}
        for function in experience.functions:
            carry, batch, own = advance(function, carry, batch)
            if twice := sorted(own.keys() & metrics.keys()):
                raise ValueError(f"two experience functions report {twice[0]!r}; give one of the metrics another name")
            metrics |= own
        return carry, batch, metrics
    if isinstance(experience, Stateful):
        own, given = experience.function(carry[experience.name], batch)
        carry = carry | {experience.name: own}
    else:
        given = experience(batch)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{short(experience)} returns {type(given).__name__}; an experience function returns the batch, with the fields that it "
                "writes"
            )
        check_shapes(experience, batch, given)
    return carry, *taken(given)


def with_reported(metrics: Metrics, reported: Metrics) -> Metrics:
    """The metrics of a run and those that its experience reports.

    Raises:
      ValueError: for one that the run has itself.
    """
    if both := sorted(reported.keys() & metrics.keys()):
        raise ValueError(f"the experience reports {both[0]!r}, and every such run has a metric of that name; give it another one")
    return metrics | reported


def taken(batch: Any) -> tuple[Batch, Metrics]:
    """A batch without the metrics that are reported, and these."""
    names = [name for name in batch if name.startswith(REPORTED)]
    batch = batch | {} if names else batch  # a copy of the same kind
    return batch, {name.removeprefix(REPORTED): batch.pop(name)[0] for name in names}


def check_shapes(function: Any, before: Batch, after: Mapping[str, Any]) -> None:
    """Refuses known fields of another shape than theirs, which jax would stretch over responses, or over prompts, without a word."""
    if "completion_mask" not in after:
        return
    whole = after["completion_mask"].shape
    for name, axes in AXES.items():
        new = after.get(name, None)  # not after[name], which is a read, see alignax.reading
        if new is not None and new is not before.get(name, None) and jnp.shape(new) != whole[:axes]:
            raise ValueError(
                f"{short(function)} writes {name!r} of shape {jnp.shape(new)}; they are {'[B, N, T]' if axes == 3 else '[B, N]'}, "
                f"{whole[:axes]} here"
            )
