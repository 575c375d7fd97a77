"""Token-level preference losses: DPO's log-ratios together with the KL of whole next-token distributions.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import math

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, sequence
from alignax.losses.pairs import check_range, logistic, pair_ratios, pairwise
from alignax.types import Batch, Outputs


def tdpo(beta: float = 0.1) -> Loss:
    """Token-level DPO, version 1 (Zeng et al. 2024, arXiv:2404.11999): DPO with the difference of the responses' token-level KLs.

    -log sigmoid(beta (h - (D_l - D_w))),   D = sum_t KL(ref(. | x, y_<t) || pi(. | x, y_<t))

    D_w counts as reward, so the policy can win a pair by a drift from the reference on the chosen response. `tdpo2` prevents that.

    Needs `ref_logps` and a model that gives `ref_kl`: `--config.reference.token_kl=true`, or `alignax.forward(.., teacher=..)`.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]])}
    >>> out = Outputs(logps, -logps, ref_kl=jnp.array([[[0.0, 1.0], [0.0, 2.0]]]))
    >>> value, _ = tdpo(0.1)(out, batch, tdpo(0.1).normalised(batch))
    >>> print(f"{value:.3f}")  # z = 0.1 (2 - (2 - 1))
    0.644
    """
    scores = lambda out, batch: pair_ratios(out, batch) + divergences(out, batch)
    return pairwise("tdpo", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)


def tdpo2(beta: float = 0.1, alpha: float = 0.5) -> Loss:
    """Token-level DPO, version 2 (Zeng et al. 2024, arXiv:2404.11999): no gradient through the chosen response's KL.

    -log sigmoid(beta (h - alpha (D_l - sg(D_w)))),   sg: not differentiated

    The loss limits the KL on rejected responses. A large alpha keeps the policy at the reference.

    Args:
      beta: strength of the KL penalty.
      alpha: weight of the KLs, at least 0; 0 is DPO.
    """
    check_range("alpha", alpha, 0, math.inf, "a weight")

    def scores(out: Outputs, batch: Batch) -> jax.Array:
        d = divergences(out, batch)
        return pair_ratios(out, batch) + alpha * jnp.stack([jax.lax.stop_gradient(d[:, 0]), d[:, 1]], axis=1)

    return pairwise("tdpo2", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)


def divergences(out: Outputs, batch: Batch) -> jax.Array:
    """The token-level KL of each response: KL(ref || pi) of its next-token distributions, summed over its tokens: [B, 2] nats."""
    if out.ref_kl is None:
        raise ValueError("token-level DPO needs Outputs.ref_kl, which this model leaves out; set reference.token_kl=true")
    return sequence(out.ref_kl, batch)
