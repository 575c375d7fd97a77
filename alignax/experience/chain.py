"""Experience: a chain of pure functions `Batch -> Batch` that write the data of a loss, which is not differentiated.

An experience function is a pytree of the parameters that it reads (`jax.tree_util.Partial`), so `jit` takes it as an argument: its
parameters keep their sharding and are not compiled into the program.

An experience may remember something from one batch to the next (a running log Z, an adaptive coefficient, multipliers). This is its
carry: a `Stateful` function takes the carry and returns the next one. Carries are in the training state, and so in every checkpoint.

To log a metric, a function returns `report(batch, name=value)`.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
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
AXES = {  # number of axes of fields that one experience function writes and another reads
    "rewards": 2, "raw_rewards": 2, "advantages": 3, "token_rewards": 3, "ref_logps": 3, "old_logps": 3, "old_entropy": 3,
}  # fmt: skip
Carry = dict[str, Any]  # name of a stateful function -> what it remembers
REPORTED = "reported/"  # prefix of the fields that carry metrics from `report` to `advance`


@flax.struct.dataclass
class Stateful:
    """An experience function with a carry. A call with a batch alone uses the first carry."""

    name: str = flax.struct.field(pytree_node=False)  # name of the carry; unique in a chain
    first: Any  # the carry at step 0: a pytree of arrays
    function: Callable[[Any, Batch], tuple[Any, Batch]]  # pure; a pytree of the arrays that it reads

    def __call__(self, batch: Batch) -> Batch:
        """The batch that `function` returns with the first carry."""
        return self.function(self.first, batch)[1]


@flax.struct.dataclass
class Chain:
    """A sequence of experience functions, applied first to last; see `chain`."""

    functions: tuple[Experience, ...]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the fields and reports of all functions."""
        for function in self.functions:
            batch = function(batch)
        return batch


def chain(*functions: Experience) -> Experience:
    """Makes one experience of several functions, applied first to last; without functions it is the identity.

    >>> batch = {"completion_mask": jnp.ones((1, 2, 1), bool), "scores": jnp.array([[[3.0, 1.0], [0.0, 0.0]]])}  # scores [B, N, K]
    >>> print(chain(wco, leave_one_out())(batch)["advantages"].ravel())
    [ 1. -1.]

    Raises:
      ValueError: for an argument that is not a function of a batch.
    """
    for i, function in enumerate(functions):
        check_call(function, f"function {i} of chain(..)", "batch")
    return Chain(functions)


def first_carry(experience: Experience) -> Carry:
    """The carry at step 0 of every stateful function, by name.

    Raises:
      ValueError: for two stateful functions of one name.
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
    """Adds metrics for the log to the batch that an experience function returns: `report(batch, kl_coefficient=beta)`.

    A run logs them with its other metrics, by these names. A name that is not an identifier: `report(batch, **{"constraint/slack": x})`. An
    experience sees the whole global batch, so its metrics do not depend on the number of microbatches and devices.

    >>> from alignax.experience import advance
    >>> batch = {"completion_mask": jnp.ones((2, 1, 1), bool)}
    >>> _, _, metrics = advance(lambda batch: report(batch, kl_coefficient=0.5), {}, batch)
    >>> print(metrics["kl_coefficient"])
    0.5

    Args:
      batch: with the field `completion_mask`.
      metrics: scalars [], numbers or arrays.

    Raises:
      ValueError: for a metric that is not a scalar.
    """
    B = batch["completion_mask"].shape[0]
    for name, x in metrics.items():
        if jnp.shape(x) != ():
            raise ValueError(f"report(..) is given {name!r} of shape {jnp.shape(x)}; a metric must be a scalar, for example the mean")
    # [B], so that code that splits, orders or selects all fields can treat metrics as fields.
    return batch | {REPORTED + name: jnp.broadcast_to(jax.lax.stop_gradient(x), B) for name, x in metrics.items()}


def numbered(name: str, values: jax.Array) -> Metrics:
    """The metrics `name_0`, `name_1` .. of an array [K], for `report`."""
    return {f"{name}_{k}": x for k, x in enumerate(values)}


@jax.named_scope("experience")
def advance(experience: Experience, carry: Carry, batch: Batch) -> tuple[Carry, Batch, Metrics]:
    """Runs an experience: the carry for the next batch, this batch with the written fields, and the reported metrics, each [].

    Raises:
      ValueError: if a function does not return a batch, for fields of a wrong shape, and for two functions that report one metric.
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
                f"{short(experience)} returns {type(given).__name__}; an experience function must return the batch with the new fields"
            )
        check_shapes(experience, batch, given)
    return carry, *taken(given)


def with_reported(metrics: Metrics, reported: Metrics) -> Metrics:
    """The metrics of a run, and the ones that its experience reports, in one dict.

    Raises:
      ValueError: for a reported metric whose name the run uses itself.
    """
    if both := sorted(reported.keys() & metrics.keys()):
        raise ValueError(f"the experience reports {both[0]!r}, but the run itself has a metric of that name; choose another name")
    return metrics | reported


def taken(batch: Any) -> tuple[Batch, Metrics]:
    """Splits a batch into its fields and the reported metrics."""
    names = [name for name in batch if name.startswith(REPORTED)]
    batch = batch | {} if names else batch  # a copy of the same kind
    return batch, {name.removeprefix(REPORTED): batch.pop(name)[0] for name in names}


def check_shapes(function: Any, before: Batch, after: Mapping[str, Any]) -> None:
    """Refuses known fields of a wrong shape, which jax would silently broadcast over responses or prompts."""
    if "completion_mask" not in after:
        return
    whole = after["completion_mask"].shape
    for name, axes in AXES.items():
        new = after.get(name, None)  # not after[name], which is a read, see alignax.reading
        if new is not None and new is not before.get(name, None) and jnp.shape(new) != whole[:axes]:
            raise ValueError(
                f"{short(function)} writes {name!r} of shape {jnp.shape(new)}; the shape must be "
                f"{'[B, N, T]' if axes == 3 else '[B, N]'}, here {whole[:axes]}"
            )
