"""Losses that anchor each response of a pair by itself: its own reward is pushed, not only the margin.

r is beta log pi/ref of a response, summed over its tokens. All need the batch field `ref_logps`, unless other `scores` are given.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, make_loss
from alignax.losses.pairs import Scores, check_positive, field, logistic, pair_metrics, pair_ratios, pairwise
from alignax.types import Batch, Metrics, Outputs


def nca(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Noise contrastive alignment on pairs (Chen et al. 2024, arXiv:2402.05369).

    -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l)

    Least at r_w = ln 2, where the chosen response is held; the rejected one falls without limit.
    """
    value = lambda chosen, rejected: logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)
    return pairwise("nca", beta, value, scores)


def bco(beta: float = 0.1) -> Loss:
    """Binary classifier optimisation on pairs (Jung et al. 2024, arXiv:2404.04656): each response is classified by its reward.

    -log sigmoid(r_w - d) - log sigmoid(d - r_l),   d = (mean of r_w + mean of r_l) / 2

    d is the paper's reward shift; its authors keep a running mean, which is state. Here it is that of the global batch, data that
    the experience `reward_shift()` writes as `bco_shift`; the mean of a small batch is noisy. Libraries that leave the shift out have
    `bco_shift` of 0: there, rewards that are all above 0 push every chosen response little and every rejected one hard.
    """
    check_positive("beta", beta)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        rewards = beta * pair_ratios(out, batch)  # [B, 2]
        shift = beta * field(batch, "bco_shift", "reward_shift()")  # [B]
        return logistic(rewards[:, 0] - shift) + logistic(shift - rewards[:, 1]), pair_metrics(rewards, out, batch)

    return make_loss("bco", value)


def sppo(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Self-play preference optimisation with hard labels (Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with P = 1 and 0).

    (log pi/ref(chosen) - 1 / (2 beta))^2 + (log pi/ref(rejected) + 1 / (2 beta))^2

    `ref` is the policy of the last iteration. As in IPO, long responses dominate, and both targets may be out of reach together.

    Args:
      beta: 1 / the paper's eta; its authors use small ones, with targets of hundreds of nats.
      scores: what stands for log pi/ref.
    """
    value = lambda chosen, rejected: (jnp.square(chosen - 0.5) + jnp.square(rejected + 0.5)) / beta**2
    return pairwise("sppo", beta, value, scores)


def apo_zero(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Anchored preference optimisation, zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    1 - sigmoid(r_w) + sigmoid(r_l)

    For chosen responses better than what the policy would say: they rise, rejected ones fall. Beyond a few units of reward, on the
    wrong side too, the gradient vanishes.
    """
    return pairwise("apo_zero", beta, lambda chosen, rejected: jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), scores)


def apo_down(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Anchored preference optimisation, down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8).

    sigmoid(r_w) + 1 - sigmoid(r_w - r_l)

    For chosen responses worse than what the policy would say: both fall, the rejected one more.
    """
    value = lambda chosen, rejected: jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return pairwise("apo_down", beta, value, scores)
