"""Statistics of a model's next-token distributions, written into the batch as data."""

import dataclasses
from collections.abc import Callable

from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.experience.logps import in_parts
from alignax.models.statistics import Statistic
from alignax.text import short
from alignax.types import Batch, Model, Outputs, Params


def token_statistic(name: str, model: Model, statistic: Statistic, microbatches: int = 1) -> Experience:
    """Writes a statistic of a model's next-token distribution at each completion token: the field `name` [B, N, T] float32, 0 elsewhere.

    `lp_reg` reads `token_statistic("proxy_logps", policy, min_p(0.02))`. It takes a forward pass of its own.

    Args:
      name: of the field.
      model: one of the models that `experience(..)` is given; no gradient goes into it.
      statistic: of `alignax.models.statistics`, or your own; of a single model.
      microbatches: number of parts of the batch that are scored one after another, to bound memory.

    Raises:
      ValueError: for a statistic that is not a `Statistic`, and for a model that cannot compute one.
    """
    if not isinstance(statistic, Statistic):
        raise ValueError(f"token_statistic({name!r}, ..) is given {short(statistic)}; give a Statistic, for example min_p(0.02)")
    if model.giving is None:
        raise ValueError(f"the model of token_statistic({name!r}, ..) gives no statistics; use the policy or the reference")
    return Partial(_TokenStatistic(name, statistic.name, microbatches, model.giving((statistic,))), model.params)


@dataclasses.dataclass(frozen=True)
class _TokenStatistic:
    """The static part of `token_statistic`."""

    name: str
    statistic: str
    microbatches: int
    apply: Callable[[Params, Batch], Outputs]

    def __call__(self, params: Params, batch: Batch) -> Batch:
        value = lambda part: self.apply(params, part).statistics[self.statistic]
        return batch | {self.name: in_parts(value, batch, self.microbatches, self.apply)}
