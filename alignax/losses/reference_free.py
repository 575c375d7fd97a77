"""Preference losses without a reference: the policy's own log-probs are the scores. No experience is needed.

Nothing holds the policy near its start but the learning rate and the likelihood terms. Drifts are logged if the batch has `ref_logps`.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss
from alignax.losses.pairs import check_positive, check_range, check_smoothing, logistic, mean_logps, pair_logps, pairwise
from alignax.losses.supervised import per_sequence, sft, summed_sft
from alignax.types import Batch, Outputs

LEAST = 1e-6  # nats that a mean log-prob stays below 0: the odds of p = 1 are infinite, and its float32 rounding is of this size


def simpo(beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734).

    -log sigmoid(beta (log pi(chosen) / |chosen| - log pi(rejected) / |rejected|) - gamma)

    Sensitive to the learning rate; with too large a one it forgets how to write.

    Args:
      beta: scale of the mean log-prob of a token.
      gamma: target margin, at least 0.
      label_smoothing: as in `dpo`; not in the paper.
    """
    check_smoothing(label_smoothing)
    check_range("gamma", gamma, 0, float("inf"), "a margin")
    return pairwise("simpo", beta, lambda chosen, rejected: logistic(chosen - rejected - gamma, label_smoothing), mean_logps)


def cpo(beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    """Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417).

    -log sigmoid(beta (log pi(chosen) - log pi(rejected))) - alpha log pi(chosen)

    Sums over tokens: a longer rejected response is less likely to begin with, so its pair is won from the start.

    Args:
      beta: scale of the log-probs.
      alpha: weight of the likelihood, 1 in the paper.
      label_smoothing: as in `dpo`; not in the paper.
    """
    # The authors' code and TRL average the likelihood over tokens: `dpo(beta, scores=pair_logps) + sft()`.
    check_smoothing(label_smoothing)
    contrast = pairwise("cpo", beta, lambda chosen, rejected: logistic(chosen - rejected, label_smoothing), pair_logps)
    return contrast + alpha * summed_sft()


def slic_hf(delta: float = 1.0, weight: float = 1.0) -> Loss:
    """Sequence likelihood calibration with human feedback (Zhao et al. 2023, arXiv:2305.10425).

    max(0, delta - log pi(chosen) + log pi(rejected)) - weight log pi(y)

    The regulariser's y is the chosen response here; the paper also takes the SFT data's, which then is a batch of its own. A pair
    within the margin has the same gradient however wrong it is.

    Args:
      delta: margin in nats, above 0.
      weight: of the regulariser, the paper's lambda.
    """
    check_positive("delta", delta)
    calibration = pairwise("slic", 1.0, lambda chosen, rejected: jnp.maximum(0.0, delta - (chosen - rejected)), pair_logps)
    return calibration + weight * summed_sft()


def orpo(beta: float = 0.1) -> Loss:
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691).

    -log p(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected)),   odds = p / (1 - p), log p the mean over tokens

    From a base model, without an SFT stage before. Rewards in the metrics are log-odds.

    Args:
      beta: weight of the odds ratio, the paper's lambda.
    """
    # TRL's likelihood also covers the prompt, and averages over the tokens of the batch.
    check_positive("beta", beta)
    odds = pairwise("orpo", 1.0, lambda chosen, rejected: logistic(chosen - rejected), log_odds)
    return beta * odds + sft(over=per_sequence)


def log_odds(out: Outputs, batch: Batch) -> jax.Array:
    """log(p / (1 - p)) of each response, p the geometric mean of its tokens' probabilities: [B, 2]."""
    p = jnp.minimum(mean_logps(out, batch), -LEAST)
    return p - log1mexp(p)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, exact at either end (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    near = x > -jnp.log(2.0)
    # Both sides of a where are differentiated: each sees only what it can take.
    high = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    low = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, high, low)
