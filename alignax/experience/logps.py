"""Log-probs of a model, written into the batch as data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.packing import PartByPart
from alignax.types import Batch, Model, Outputs, Params, gathered, microbatch


def logps(name: str, model: Model, microbatches: int = 1) -> Experience:
    """Writes the per-token log-probs of a model as the field `name` [B, N, T] float32.

    Args:
      name: of the field, "ref_logps" for a frozen reference.
      model: the model; no gradient goes into it.
      microbatches: number of parts of the batch that are scored one after another, to bound memory.
    """
    return Partial(_Logps(name, microbatches, model.apply), model.params)


@dataclasses.dataclass(frozen=True)
class _Logps:
    """The static part of `logps`; equal parts share a compiled program, so new parameters do not compile anew."""

    name: str
    microbatches: int
    apply: Callable[[Params, Batch], Outputs]

    def __call__(self, params: Params, batch: Batch) -> Batch:
        return batch | {self.name: in_parts(lambda part: self.apply(params, part).logps, batch, self.microbatches, self.apply)}


def in_parts(function: Callable[[Batch], Any], batch: Batch, microbatches: int, apply: Any = None) -> Any:
    """The result of a function of a batch, arrays [B, ...], computed on parts of the batch one after another.

    There are `microbatches` parts, or the next larger number that divides B; B where it is smaller, as in an evaluation of few prompts.
    If the function calls the forward pass `apply` alone, and that packs the batch into parts of its own, these take their place.
    """
    if isinstance(apply, PartByPart) and apply.pays(batch):
        return function(batch)
    B = len(batch["tokens"])
    parts = next(n for n in range(min(microbatches, B), B + 1) if B % n == 0)
    return gathered(jax.lax.map(function, microbatch(batch, parts)))
