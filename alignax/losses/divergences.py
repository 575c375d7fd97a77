"""f-DPO: preference optimisation under an f-divergence other than the KL (Wang et al. 2023, arXiv:2309.16240, theorem 1).

The policy that maximises E r - beta D_f(pi || ref) has f'(pi / ref) = r / beta + const, so f' of the ratio is the score. Each
divergence below is f'(u), u = pi / ref, as a function of log u, less f'(1): the policy that is its reference has reward 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss
from alignax.losses.pairs import Scores, check_smoothing, logistic, pair_ratios, pairwise

Divergence = Callable[[jax.Array], jax.Array]
CAP = 30.0  # nats at which exponentials go on along their tangent: float32 ends at 88, and the square of a margin at half of that


def f_dpo(divergence: Divergence, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """DPO under an f-divergence (Wang et al. 2023, arXiv:2309.16240).

    -log sigmoid(beta f'(pi/ref(chosen)) - beta f'(pi/ref(rejected)))

    Rewards in the metrics are beta (f'(pi / ref) - f'(1)), those of the divergence.

    Args:
      divergence: `reverse_kl` (DPO), `forward_kl`, `jensen_shannon`, `alpha_divergence(a)`, `chi_squared`, `total_variation`, or any
        function of log pi/ref.
      beta: strength of the penalty.
      label_smoothing: as in `dpo`.
    """
    check_smoothing(label_smoothing)
    return pairwise("f_dpo", beta, lambda chosen, rejected: logistic(chosen - rejected, label_smoothing), diverged(divergence))


def diverged(divergence: Divergence) -> Scores:
    """f' of each response's ratio to the reference: [B, 2]. `hinge(beta, scores=diverged(forward_kl))` is a loss too."""
    return lambda out, batch: divergence(pair_ratios(out, batch))


def reverse_kl(ratio: jax.Array) -> jax.Array:
    """f = u log u, KL(pi || ref): f' - f'(1) = log u. Seeks modes."""
    return ratio


def forward_kl(ratio: jax.Array) -> jax.Array:
    """f = -log u, KL(ref || pi): f' - f'(1) = 1 - 1/u.

    Covers the reference. Bounded above: no reward difference beyond it can be had, and a chosen response that falls explodes.
    """
    return -expm1(-ratio)


def jensen_shannon(ratio: jax.Array) -> jax.Array:
    """f = u log u - (u + 1) log((u + 1) / 2), twice the Jensen-Shannon divergence: f' = log(2 u / (1 + u)), at most log 2."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)


def alpha_divergence(alpha: float) -> Divergence:
    """f' - f'(1) = (1 - u^-alpha) / alpha: the forward KL at alpha 1, the reverse KL as alpha goes to 0."""
    # TRL's coefficient is 1 - alpha, and its exponent is cut at 80, beyond which a pair has no gradient.
    if alpha == 0:
        raise ValueError("alpha is 0, where the alpha-divergence is the reverse KL; use reverse_kl")
    return lambda ratio: -expm1(-alpha * ratio) / alpha


def chi_squared(ratio: jax.Array) -> jax.Array:
    """f = (u - 1)^2, Pearson's chi-squared of pi from ref: f' = 2 (u - 1).

    f'(0) is finite, so the theorem's conditions fail: a response that the optimum would give no probability has no margin to match.
    """
    return 2 * expm1(ratio)


def total_variation(ratio: jax.Array) -> jax.Array:
    """f = |u - 1| / 2: f' is 1/2 above the reference and -1/2 below.

    The gradient is 0 everywhere else than on the step, so it trains nothing: it is here to measure by, and to complete the table.
    """
    return 0.5 * jnp.sign(ratio)


def expm1(x: jax.Array, cap: float = CAP) -> jax.Array:
    """exp(x) - 1, from `cap` on along its tangent: monotone, with a value and a gradient that stay finite."""
    return jnp.expm1(jnp.minimum(x, cap)) + jnp.exp(cap) * jnp.maximum(x - cap, 0.0)


def exp(x: jax.Array, cap: float = CAP) -> jax.Array:
    """exp(x), from `cap` on along its tangent."""
    return jnp.exp(jnp.minimum(x, cap)) + jnp.exp(cap) * jnp.maximum(x - cap, 0.0)
