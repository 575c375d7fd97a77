"""Preference losses without a reference: the scores are the policy's own log-probs. No experience is needed.

Only the learning rate and the likelihood terms keep the policy near its start. Drifts are logged if the batch has `ref_logps`.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss
from alignax.losses.pairs import check_positive, check_range, check_smoothing, logistic, mean_logps, pair_logps, pairwise
from alignax.losses.supervised import per_sequence, sft, summed_sft
from alignax.types import Batch, Outputs

LEAST = 1e-6  # nats; mean log-probs are at most -LEAST, since the odds of p = 1 are infinite (float32 rounding has this size)


def simpo(beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    """Simple preference optimisation, SimPO (Meng et al. 2024, arXiv:2405.14734).

    -log sigmoid(beta (log pi(chosen) / |chosen| - log pi(rejected) / |rejected|) - gamma)

    It is sensitive to the learning rate: with too large a rate the policy no longer writes coherent text.

    >>> logps = jnp.array([[[0.0, -1.0, -1.0], [0.0, -4.0, 0.0]]])  # [B, N, T]; completions of 2 tokens and of 1
    >>> batch = {"completion_mask": logps < 0}
    >>> value, _ = simpo(1.0, 1.0)(Outputs(logps, -logps), batch, simpo(1.0, 1.0).normalised(batch))
    >>> print(f"{value:.3f}")  # z = -1 + 4 - 1
    0.127

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

    Log-probs are sums over tokens. A longer rejected response is less likely anyway, so its pair has a margin from the start.

    Args:
      beta: scale of the log-probs.
      alpha: weight of the likelihood, 1 in the paper.
      label_smoothing: as in `dpo`; not in the paper.
    """
    # The authors' code and TRL average the likelihood over tokens, which is `dpo(beta, scores=pair_logps) + sft()`.
    check_smoothing(label_smoothing)
    contrast = pairwise("cpo", beta, lambda chosen, rejected: logistic(chosen - rejected, label_smoothing), pair_logps)
    return contrast + alpha * summed_sft()


def slic_hf(delta: float = 1.0, weight: float = 1.0) -> Loss:
    """Sequence likelihood calibration with human feedback (Zhao et al. 2023, arXiv:2305.10425).

    max(0, delta - log pi(chosen) + log pi(rejected)) - weight log pi(y)

    The y of the regulariser is the chosen response here; the paper also uses responses of the SFT data, which need a batch of their own. A
    pair within the margin has the same gradient however wrong it is.

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

    It starts from a base model, without an SFT stage. Rewards in the metrics are log-odds.

    >>> logps = jnp.array([[[0.0, -1.0, -1.0], [0.0, -4.0, 0.0]]])  # [B, N, T]; completions of 2 tokens and of 1
    >>> batch = {"completion_mask": logps < 0}
    >>> value, _ = orpo(0.1)(Outputs(logps, -logps), batch, orpo(0.1).normalised(batch))
    >>> print(f"{value:.3f}")
    1.003

    Args:
      beta: weight of the odds ratio, the paper's lambda.
    """
    # TRL's likelihood includes the prompt, and is averaged over the tokens of the batch.
    check_positive("beta", beta)
    odds = pairwise("orpo", 1.0, lambda chosen, rejected: logistic(chosen - rejected), log_odds)
    return beta * odds + sft(over=per_sequence)


def log_odds(out: Outputs, batch: Batch) -> jax.Array:
    """The log-odds log(p / (1 - p)) of each response, p the geometric mean of its tokens' probabilities: [B, 2]."""
    p = jnp.minimum(mean_logps(out, batch), -LEAST)
    return p - log1mexp(p)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of x < 0, any shape, accurate at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    near = x > -jnp.log(2.0)
    # `where` differentiates both sides, so each side gets only inputs at which it is finite.
    high = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    low = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, high, low)
