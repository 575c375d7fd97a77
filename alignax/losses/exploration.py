"""Losses that keep exploration: plausible tokens of low probability are protected from a further loss of probability.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import math

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, token_logps
from alignax.losses.divergences import exp, expm1
from alignax.losses.pairs import check_range, field
from alignax.losses.responses import Aggregate, advantages_of, log_ratios, policy_metrics, token_mean
from alignax.types import Batch, Metrics, Outputs

FAR = 10.0  # nats below the proxy beyond which the pull follows its tangent; in the released code it has no gradient there


def lp_reg(coefficient: float = 1.0, clip: float = 1.0, clip_high: float = 9.0, aggregate: Aggregate = token_mean) -> Loss:
    """Low-probability regularisation (Huang et al. 2025, arXiv:2510.03222): PPO's surrogate, and a pull on tokens that lose probability.

    max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high))            on most tokens
    -A rho + coefficient (exp(q) - 1 - q),   q = log proxy/pi     on protected tokens

    A token is protected if it is in the field `low_probability` (A < 0 and among the least likely, see `low_probability_tokens`), and if
    its log-prob is now below the field `proxy_logps`. The proxy is the old policy without its noise tokens:
    `token_statistic("proxy_logps", policy, min_p(0.02))`. Noise tokens have no proxy, so they are not protected. The gradient of the pull
    is 1 - proxy / pi. It is weak if samples are used once: then pi is the old policy, and the proxy is little above it.

    >>> logps = jnp.array([[[0.0, -3.0]]])  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "old_logps": logps, "advantages": jnp.array([[[0.0, -1.0]]])}
    >>> batch |= {"low_probability": logps < -2, "proxy_logps": logps + 1}
    >>> value, _ = lp_reg()(Outputs(logps, -logps), batch, lp_reg().normalised(batch))
    >>> print(f"{value:.3f}")  # 1 + exp(1) - 1 - 1
    1.718

    Args:
      coefficient: of the pull, at least 0.
      clip: how far a ratio may move down, at least 0; the paper's clips, 1 and 9, are wide.
      clip_high: how far a ratio may move up.
      aggregate: how tokens are averaged.
    """
    check_range("coefficient", coefficient, 0, math.inf, "a weight")
    check_range("clip", clip, 0, math.inf, "a distance from 1")
    check_range("clip_high", clip_high, 0, math.inf, "a distance from 1")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio, advantages = log_ratios(out, batch), advantages_of(batch)
        proxy = field(batch, "proxy_logps", 'token_statistic("proxy_logps", policy, min_p(0.02))')
        low = field(batch, "low_probability", "low_probability_tokens()")
        below = jnp.where(batch["completion_mask"], proxy - token_logps(out), 0.0)
        protected = low & (below > 0)
        pull = jnp.where(protected, below, 0.0)
        ratio = exp(log_ratio)
        plain = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip_high))
        kept = -advantages * ratio + coefficient * (expm1(pull, FAR) - pull)
        metrics = policy_metrics(log_ratio, out, batch, clip, clip_high)
        return jnp.where(protected, kept, plain), metrics | {"lp_reg/protected": protected.astype(jnp.float32)}

    return aggregate("lp_reg", value)
