"""Rewards made ready: the KL penalty, limits, penalties of length, whitening, shaping.

Functions of `rewards` [B, N] come first, `kl_reward` after them: it spreads rewards over tokens, and what follows is of `token_rewards`.

    chain(score(ensemble), uwo(0.5), clip_rewards(10), missing_eos_penalty(1.0), kl_reward(0.05), gae())
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.advantages import check_discount, rewarded_tokens, token_rewards, whiten
from alignax.experience.chain import Experience, Stateful, report
from alignax.losses.algebra import lengths, sequence
from alignax.losses.pairs import check_positive, field, of_rollout, ref_logps
from alignax.types import Batch


def kl_reward(coefficient: jax.Array | float) -> Experience:
    """The KL from the reference as a penalty in the reward: -coefficient * k1 on each completion token, k1 = log old/ref.

    Writes `token_rewards` [B, N, T], which hold the penalty and on the last scored token the response's reward, and `rewards` [B, N],
    their sum: for methods of whole responses. `raw_rewards` [B, N] keep what they were, which is what a run reports. k1 in the reward
    has the gradient of KL(pi || ref); other estimators there have not.

    Reads `rewards`, `old_logps` and `ref_logps`. k1 is signed: a response less likely than under the reference is rewarded, and its mean
    is at least 0 only over samples of the very policy that scored them.

    Args:
      coefficient: beta, a number or a traced scalar; changing it does not compile anew.
    """
    check_coefficient(coefficient)
    return Partial(_kl_reward, coefficient)


def check_coefficient(coefficient: jax.Array | float) -> None:
    """Refuses a KL that would be rewarded, where that is known."""
    if isinstance(coefficient, str) or (isinstance(coefficient, (int, float)) and not coefficient >= 0):
        raise ValueError(f"the coefficient of the KL is {coefficient!r}; it must be a number of at least 0 (0.05 is usual)")


def _kl_reward(coefficient: jax.Array, batch: Batch) -> Batch:
    mask, old = batch["completion_mask"], field(batch, "old_logps", 'logps("old_logps", policy), kl_reward(..)')
    penalised = token_rewards(batch) - coefficient * jnp.where(mask, old - ref_logps(batch), 0.0)
    raw = batch.get("raw_rewards", batch["rewards"])
    return batch | {"token_rewards": penalised, "rewards": sequence(penalised, batch), "raw_rewards": raw}


def adaptive_kl_reward(coefficient: float = 0.1, target: float = 6.0, horizon: float = 10_000) -> Stateful:
    """`kl_reward` with a coefficient that holds the KL of whole responses at a target, see `adaptive_kl_update`.

    The coefficient is the carry; a batch is penalised with the one that those before it left, which it reports as `kl_coefficient`, and
    its own KL makes the next.

    Args:
      coefficient: the first one.
      target: of the KL, in nats.
      horizon: responses in which the coefficient may change by a fifth.
    """
    check_coefficient(coefficient)
    check_positive("target", target)
    check_positive("horizon", horizon)
    return Stateful("adaptive_kl_reward", jnp.float32(coefficient), Partial(_adaptive_kl_reward, target, horizon))


def _adaptive_kl_reward(target: float, horizon: float, coefficient: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
    out = _kl_reward(coefficient, batch)
    real = batch["completion_mask"].any(axis=-1)  # [B, N]
    n = jnp.maximum(real.sum(), 1)
    kl = sequence(batch["old_logps"] - ref_logps(batch), batch).sum() / n
    return adaptive_kl_update(coefficient, kl, target, horizon, n), report(out, kl_coefficient=coefficient)


def adaptive_kl_update(beta: jax.Array, kl: jax.Array, target: float = 6.0, horizon: float = 10_000, n: Any = 1) -> jax.Array:
    """The next coefficient of a KL that is held at a target above 0 (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)

    Args:
      beta: the present coefficient.
      kl: of whole responses, in nats, as measured with `beta`.
      target: what it is to be, in nats.
      horizon: samples in which the coefficient may change by a fifth.
      n: samples that were seen since the last update.
    """
    return beta * (1.0 + jnp.clip(kl / target - 1.0, -0.2, 0.2) * n / horizon)


def clip_rewards(limit: float) -> Experience:
    """`rewards` into [-limit, limit]."""
    check_positive("limit", limit)
    return Partial(_clip_rewards, limit)


def _clip_rewards(limit: float, batch: Batch) -> Batch:
    return batch | {"rewards": jnp.clip(field(batch, "rewards", "score(model), uwo()"), -limit, limit)}


def missing_eos_penalty(penalty: float) -> Experience:
    """Takes `penalty` off the reward of a response that was cut before its EOS (the batch field `truncated`)."""
    return Partial(_missing_eos_penalty, penalty)


def _missing_eos_penalty(penalty: float, batch: Batch) -> Batch:
    cut = of_rollout(batch, "truncated")
    return batch | {"rewards": field(batch, "rewards", "score(model), uwo()") - penalty * cut}


def overlong_penalty(max_length: float, margin: float) -> Experience:
    """DAPO's soft punishment of length (Yu et al. 2025, arXiv:2503.14476, eq. 13), added to `rewards`.

    0 up to max_length - margin tokens, then falling by a line to -1 at max_length, -1 beyond

    Args:
      max_length: tokens of the longest completion, EOS included.
      margin: tokens over which it falls, above 0 and at most `max_length`.
    """
    if not 0 < margin <= max_length:
        raise ValueError(f"the margin is {margin} tokens of {max_length}; it must be above 0 and at most the longest completion")
    return Partial(_overlong_penalty, max_length, margin)


def _overlong_penalty(max_length: float, margin: float, batch: Batch) -> Batch:
    penalty = jnp.clip((max_length - margin - lengths(batch)) / margin, -1.0, 0.0)
    return batch | {"rewards": field(batch, "rewards", "score(model), uwo()") + penalty}


def whiten_rewards(shift_mean: bool = False, eps: float = 1e-8) -> Experience:
    """`token_rewards` over the completion tokens of the batch to variance 1 (Ziegler et al. 2019's code): after `kl_reward`.

    Args:
      shift_mean: whether to take the mean to 0 too. It is kept by default: an offset of every token would reward or punish length.
      eps: added to the variance (ddof 1).
    """
    check_positive("eps", eps)
    return Partial(_whiten_and_shift, eps) if shift_mean else Partial(_whiten_in_place, eps)


def _whiten_and_shift(eps: float, batch: Batch) -> Batch:
    return batch | {"token_rewards": _whitened(eps, batch)[0]}


def _whiten_in_place(eps: float, batch: Batch) -> Batch:
    white, mean = _whitened(eps, batch)
    return batch | {"token_rewards": white + jnp.where(rewarded_tokens(batch), mean, 0.0)}


def _whitened(eps: float, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Responses whose reward is missing take no part, and stay as they are."""
    rewards, known = token_rewards(batch), rewarded_tokens(batch)
    white, mean = whiten(rewards, known, eps)
    return jnp.where(batch["completion_mask"] & ~known, rewards, white), mean


def shaping(potential: Callable[[Batch], jax.Array], gamma: float = 1.0) -> Experience:
    """Potential-based shaping (Ng et al. 1999): rewards on the way that leave the best policy what it is.

    r_t + gamma F(s_(t+1)) - F(s_t),   F 0 after the last token

    Args:
      potential: of a batch, F before each token is chosen: [B, N, T], read at completion tokens, as a critic's values are. One that holds
        parameters is a `jax.tree_util.Partial` of them.
      gamma: the discount that `gae` has.
    """
    check_discount("gamma", gamma)
    return Partial(_shaping, potential if isinstance(potential, Partial) else Partial(potential), gamma)


def _shaping(potential: Callable[[Batch], jax.Array], gamma: float, batch: Batch) -> Batch:
    mask = batch["completion_mask"]
    here = jnp.where(mask, potential(batch), 0.0)
    place = jnp.arange(mask.shape[-1])
    # The potential at the next completion token: the nearest place to the right that the mask holds.
    after = jax.lax.cummin(jnp.where(mask, place, mask.shape[-1]), axis=2, reverse=True)
    following = jnp.pad(after[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=mask.shape[-1])
    there = jnp.take_along_axis(jnp.pad(here, ((0, 0), (0, 0), (0, 1))), following, axis=-1)
    return batch | {"token_rewards": token_rewards(batch) + jnp.where(mask, gamma * there - here, 0.0)}
