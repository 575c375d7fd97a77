"""f-DPO: preference optimisation under an f-divergence other than the KL (Wang et al. 2023, arXiv:2309.16240, theorem 1).

The policy that maximises E r - beta D_f(pi || ref) has f'(pi / ref) = r / beta + const, so f' of the ratio is the score. Each
divergence below is the function f'(u) - f'(1) of log u, u = pi / ref. So a policy that equals its reference has reward 0.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss
from alignax.losses.pairs import Scores, check_smoothing, logistic, pair_ratios, pairwise

Divergence = Callable[[jax.Array], jax.Array]
CAP = 30.0  # nats beyond which exponentials follow their tangent: exp overflows float32 at 88, the square of a margin at 44


def f_dpo(divergence: Divergence, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """DPO with an f-divergence in the place of the reverse KL (Wang et al. 2023, arXiv:2309.16240).

    -log sigmoid(beta f'(pi/ref(chosen)) - beta f'(pi/ref(rejected)))

    Rewards in the metrics are beta (f'(pi / ref) - f'(1)).

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]])}
    >>> value, _ = f_dpo(forward_kl, beta=0.5)(Outputs(logps, -logps), batch, f_dpo(forward_kl, beta=0.5).normalised(batch))
    >>> print(f"{value:.3f}")
    0.269

    Args:
      divergence: `reverse_kl` (DPO), `forward_kl`, `jensen_shannon`, `alpha_divergence(a)`, `chi_squared`, `total_variation`, or any
        function of log pi/ref.
      beta: strength of the penalty.
      label_smoothing: as in `dpo`.
    """
    check_smoothing(label_smoothing)
    return pairwise("f_dpo", beta, lambda chosen, rejected: logistic(chosen - rejected, label_smoothing), diverged(divergence))


def diverged(divergence: Divergence) -> Scores:
    """The score f'(pi / ref) - f'(1) of each response: [B, 2]. `hinge(beta, scores=diverged(forward_kl))` is a loss too."""
    return lambda out, batch: divergence(pair_ratios(out, batch))


def reverse_kl(ratio: jax.Array) -> jax.Array:
    """The reverse KL, KL(pi || ref), f = u log u: f' - f'(1) = log u, any shape. It seeks modes."""
    return ratio


def forward_kl(ratio: jax.Array) -> jax.Array:
    """The forward KL, KL(ref || pi), f = -log u: f' - f'(1) = 1 - 1/u, any shape.

    It covers the reference. It is at most 1, so no larger reward is possible, and it explodes for a chosen response that loses probability.

    >>> print(f"{forward_kl(jnp.log(2.0)):.3f}")
    0.500
    """
    return -expm1(-ratio)


def jensen_shannon(ratio: jax.Array) -> jax.Array:
    """Twice the Jensen-Shannon divergence, f = u log u - (u + 1) log((u + 1) / 2): f' = log(2 u / (1 + u)), at most log 2, any shape."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)


def alpha_divergence(alpha: float) -> Divergence:
    """The alpha-divergence, f' - f'(1) = (1 - u^-alpha) / alpha: the forward KL at alpha 1, the reverse KL as alpha goes to 0."""
    # TRL's coefficient is 1 - alpha. It cuts the exponent at 80, beyond which a pair has no gradient.
    if alpha == 0:
        raise ValueError("alpha is 0, where the alpha-divergence is the reverse KL; use reverse_kl")
    return lambda ratio: -expm1(-alpha * ratio) / alpha


def chi_squared(ratio: jax.Array) -> jax.Array:
    """Pearson's chi-squared of pi from ref, f = (u - 1)^2: f' = 2 (u - 1), any shape.

    f'(0) is finite, so the theorem's conditions fail: a response that has probability 0 at the optimum has no margin to match.
    """
    return 2 * expm1(ratio)


def total_variation(ratio: jax.Array) -> jax.Array:
    """The total variation, f = |u - 1| / 2: f' is 1/2 where pi is above ref and -1/2 where it is below, any shape.

    The gradient is 0 everywhere but at the step, so it trains nothing. It is a measure, and completes the list.
    """
    return 0.5 * jnp.sign(ratio)


def expm1(x: jax.Array, cap: float = CAP) -> jax.Array:
    """exp(x) - 1, which follows its tangent beyond `cap`: monotone, with finite values and gradients; any shape."""
    return jnp.expm1(jnp.minimum(x, cap)) + jnp.exp(cap) * jnp.maximum(x - cap, 0.0)


def exp(x: jax.Array, cap: float = CAP) -> jax.Array:
    """exp(x), which follows its tangent beyond `cap`; any shape."""
    return jnp.exp(jnp.minimum(x, cap)) + jnp.exp(cap) * jnp.maximum(x - cap, 0.0)
