"""Policy-gradient losses on sampled responses: they raise the probability of tokens with a positive advantage.

All losses read the batch field `advantages` [B, N, T], which an experience writes, and `old_logps`, the log-probs of the policy that
sampled. Without `old_logps` ratios are 1, and their gradient is that of log pi. Below, rho is the ratio pi / old, and A the advantage of a
token. `level` selects the ratio: `by_token`, `by_mean` (the geometric mean over a response's tokens) or `by_response` (their product).
`aggregate` says how tokens are averaged, see `alignax.losses.responses`.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
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
    """The plain policy gradient, REINFORCE (Williams 1992, doi:10.1007/BF00992696).

    -A log pi(y_t | x, y_<t)

    The gradient is that of the expected reward if the policy itself drew the samples; a second step on the same samples is off-policy.

    >>> logps = jnp.array([[[0.0, -2.0]]])  # [B, N, T]
    >>> batch = {"completion_mask": logps < 0, "advantages": jnp.full((1, 1, 2), 0.5)}
    >>> value, _ = reinforce()(Outputs(logps, -logps), batch, reinforce().normalised(batch))
    >>> print(f"{value:.3f}")
    1.000
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

    A token whose ratio has left the clip in the direction of its advantage has no gradient; in the other direction it keeps all of it.

    >>> logps = jnp.log(jnp.array([[[1.0, 0.6]]]))  # [B, N, T]; a token of ratio 0.6 / 0.4 = 1.5
    >>> batch = {"completion_mask": logps < 0, "old_logps": jnp.log(jnp.array([[[1.0, 0.4]]])), "advantages": jnp.ones((1, 1, 2))}
    >>> value, _ = ppo(0.2)(Outputs(logps, -logps), batch, ppo(0.2).normalised(batch))
    >>> print(f"{value:.3f}")  # max(-1.5, -1.2)
    -1.200

    Args:
      clip: how far a ratio may move, at least 0.
      clip_high: how far a ratio may move up; None: `clip`. DAPO's clip-higher is 0.28 (Yu et al. 2025, arXiv:2503.14476).
      dual_clip: where A < 0 the loss is at most -A dual_clip, so an exploding ratio has no gradient (Ye et al. 2020, arXiv:1912.09729);
        above 1, usually 3; None: no such bound. It equals TRL's `delta` where that is beyond the clip.
      aggregate: how tokens are averaged.
      level: which ratio is clipped.
    """
    return _clipped("ppo", level, clip, clip_high, dual_clip, aggregate)


def grpo(clip: float = 0.2, clip_high: float | None = None, aggregate: Aggregate = response_mean, level: Level = by_token) -> Loss:
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, eq. 3), without its KL: add `beta * kl_k3()`.

    max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high)),   averaged over the tokens of a response, then over responses

    The surrogate is PPO's. GRPO differs in the advantage, `group_relative()`, and in the average, which its KL shares. Dr. GRPO is
    `group_relative(std=False)` and `aggregate=token_sum(max_length)`. DAPO is `clip_high=0.28, aggregate=token_mean`.

    >>> grpo() + 0.04 * kl_k3()
    grpo + 0.04 * kl_k3

    Args:
      clip: how far a ratio may move, at least 0.
      clip_high: how far a ratio may move up; None: `clip`.
      aggregate: how tokens are averaged; a KL takes the same, as in `grpo(aggregate=token_mean) + beta * kl_k3(token_mean)`.
      level: which ratio is clipped; `gspo` is `by_mean` with much smaller clips.
    """
    return _clipped("grpo", level, clip, clip_high, None, aggregate)


def gspo(clip: float = 3e-4, clip_high: float | None = 4e-4, aggregate: Aggregate = response_mean) -> Loss:
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071, eq. 5): GRPO with the mean ratio of whole responses.

    max(-A s, -A clip(s, 1 - clip, 1 + clip_high)),   s = (pi(y) / old(y))^(1 / |y|)

    Either all tokens of a response are clipped or none. The mean ratio moves far less than a token's, so the clip is much smaller.

    >>> logps = jnp.log(jnp.array([[[1.0, 0.6, 0.6]]]))  # [B, N, T]; token ratios 1.5 and 1
    >>> batch = {"completion_mask": logps < 0, "advantages": jnp.ones((1, 1, 3))}
    >>> batch["old_logps"] = jnp.log(jnp.array([[[1.0, 0.4, 0.6]]]))
    >>> value, _ = gspo(0.1, 0.1)(Outputs(logps, -logps), batch, gspo(0.1, 0.1).normalised(batch))
    >>> print(f"{value:.3f}")
    -1.100

    Args:
      clip: how far the ratio may move, at least 0.
      clip_high: how far the ratio may move up; None: `clip`.
      aggregate: how tokens are averaged; with `token_sum(1)` it is LUSPO, where a response counts by its number of tokens.
    """
    return _clipped("gspo", by_mean, clip, clip_high, None, aggregate)


def rloo(clip: float = 0.2, clip_high: float | None = None) -> Loss:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740) with PPO's clip on the ratio of whole responses, as in TRL.

    max(-A R, -A clip(R, 1 - clip, 1 + clip_high)),   R = pi(y) / old(y), the sum of the log-ratios, averaged over responses

    Use it with the advantages of `leave_one_out()`, on rewards that include the KL penalty (`kl_reward`). The ratio of a long response
    soon leaves the clip, so take one or few steps on the same samples; with one step the loss is REINFORCE.
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
    """CISPO, REINFORCE with clipped importance weights (MiniMax-M1, Chen et al. 2025, arXiv:2506.13585).

    -sg(min(rho, cap)) A log pi(y_t | x, y_<t),   sg: not differentiated

    PPO drops the gradient of a token that has moved far; CISPO keeps it, with a bounded weight.

    >>> logps = jnp.log(jnp.array([[[1.0, 0.6]]]))  # [B, N, T]; a token of ratio 0.6 / 0.4 = 1.5
    >>> batch = {"completion_mask": logps < 0, "old_logps": jnp.log(jnp.array([[[1.0, 0.4]]])), "advantages": jnp.ones((1, 1, 2))}
    >>> value, _ = cispo(5.0)(Outputs(logps, -logps), batch, cispo(5.0).normalised(batch))
    >>> print(f"{value:.3f}")  # -1.5 log 0.6
    0.766

    Args:
      cap: the largest weight, a ratio, above 0.
      aggregate: how tokens are averaged.
      level: which ratio is the weight.
    """
    check_positive("cap", cap)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_ratio = level(log_ratios(out, batch), batch)
        weight = jax.lax.stop_gradient(jnp.minimum(exp(log_ratio), cap))
        return -weight * advantages_of(batch) * token_logps(out), policy_metrics(log_ratio, out, batch, math.inf, cap - 1)

    return aggregate("cispo", value)


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05, aggregate: Aggregate = response_mean, level: Level = by_token) -> Loss:
    """Soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347): PPO with a smooth gate in place of the clip.

    -A (4 / tau) sigmoid(tau (rho - 1)),   tau is tau_positive where A > 0, else tau_negative

    At a ratio of 1 the gradient is PPO's. It fades as the ratio moves away from 1 in either direction, the wrong one included. For a gate
    by response, like GSPO's clip, set `level=by_mean`.

    Args:
      tau_positive: steepness of the gate, above 0.
      tau_negative: steepness for tokens that are to lose probability; a larger one fades sooner.
      aggregate: how tokens are averaged.
      level: which ratio is gated.
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
    """Variational sequence-level soft policy optimisation (VESPO, arXiv:2602.10693): REINFORCE with a smooth weight of whole responses.

    -sg(phi(w)) A log pi(y_t | x, y_<t),   phi(w) = w^k exp(lambda (1 - w)),   w = pi(y) / sampled(y), the product over tokens

    phi(1) = 1, and phi goes to 0 for a response whose ratio is far from 1 on either side, so no clip is needed. k and lambda are the
    positive ones where A >= 0. w compares with the log-probs at sampling time, the field `sampled_logps`, so it also corrects for samples
    of another policy or program. log w is clipped to [log 1e-8, 20], as in the authors' code.

    Args:
      k_positive: how fast the weight falls below w = 1, at least 0.
      lambda_positive: how fast it falls above, at least 0.
      k_negative: k where A < 0.
      lambda_negative: lambda where A < 0.
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
    """Geometric-mean policy optimisation (Zhao et al. 2025, arXiv:2507.20673): clips the log-ratios of tokens, then averages them.

    -A exp(mean_t min(l_t, clip(l_t))) where A > 0, with max where A < 0;   l_t = log rho clipped to [-clip, clip]

    No single token can dominate a response, as it can in an arithmetic mean. Advantages that differ by token are averaged too.

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
