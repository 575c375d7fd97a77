"""Token-level preference losses: the KL of whole next-token distributions beside the log-ratios of the tokens that were chosen."""

import math

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, sequence
from alignax.losses.pairs import check_range, logistic, pair_ratios, pairwise
from alignax.types import Batch, Outputs


def tdpo(beta: float = 0.1) -> Loss:
    """Token-level DPO, the first of two (Zeng et al. 2024, arXiv:2404.11999): DPO with the divergence that the token level adds.

    -log sigmoid(beta (h - (D_l - D_w))),   D = sum_t KL(ref(. | x, y_<t) || pi(. | x, y_<t))

    The policy may win a pair by leaving the reference on the chosen response: D_w counts as reward. `tdpo2` stops that.

    Needs `ref_logps` and a model that gives `ref_kl`: `--config.reference.token_kl=true`, or `alignax.forward(.., teacher=..)`.
    """
    scores = lambda out, batch: pair_ratios(out, batch) + divergences(out, batch)
    return pairwise("tdpo", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)


def tdpo2(beta: float = 0.1, alpha: float = 0.5) -> Loss:
    """Token-level DPO, the second (Zeng et al. 2024, arXiv:2404.11999): no gradient through the chosen response's divergence.

    -log sigmoid(beta (h - alpha (D_l - sg(D_w)))),   sg: not differentiated

    The divergence on rejected responses is held; a large alpha leaves the policy where it is.

    Args:
      beta: strength of the KL penalty.
      alpha: weight of the divergences, at least 0; 0 is DPO.
    """
    check_range("alpha", alpha, 0, math.inf, "a weight")

    def scores(out: Outputs, batch: Batch) -> jax.Array:
        d = divergences(out, batch)
        return pair_ratios(out, batch) + alpha * jnp.stack([jax.lax.stop_gradient(d[:, 0]), d[:, 1]], axis=1)

    return pairwise("tdpo2", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)


def divergences(out: Outputs, batch: Batch) -> jax.Array:
    """KL(ref || pi) of the next-token distributions, summed over the tokens of each response: [B, 2] nats."""
    if out.ref_kl is None:
        raise ValueError("token-level DPO needs Outputs.ref_kl, which this model leaves out; set reference.token_kl=true")
    return sequence(out.ref_kl, batch)
