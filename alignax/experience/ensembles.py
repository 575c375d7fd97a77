"""Scores of reward models in experience, and aggregates of the scores of K models.

    chain(score(ensemble), uwo(0.5))        # writes `scores` [B, N, K], then `rewards` [B, N]

An aggregate is a pure function of scores [K, ...] -> [...], the same in training and in best-of-n. Applied to a batch it is an experience.

The offset of a reward model is arbitrary, so minima and variances mean something only after the offsets are anchored. Either subtract each
model's mean over responses of the initial policy (`alignax anchor`), or train the members with `score_l2()` or `centring()`. A score that
is not finite makes the aggregate not finite. With K = 1 every aggregate is that member's score.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
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
    """An aggregate of K scores to one, such as `mean`, `wco` and `uwo(0.5)`.

    >>> scores = jnp.array([[1.0, 5.0], [3.0, 5.0]])  # [K, responses]
    >>> print(mean(scores), wco(scores))
    [2. 5.] [1. 5.]
    >>> batch = {"scores": jnp.array([[[1.0, 3.0], [5.0, 5.0]]])}  # [B, N, K]
    >>> print(wco(batch)["rewards"])
    [[1. 5.]]
    """

    function: Callable[..., jax.Array]  # (scores [K, ...], *arguments) -> [...]
    arguments: tuple[float, ...] = ()

    def __call__(self, scores: Any) -> Any:
        """The aggregate of scores, [K, ...] -> [...]; or a batch with `rewards` [B, N], the aggregate of its `scores` [B, N, K]."""
        if isinstance(scores, dict):
            return scores | {"rewards": self(jnp.moveaxis(field(scores, "scores", "score(ensemble)"), -1, 0))}
        return self.function(scores, *self.arguments)


def score(model: Model, microbatches: int = 1) -> Experience:
    """Writes `scores` [B, N, K] f32 of a reward model or an ensemble; K = 1 for a single model.

    Args:
      model: with `Outputs.scores` [B, N], or [B, N, K] as from `alignax.rewards.ensembles.ensemble_model`; no gradient goes into it.
      microbatches: number of parts of the batch that are scored one after another, to bound memory.

    Raises:
      ValueError: for a reward model of several labels, whose scores would be taken for those of an ensemble's members.
    """
    head = model.params.get("score") if isinstance(model.params, Mapping) else None  # [D, labels], of an ensemble [K, D, labels]
    if head is not None and head.shape[-1] > 1:
        raise ValueError(
            "score() takes a reward model with one score per response, or an ensemble of such models, but this model gives "
            f"{head.shape[-1]}; give a model with one label (model.num_labels 1)"
        )
    return Partial(_Score(microbatches, model.apply), model.params)


@dataclasses.dataclass(frozen=True)
class _Score:
    """The static part of `score`."""

    microbatches: int
    apply: Callable[[Params, Batch], Outputs]

    def __call__(self, params: Params, batch: Batch) -> Batch:
        B, N, _ = batch["tokens"].shape
        rated = in_parts(lambda part: self.apply(params, part).scores, batch, self.microbatches, self.apply)
        if rated is None:
            raise ValueError("score() takes a reward model, but this model gives no scores; give a model with a reward head")
        return batch | {"scores": rated.reshape(B, N, -1)}


mean = Aggregate(lambda scores: jnp.mean(scores, axis=0))
"""The mean of the members' scores."""

median = Aggregate(lambda scores: jnp.median(scores, axis=0))
"""The median of the members' scores, which a minority of members cannot move far; for an even K, the mean of the middle two."""

wco = Aggregate(lambda scores: jnp.min(scores, axis=0))
"""Worst-case optimisation: the lowest of the members' scores (Coste et al. 2023, arXiv:2310.02743, eq. 4).

Only the lowest member has a gradient; several members with the lowest score share it equally.
"""


def uwo(coefficient: float = 0.5) -> Aggregate:
    """Uncertainty-weighted optimisation (Coste et al. 2023, arXiv:2310.02743, eq. 5).

    mean_k R_k - coefficient * (1 / K) sum_k (R_k - mean)^2

    >>> print(uwo(0.5)(jnp.array([[1.0, 5.0], [3.0, 5.0]])))  # scores of 2 members, 2 responses; 2 - 0.5 * 1
    [1.5 5. ]

    Args:
      coefficient: of the variance between members, at least 0; 0 gives `mean`. The paper uses 0.5 for best-of-n, 0.1 for PPO.
    """
    if not coefficient >= 0:
        raise ValueError(f"the coefficient of UWO is {coefficient}; it must be at least 0 (0 gives the mean, 0.5 is usual)")
    return mean if coefficient == 0 else Aggregate(_uwo, (coefficient,))


def _uwo(scores: jax.Array, coefficient: float) -> jax.Array:
    # The paper's variance has ddof 0. Its PPO code has ddof 1, which for K = 5 is a coefficient 1.25 times as large.
    return jnp.mean(scores, axis=0) - coefficient * jnp.var(scores, axis=0, ddof=0)


def quantile(q: float) -> Aggregate:
    """The aggregate that is the members' q-quantile, linear between neighbours: 0 is `wco`, 0.5 is `median`.

    >>> print(quantile(0.25)(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])))
    2.0
    """
    if not 0 <= q <= 1:
        raise ValueError(f"the quantile is {q}; it must be in [0, 1] (0.25 is a cautious choice)")
    return Aggregate(_quantile, (q,))


def _quantile(scores: jax.Array, q: float) -> jax.Array:
    return jnp.quantile(scores, q, axis=0)
