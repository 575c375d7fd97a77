"""Losses on pairs that push the reward of each response by itself, not only the margin of the pair.

r is beta log pi/ref of a response, summed over its tokens. All losses need the batch field `ref_logps`, unless other `scores` are given.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, make_loss
from alignax.losses.pairs import Scores, check_positive, field, logistic, pair_metrics, pair_ratios, pairwise
from alignax.types import Batch, Metrics, Outputs


def nca(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Noise contrastive alignment on pairs (Chen et al. 2024, arXiv:2402.05369).

    -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l)

    The chosen response is held at the minimum r_w = ln 2; the rejected one falls without limit.
    """
    value = lambda chosen, rejected: logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)
    return pairwise("nca", beta, value, scores)


def bco(beta: float = 0.1) -> Loss:
    """Binary classifier optimisation on pairs (Jung et al. 2024, arXiv:2404.04656): a classifier of each response by its reward.

    -log sigmoid(r_w - d) - log sigmoid(d - r_l),   d = (mean of r_w + mean of r_l) / 2

    d is the paper's reward shift, of which its authors keep a running mean. Here it is the mean of the global batch, which the experience
    `reward_shift()` writes as the field `bco_shift`; the mean of a small batch is noisy. Libraries without the shift have d = 0. There,
    rewards that are all above 0 push every chosen response little and every rejected one hard.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]]), "bco_shift": jnp.zeros(1)}
    >>> value, _ = bco(0.1)(Outputs(logps, -logps), batch, bco(0.1).normalised(batch))
    >>> print(f"{value:.3f}")  # twice log(1 + exp(-0.1))
    1.289
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

    `ref` is the policy of the last iteration. As in IPO, long responses dominate. The two targets may not be reachable together.

    Args:
      beta: 1 / the paper's eta; its authors use a small beta, with targets of hundreds of nats.
      scores: what stands for log pi/ref.
    """
    value = lambda chosen, rejected: (jnp.square(chosen - 0.5) + jnp.square(rejected + 0.5)) / beta**2
    return pairwise("sppo", beta, value, scores)


def apo_zero(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Anchored preference optimisation, zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    1 - sigmoid(r_w) + sigmoid(r_l)

    For chosen responses that are better than the policy's own: chosen responses rise, rejected ones fall. The gradient vanishes beyond a
    few units of reward, on the wrong side too.

    >>> logps = jnp.array([[[0.0, -1.0], [0.0, -4.0]]])  # [B, N, T], a prompt token first
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0], [0.0, -3.0]]])}
    >>> value, _ = apo_zero(1.0)(Outputs(logps, -logps), batch, apo_zero(1.0).normalised(batch))
    >>> print(f"{value:.3f}")  # 2 sigmoid(-1)
    0.538
    """
    return pairwise("apo_zero", beta, lambda chosen, rejected: jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), scores)


def apo_down(beta: float = 0.1, scores: Scores = pair_ratios) -> Loss:
    """Anchored preference optimisation, down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8).

    sigmoid(r_w) + 1 - sigmoid(r_w - r_l)

    For chosen responses that are worse than the policy's own: both responses fall, the rejected one more.
    """
    value = lambda chosen, rejected: jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return pairwise("apo_down", beta, value, scores)
