"""Policy gradients on sampled responses: what raises the probability of what was better than expected.

All read the batch field `advantages` [B, N, T], which an experience writes, and `old_logps`, those of the policy that sampled; without
them the policy is its own old one: ratios are 1 and their gradient is that of log pi. rho is the ratio pi / old, A the advantage of
a token. `level` says whose ratio it is, `by_token`, `by_mean` (of a response, the geometric mean over its tokens) or `by_response`
(their product), and `aggregate` how tokens are averaged, see `alignax.losses.responses`.
"""

import math

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, token_logps
from alignax.losses.divergences import exp
from alignax.losses.pairs import check_positive, check_range, of_rollout
from alignax.losses.responses import (
    Aggregate,
    Level,
    advantages_of,
    by_mean,
    by_response,
    by_token,
    log_ratios,
    policy_metrics,
    response_mean,
    token_mean,
)
from alignax.types import Batch, Metrics, Outputs


def reinforce(aggregate: Aggregate = token_mean) -> Loss:
    """The policy gradient itself (Williams 1992, doi:10.1007/BF00992696).

    -A log pi(y_t | x, y_<t)

    Its gradient is that of the expected reward while samples are the policy's; a second step on the same samples is off-policy.
    """

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        return -advantages_of(batch) * token_logps(out), policy_metrics(log_ratios(out, batch), out, batch, math.inf, math.inf)

    return aggregate("reinforce", value)


def ppo(
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    aggregate: Aggregate = token_mean,
    level: Level = by_token,
) -> Loss:
    """Proximal policy optimisation's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high))

    A token that has moved beyond the clip the way its advantage wants has no gradient; one that has moved the other way has all of it.

    Args:
      clip: how far a ratio may move, at least 0.
      clip_high: how far upwards; None is `clip`. DAPO's clip-higher is 0.28 (Yu et al. 2025, arXiv:2503.14476).
      dual_clip: where A < 0 the loss is at most -A dual_clip, so a ratio that explodes has no gradient (Ye et al. 2020,
        arXiv:1912.09729); above 1, 3 is usual; None is no such bound. TRL's `delta` where that is beyond the clip.
      aggregate: how tokens are averaged.
      level: whose ratio is clipped.
    """
    return _clipped("ppo", level, clip, clip_high, dual_clip, aggregate)


def grpo(clip: float = 0.2, clip_high: float | None = None, aggregate: Aggregate = response_mean, level: Level = by_token) -> Loss:
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, eq. 3), without its KL: add `beta * kl_k3()`.

    max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high)),   averaged over the tokens of a response, then over responses

    PPO's surrogate; what is its own is the advantage, `group_relative()`, and the average, which is that of its KL too. Dr. GRPO:
    `group_relative(std=False)` and `aggregate=token_sum(max_length)`. DAPO: `clip_high=0.28, aggregate=token_mean`.

    Args:
      clip: how far a ratio may move, at least 0.
      clip_high: how far upwards; None is `clip`.
      aggregate: how tokens are averaged; a KL beside it takes the same, as in `grpo(aggregate=token_mean) + beta * kl_k3(token_mean)`.
      level: whose ratio is clipped; `gspo` is `by_mean` with clips of its size.
    """
    return _clipped("grpo", level, clip, clip_high, None, aggregate)


def gspo(clip: float = 3e-4, clip_high: float | None = 4e-4, aggregate: Aggregate = response_mean) -> Loss:
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071, eq. 5): GRPO with a ratio of whole responses.

    max(-A s, -A clip(s, 1 - clip, 1 + clip_high)),   s = (pi(y) / old(y))^(1 / |y|)

    All tokens of a response are clipped or none. The mean moves far less than a token's ratio, hence a clip of another size.

    Args:
      clip: how far the ratio may move, at least 0.
      clip_high: how far upwards; None is `clip`.
      aggregate: how tokens are averaged; `token_sum(1)` is LUSPO, where a long response counts as its tokens do.
    """
    return _clipped("gspo", by_mean, clip, clip_high, None, aggregate)


def rloo(clip: float = 0.2, clip_high: float | None = None) -> Loss:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740) with PPO's clip on the ratio of whole responses, as TRL has it.

    max(-A R, -A clip(R, 1 - clip, 1 + clip_high)),   R = pi(y) / old(y), the sum of the log-ratios, averaged over responses

    Advantages are of `leave_one_out()`, on rewards that hold the KL penalty (`kl_reward`). The ratio of a long response leaves the clip
    at once, so it is made for one or few steps on the same samples; with one it is REINFORCE.
    """
    return _clipped("rloo", by_response, clip, clip_high, None, response_mean)


def _clipped(name: str, level: Level, clip: float, clip_high: float | None, dual_clip: float | None, aggregate: Aggregate) -> Loss:
    check_range("clip", clip, 0, math.inf, "a distance from 1")
    high = clip if clip_high is None else clip_high
    check_range("clip_high", high, 0, math.inf, "a distance from 1")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1 (3 is usual), or None")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio, advantages = level(log_ratios(out, batch), batch), advantages_of(batch)
        ratio = exp(log_ratio)
        loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + high))
        if dual_clip is not None:
            loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
        return loss, policy_metrics(log_ratio, out, batch, clip, high)

    return aggregate(name, value)


def cispo(cap: float = 5.0, aggregate: Aggregate = token_mean, level: Level = by_token) -> Loss:
    """Clipped importance weights of REINFORCE (MiniMax-M1, Chen et al. 2025, arXiv:2506.13585).

    -sg(min(rho, cap)) A log pi(y_t | x, y_<t),   sg: not differentiated

    Where PPO drops a token that has moved, this keeps its gradient, with a bounded weight.

    Args:
      cap: largest weight, a ratio, above 0.
      aggregate: how tokens are averaged.
      level: whose ratio is the weight.
    """
    check_positive("cap", cap)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio = level(log_ratios(out, batch), batch)
        weight = jax.lax.stop_gradient(jnp.minimum(exp(log_ratio), cap))
        return -weight * advantages_of(batch) * token_logps(out), policy_metrics(log_ratio, out, batch, math.inf, cap - 1)

    return aggregate("cispo", value)


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05, aggregate: Aggregate = response_mean, level: Level = by_token) -> Loss:
    """Soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347): a gate in place of the clip.

    -A (4 / tau) sigmoid(tau (rho - 1)),   tau is tau_positive where A > 0, else tau_negative

    The gradient fades as a ratio leaves 1 either way: 1 there, as PPO's. It fades where a token has moved the wrong way, too. Gated by
    response, as GSPO clips: `level=by_mean`.

    Args:
      tau_positive: steepness of the gate, above 0.
      tau_negative: that of tokens to be made less likely; larger fades sooner.
      aggregate: how tokens are averaged.
      level: whose ratio is gated.
    """
    check_positive("tau_positive", tau_positive)
    check_positive("tau_negative", tau_negative)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio, advantages = level(log_ratios(out, batch), batch), advantages_of(batch)
        tau = jnp.where(advantages > 0, tau_positive, tau_negative)
        gate = jax.nn.sigmoid(tau * (exp(log_ratio) - 1.0)) * 4.0 / tau
        return -advantages * gate, policy_metrics(log_ratio, out, batch, math.inf, math.inf)

    return aggregate("sapo", value)


def vespo(
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    aggregate: Aggregate = token_mean,
) -> Loss:
    """Variational sequence-level soft policy optimisation (VESPO, arXiv:2602.10693): REINFORCE with a soft weight of whole responses.

    -sg(phi(w)) A log pi(y_t | x, y_<t),   phi(w) = w^k exp(lambda (1 - w)),   w = pi(y) / sampled(y), the product over tokens

    phi(1) = 1, and a response far off either way weighs nothing: no clip. k and lambda are the positive ones where A >= 0. w is of
    whoever drew the samples, the field `sampled_logps`, so that samples of another policy, or of another program, are corrected for.
    The log of w is held within [log 1e-8, 20], as in the authors' code.

    Args:
      k_positive: how fast the weight falls below w = 1, at least 0.
      lambda_positive: how fast it falls above, at least 0.
      k_negative: the first of these where A < 0.
      lambda_negative: the second where A < 0.
      aggregate: how tokens are averaged.
    """
    named = {"k_positive": k_positive, "lambda_positive": lambda_positive, "k_negative": k_negative, "lambda_negative": lambda_negative}
    for name, x in named.items():
        check_range(name, x, 0, math.inf, "an exponent")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        logps, advantages = token_logps(out), advantages_of(batch)
        moved = jnp.where(batch["completion_mask"], logps - of_rollout(batch, "sampled_logps"), 0.0)
        log_w = jnp.clip(jax.lax.stop_gradient(by_response(moved, batch)), math.log(1e-8), 20.0)
        k, decay = (jnp.where(advantages >= 0, *both) for both in ((k_positive, k_negative), (lambda_positive, lambda_negative)))
        weight = jnp.exp(k * log_w - decay * jnp.expm1(log_w))
        metrics = policy_metrics(by_response(log_ratios(out, batch), batch), out, batch, math.inf, math.inf)
        return -weight * advantages * logps, metrics | {"vespo/weight": weight}

    return aggregate("vespo", value)


def gmpo(clip: float = 0.4) -> Loss:
    """Geometric-mean policy optimisation (Zhao et al. 2025, arXiv:2507.20673): token log-ratios are clipped, then averaged.

    -A exp(mean_t min(l_t, clip(l_t))) where A > 0, with max where A < 0;   l_t = log rho clipped to [-clip, clip]

    A single token cannot dominate a response, as it can in an arithmetic mean. An advantage that differs by token is averaged too.

    Args:
      clip: how far the log-ratio of a token may move, in nats, at least 0.
    """
    check_range("clip", clip, 0, math.inf, "a log-ratio in nats")

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio = log_ratios(out, batch)
        advantages = by_mean(advantages_of(batch), batch)
        inside = jnp.clip(log_ratio, -clip, clip)
        pessimistic = jnp.where(advantages > 0, jnp.minimum(log_ratio, inside), jnp.maximum(log_ratio, inside))
        low, high = 1 - math.exp(-clip), math.exp(clip) - 1
        return -advantages * exp(by_mean(pessimistic, batch)), policy_metrics(log_ratio, out, batch, low, high)

    return response_mean("gmpo", value)
