"""PAMA: advantages of several rewards, where the reward with the smallest advantage decides.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

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

    A is the combination sum_k c_k A_k of least square, with c at least 0 and of sum 1: a problem in K numbers, not in the parameters. The
    A_k are at least 0 (the paper's "Noon PPO"), so A is min_k A_k, and no reward is traded for another: a response that any reward finds
    no better than its group is not reinforced. No response is pushed down.

    Writes `advantages` [B, N, T] for `ppo()`, whose clipping replaces the paper's indicator of the ratio. A response with a missing score
    has advantage 0. Reports `pama/agreed`, the share of responses that all rewards find better than their group.

    >>> batch = {"completion_mask": jnp.ones((1, 2, 1), bool), "scores": jnp.array([[[1.0, 2.0], [0.0, 1.0]]])}
    >>> print([round(x, 2) for x in pama()(batch)["advantages"].ravel().tolist()])
    [0.71, 0.0]

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
        raise ValueError("pama() needs several rewards, but scores have 1; use chain(mean, group_relative())")
    real = batch["completion_mask"].any(axis=-1)
    known = real & jnp.isfinite(scores).all(axis=-1)  # [B, N]
    z = [standardised(jnp.where(known, scores[..., k], 0.0), known, eps) for k in range(K)]
    # For each response. Public code reduces each reward's advantages to one number of the batch, which reinforces all responses.
    least = nearest_to_0(jnp.maximum(jnp.stack(z, axis=-1), 0.0))
    agreed = jnp.sum(least > 0) / jnp.maximum(real.sum(), 1)
    return report(of_responses(batch, least), **{"pama/agreed": agreed})


def nearest_to_0(values: jax.Array) -> jax.Array:
    """The point nearest to 0 between the least and the largest of the values: [.., K] -> [..]."""
    return jnp.clip(0.0, values.min(axis=-1), values.max(axis=-1))
