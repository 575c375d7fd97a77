"""PAMA: of several rewards, a response is reinforced by as much as the one gains that gains least from it."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.advantages import of_responses, standardised
from alignax.experience.chain import Experience, report
from alignax.losses.pairs import check_positive, field
from alignax.types import Batch


def pama(eps: float = 1e-4) -> Experience:
    """Pareto multi-objective alignment (PAMA, He and Maghsudi 2025, arXiv:2508.07768) of several rewards, `scores` [B, N, K].

    A_k = max(z_k, 0),   z_k = (r_k - mean) / (std + eps) in each group,   A = argmin of x^2 over x in [min_k A_k, max_k A_k]

    A is the combination sum_k c_k A_k, c at least 0 and of sum 1, whose square is the least: a problem in the plane of K numbers, not of
    parameters. Advantages of at least 0 (the paper's "Noon PPO") make it min_k A_k, so no reward is paid for with another one: where any
    of them finds a response no better than its group, the response is not reinforced. Nothing is pushed down.

    For `ppo()`, whose clipping takes the place of the paper's indicator of the ratio. A response of which a score is missing has advantage
    0. Reports `pama/agreed`, the share of responses that all rewards find better than their group.

    Args:
      eps: added to the deviations, which are of the sample (ddof 1).

    Raises:
      ValueError: in the chain, for a single reward.
    """
    check_positive("eps", eps)
    return Partial(_pama, eps)


def _pama(eps: float, batch: Batch) -> Batch:
    scores = field(batch, "scores", "score(ensemble)")  # [B, N, K]
    K = scores.shape[-1]
    if K == 1:
        raise ValueError("pama() is of several rewards, and scores have 1; take chain(mean, group_relative())")
    real = batch["completion_mask"].any(axis=-1)
    known = real & jnp.isfinite(scores).all(axis=-1)  # [B, N]
    z = [standardised(jnp.where(known, scores[..., k], 0.0), known, eps) for k in range(K)]
    # Of each response. The code that goes around for it reduces each reward's advantages to one number of the batch, which reinforces all.
    least = nearest_to_0(jnp.maximum(jnp.stack(z, axis=-1), 0.0))
    agreed = jnp.sum(least > 0) / jnp.maximum(real.sum(), 1)
    return report(of_responses(batch, least), **{"pama/agreed": agreed})


def nearest_to_0(values: jax.Array) -> jax.Array:
    """The point nearest to 0 between the least and the largest of the values: [.., K] -> [..]."""
    return jnp.clip(0.0, values.min(axis=-1), values.max(axis=-1))
