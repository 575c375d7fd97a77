"""Preference losses that counter length bias: longer responses have larger log-ratios, and preference data favours long responses.

Each loss is DPO or IPO on another score. All need the batch field `ref_logps`.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import math

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, lengths, sequence, token_logps
from alignax.losses.pairs import Scores, check_pairs, check_positive, check_range, logistic, mean_ratios, pair_ratios, pairwise, ref_logps
from alignax.losses.preference import ipo
from alignax.types import Batch, Outputs


def sigmoid_norm(beta: float = 5.0) -> Loss:
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124).

    -log sigmoid(beta (log pi/ref(chosen) / |chosen| - log pi/ref(rejected) / |rejected|))

    A token of a short response counts more. beta is per nat and token, so it is larger than DPO's.

    >>> logps = jnp.array([[[0.0, -1.0, -1.0], [0.0, -4.0, 0.0]]])  # [B, N, T]; completions of 2 tokens and of 1
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0, -2.0], [0.0, -3.0, 0.0]]])}
    >>> value, _ = sigmoid_norm(1.0)(Outputs(logps, -logps), batch, sigmoid_norm(1.0).normalised(batch))
    >>> print(f"{value:.3f}")  # a margin of 2 nats a token
    0.127
    """
    # TRL counts the first token, which is never predicted, in the length of a completion without a prompt.
    return pairwise("sigmoid_norm", beta, lambda chosen, rejected: logistic(chosen - rejected), mean_ratios)


def ipo_mean(beta: float = 0.1) -> Loss:
    """IPO on log-ratios averaged over tokens: the version that Azar et al. ran, not eq. 17 of arXiv:2310.12036.

    (log pi/ref(chosen) / |chosen| - log pi/ref(rejected) / |rejected| - 1 / (2 beta))^2

    The target is in nats per token. At beta 0.1 it is a margin of 5 nats in every token, so beta should be larger than for `ipo`.
    """
    return ipo(beta, scores=mean_ratios)


def ld_dpo(beta: float = 0.1, ld_alpha: float = 0.5) -> Loss:
    """Length-desensitised DPO (Liu et al. 2024, arXiv:2409.06411): tokens beyond the shorter response count less.

    DPO with log p(y) = sum_{t <= l} log p_t + ld_alpha sum_{t > l} log p_t,   l = min(|chosen|, |rejected|)

    The policy and the reference are treated alike. At ld_alpha 0 tokens beyond l have no effect.

    Args:
      beta: strength of the KL penalty.
      ld_alpha: weight of the tokens beyond l, in [0, 1]; 1 is DPO.
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha is {ld_alpha}; it must be a weight of tokens, in [0, 1]")
    return pairwise("ld_dpo", beta, lambda chosen, rejected: logistic(chosen - rejected), desensitised(ld_alpha))


def desensitised(ld_alpha: float) -> Scores:
    """The summed log-ratio of each response, whose tokens beyond the shorter response of the pair have weight `ld_alpha`: [B, 2]."""

    def scores(out: Outputs, batch: Batch) -> jax.Array:
        check_pairs(token_logps(out))
        place = jnp.cumsum(batch["completion_mask"], axis=-1)  # [B, 2, T], 1 at the first completion token
        shared = lengths(batch).min(axis=1, keepdims=True)[..., None]  # [B, 1, 1]
        ratios = out.logps - ref_logps(batch)
        return sequence(jnp.where(place <= shared, ratios, ld_alpha * ratios), batch)

    return scores


def r_dpo(beta: float = 0.1, alpha: float = 0.01) -> Loss:
    """Length-regularised DPO (Park et al. 2024, arXiv:2403.19159): DPO with the reward r(x, y) - alpha |y|.

    -log sigmoid(z + alpha (|chosen| - |rejected|))

    A longer chosen response gets part of its margin for free, so it is pushed less. The optimum is ref exp((r - alpha |y|) / beta): the
    loss removes a preference for length only if alpha has the size of that preference.

    >>> logps = jnp.array([[[0.0, -1.0, -1.0], [0.0, -4.0, 0.0]]])  # [B, N, T]; completions of 2 tokens and of 1
    >>> batch = {"completion_mask": logps < 0, "ref_logps": jnp.array([[[0.0, -2.0, -2.0], [0.0, -3.0, 0.0]]])}
    >>> value, _ = r_dpo(0.1, alpha=0.01)(Outputs(logps, -logps), batch, r_dpo(0.1, alpha=0.01).normalised(batch))
    >>> print(f"{value:.3f}")  # 0.1 * 3 + 0.01 * 1
    0.550

    Args:
      beta: strength of the KL penalty.
      alpha: price of a token, in units of the reward, at least 0; 0 is DPO.
    """
    check_range("alpha", alpha, 0, math.inf, "the price of a token")
    check_positive("beta", beta)
    scores = lambda out, batch: pair_ratios(out, batch) + (alpha / beta) * lengths(batch)
    return pairwise("r_dpo", beta, lambda chosen, rejected: logistic(chosen - rejected), scores)
