"""Reward models in experience, and what the scores of K of them say together.

    chain(score(ensemble), uwo(0.5))        # writes `scores` [B, N, K], then `rewards` [B, N]

An aggregate is a pure function [K, ...] -> [...], the same one in training and in best-of-n; given a batch it is an experience.

The offset of a reward model is free, so minima and variances mean something only once offsets are anchored: take off each one's mean
over responses of the initial policy (`alignax anchor`), or train the members with `score_l2()` or `centring()`. A score that is not
finite makes the result not finite. K = 1 works: all of them are then that member.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.experience.logps import in_parts
from alignax.losses.pairs import field
from alignax.types import Batch, Model, Outputs, Params


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Aggregate:
    """K scores made one."""

    function: Callable[..., jax.Array]  # of scores [K, ...] and the arguments
    arguments: tuple[float, ...] = ()

    def __call__(self, scores: Any) -> Any:
        """[K, ...] -> [...]; of a batch the batch with `rewards` [B, N], the aggregate of its `scores` [B, N, K]."""
        if isinstance(scores, dict):
            return scores | {"rewards": self(jnp.moveaxis(field(scores, "scores", "score(ensemble)"), -1, 0))}
        return self.function(scores, *self.arguments)


def score(model: Model, microbatches: int = 1) -> Experience:
    """Writes a reward model's or an ensemble's `scores` [B, N, K] f32; K = 1 of a single model.

    Args:
      model: its `Outputs.scores` are [B, N], or [B, N, K] as those of `alignax.rewards.ensembles.ensemble_model`; no gradient goes into it.
      microbatches: parts that the batch is scored in, one after another, to bound memory.

    Raises:
      ValueError: for reward models of several labels, whose scores would stand where those of an ensemble's members do.
    """
    head = model.params.get("score") if isinstance(model.params, Mapping) else None  # [D, labels], of an ensemble [K, D, labels]
    if head is not None and head.shape[-1] > 1:
        raise ValueError(
            f"score() takes a reward model with one score of a response, or an ensemble of such, and this one gives {head.shape[-1]}; "
            "give a model with one label (model.num_labels 1)"
        )
    return Partial(_Score(microbatches, model.apply), model.params)


@dataclasses.dataclass(frozen=True)
class _Score:
    """The static part of `score`."""

    microbatches: int
    apply: Callable[[Params, Batch], Outputs]

    def __call__(self, params: Params, batch: Batch) -> Batch:
        B, N, _ = batch["tokens"].shape
        rated = in_parts(lambda part: self.apply(params, part).scores, batch, self.microbatches)
        if rated is None:
            raise ValueError("score() takes a reward model, and this one gives no scores; give a model with a reward head")
        return batch | {"scores": rated.reshape(B, N, -1)}


mean = Aggregate(lambda scores: jnp.mean(scores, axis=0))
"""The members' mean."""

median = Aggregate(lambda scores: jnp.median(scores, axis=0))
"""The members' median, which a minority of them cannot move far; of an even K the mean of the middle two."""

wco = Aggregate(lambda scores: jnp.min(scores, axis=0))
"""Worst-case optimisation: the lowest of the members' scores (Coste et al. 2023, arXiv:2310.02743, eq. 4).

Only the lowest member has a gradient; of several lowest each an equal share.
"""


def uwo(coefficient: float = 0.5) -> Aggregate:
    """Uncertainty-weighted optimisation (Coste et al. 2023, arXiv:2310.02743, eq. 5).

    mean_k R_k - coefficient * (1 / K) sum_k (R_k - mean)^2

    Args:
      coefficient: of the variance between members, at least 0; 0 is `mean`. The paper: 0.5 for best-of-n, 0.1 for PPO.
    """
    if not coefficient >= 0:
        raise ValueError(f"the coefficient of UWO is {coefficient}; it must be at least 0, which is the mean (0.5 is usual)")
    return mean if coefficient == 0 else Aggregate(_uwo, (coefficient,))


def _uwo(scores: jax.Array, coefficient: float) -> jax.Array:
    # The paper's variance is that of the population (ddof 0); its PPO code takes ddof 1, which for K = 5 is a coefficient 1.25 as large.
    return jnp.mean(scores, axis=0) - coefficient * jnp.var(scores, axis=0, ddof=0)


def quantile(q: float) -> Aggregate:
    """The members' q-quantile, linear between neighbours: 0 is `wco`, 0.5 is `median`."""
    if not 0 <= q <= 1:
        raise ValueError(f"the quantile is {q}; it must be in [0, 1] (0.25 is a cautious one)")
    return Aggregate(_quantile, (q,))


def _quantile(scores: jax.Array, q: float) -> jax.Array:
    return jnp.quantile(scores, q, axis=0)
