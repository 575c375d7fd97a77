"""Statistics of the whole batch that losses compare with: ranks and means of the policy's log-ratios, as data.

Each function reads `ref_logps` and the current policy's `old_logps`: `chain(logps("ref_logps", reference), logps("old_logps", policy),
matched_margins())`. Pairs without a completion on both sides take no part.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.losses.algebra import examples, sequence
from alignax.losses.pairs import field, ref_logps
from alignax.losses.penalties import chi2_of
from alignax.losses.responses import responses
from alignax.types import Batch


def matched_margins() -> Experience:
    """Writes `aot_margins` [B]: the margin log ref(chosen) - log ref(rejected) of the same rank in the batch as the policy's margin."""
    return Partial(_margins)


def _margins(batch: Batch) -> Batch:
    policy, reference = (x[:, 0] - x[:, 1] for x in _sequences(batch))  # [B]
    return batch | {"aot_margins": of_same_rank(policy, reference, examples(batch))}


def matched_ratios() -> Experience:
    """Writes `aot_ratios` [B, 2]: for each chosen response the log-ratio of the rejected response of its rank, and the reverse."""
    return Partial(_ratios)


def _ratios(batch: Batch) -> Batch:
    policy, reference = _sequences(batch)
    chosen, rejected = (policy - reference).T
    real = examples(batch)
    other = [of_same_rank(chosen, rejected, real), of_same_rank(rejected, chosen, real)]
    return batch | {"aot_ratios": jnp.stack(other, axis=1)}


def reward_shift() -> Experience:
    """Writes `bco_shift` [B], the same for every row: the mean of log pi/ref over the chosen and rejected responses of the batch.

    >>> old, ref = jnp.array([[[-1.0], [-4.0]]]), jnp.array([[[-2.0], [-3.5]]])  # [B, N, T]
    >>> print(reward_shift()({"completion_mask": old < 0, "old_logps": old, "ref_logps": ref})["bco_shift"])
    [0.25]
    """
    return Partial(_shift)


def _shift(batch: Batch) -> Batch:
    policy, reference = _sequences(batch)
    real = examples(batch)
    mean = jnp.where(real[:, None], policy - reference, 0.0).sum() / jnp.maximum(2 * real.sum(), 1)
    return batch | {"bco_shift": jnp.full(real.shape, mean)}


def chi2_estimate() -> Experience:
    """Writes `chi2` [B], the same for every row: chi-squared of the policy from its reference, estimated on the policy's responses.

    mean over responses of exp(l) - 1 + exp(-l) - 1,   l = log old/ref summed over tokens; beyond 10 nats along the tangent

    `square_root(chi2())` divides by its root. N may be any number; responses without a completion take no part.
    """
    return Partial(_chi2_estimate)


def _chi2_estimate(batch: Batch) -> Batch:
    ratio = sequence(field(batch, "old_logps", 'logps("old_logps", policy)') - ref_logps(batch), batch)  # [B, N]
    real = responses(batch)
    mean = jnp.where(real, chi2_of(ratio), 0.0).sum() / jnp.maximum(real.sum(), 1)
    return batch | {"chi2": jnp.full(ratio.shape[:1], mean)}


def of_same_rank(x: jax.Array, y: jax.Array, real: jax.Array) -> jax.Array:
    """The y [B] of the same rank as each x [B], among real rows [B]; equal values are ranked by their place."""
    by_x, by_y = (jnp.argsort(jnp.where(real, v, jnp.inf), stable=True) for v in (x, y))
    return jnp.zeros_like(y).at[by_x].set(y[by_y])


def _sequences(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The summed log-probs of the policy and the reference, each [B, 2]."""
    old, ref = field(batch, "old_logps", 'logps("old_logps", policy)'), ref_logps(batch)
    if old.shape[1] != 2:
        raise ValueError(
            f"ranks and shifts need pairs, but these examples have {old.shape[1]} responses per prompt; set data.kind='preference', "
            "or, where the run samples the responses, rollout.samples=2"
        )
    return sequence(old, batch), sequence(ref, batch)
