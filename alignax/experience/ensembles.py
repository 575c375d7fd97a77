"""What the scores of K reward models say together: pure functions [K, ...] -> [...], the same ones in training and in best-of-n.

The offset of a reward model is free, so minima and variances mean something only once offsets are anchored: train the members with
`score_l2()` or `centring()`, or take off each one's mean over responses of the initial policy. A score that is not finite makes
the result not finite. K = 1 works: all of them are then that member.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Aggregate = Callable[[jax.Array], jax.Array]  # [K, ...] -> [...]


def mean(scores: jax.Array) -> jax.Array:
    """The members' mean."""
    return jnp.mean(scores, axis=0)


def median(scores: jax.Array) -> jax.Array:
    """The members' median, which a minority of them cannot move far; of an even K the mean of the middle two."""
    return jnp.median(scores, axis=0)


def wco(scores: jax.Array) -> jax.Array:
    """Worst-case optimisation: the lowest of the members' scores (Coste et al. 2023, arXiv:2310.02743, eq. 4).

    Only the lowest member has a gradient; of several lowest each an equal share.
    """
    return jnp.min(scores, axis=0)


def uwo(coefficient: float = 0.5) -> Aggregate:
    """Uncertainty-weighted optimisation (Coste et al. 2023, arXiv:2310.02743, eq. 5).

    mean_k R_k - coefficient * (1 / K) sum_k (R_k - mean)^2

    Args:
      coefficient: of the variance between members, at least 0; 0 is `mean`. The paper: 0.5 for best-of-n, 0.1 for PPO.
    """
    if not coefficient >= 0:
        raise ValueError(f"the coefficient of UWO is {coefficient}; it must be at least 0, which is the mean (0.5 is usual)")
    # The paper's variance is that of the population (ddof 0); its PPO code takes ddof 1, which for K = 5 is a coefficient 1.25 as large.
    return mean if coefficient == 0 else lambda scores: mean(scores) - coefficient * jnp.var(scores, axis=0, ddof=0)


def quantile(q: float) -> Aggregate:
    """The members' q-quantile, linear between neighbours: 0 is `wco`, 0.5 is `median`."""
    if not 0 <= q <= 1:
        raise ValueError(f"the quantile is {q}; it must be in [0, 1] (0.25 is a cautious one)")
    return lambda scores: jnp.quantile(scores, q, axis=0)
