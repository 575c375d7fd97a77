"""Changes of rewards: the KL penalty, clipping, length penalties, whitening, shaping.

Functions of `rewards` [B, N] come first. `kl_reward` follows: it spreads rewards over tokens. The functions after it act on
`token_rewards` [B, N, T].

    chain(score(ensemble), uwo(0.5), clip_rewards(10), missing_eos_penalty(1.0), kl_reward(0.05), gae())

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
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

    Writes `token_rewards` [B, N, T]: the penalty of each token, plus the response's reward on its last completion token. Writes `rewards`
    [B, N], their sum, for methods of whole responses. `raw_rewards` [B, N] keeps the rewards before the penalty, which a run reports. k1 in
    the reward has the gradient of KL(pi || ref); other estimators in the reward do not.

    Reads `rewards` [B, N], `old_logps` and `ref_logps` [B, N, T]. k1 is signed: a response that is less likely than under the reference is
    rewarded. The mean of k1 is at least 0 only over samples of the policy of `old_logps`.

    >>> batch = {"completion_mask": jnp.ones((1, 1, 2), bool), "rewards": jnp.ones((1, 1))}
    >>> batch |= {"old_logps": jnp.array([[[-1.0, -1.0]]]), "ref_logps": jnp.array([[[-2.0, -3.0]]])}
    >>> print(kl_reward(0.5)(batch)["token_rewards"])
    [[[-0.5  0. ]]]

    Args:
      coefficient: beta, a number or a traced scalar; another value does not compile anew.
    """
    check_coefficient(coefficient)
    return Partial(_kl_reward, coefficient)


def check_coefficient(coefficient: jax.Array | float) -> None:
    """Refuses a negative coefficient, which would reward the KL, unless it is traced."""
    if isinstance(coefficient, str) or (isinstance(coefficient, (int, float)) and not coefficient >= 0):
        raise ValueError(f"the coefficient of the KL is {coefficient!r}; it must be a number of at least 0 (0.05 is usual)")


def _kl_reward(coefficient: jax.Array, batch: Batch) -> Batch:
    mask, old = batch["completion_mask"], field(batch, "old_logps", 'logps("old_logps", policy), kl_reward(..)')
    penalised = token_rewards(batch) - coefficient * jnp.where(mask, old - ref_logps(batch), 0.0)
    raw = batch.get("raw_rewards", batch["rewards"])
    return batch | {"token_rewards": penalised, "rewards": sequence(penalised, batch), "raw_rewards": raw}


def adaptive_kl_reward(coefficient: float = 0.1, target: float = 6.0, horizon: float = 10_000) -> Stateful:
    """The penalty of `kl_reward` with an adaptive coefficient that holds the KL of responses at a target, see `adaptive_kl_update`.

    The coefficient is the carry. A batch is penalised with the coefficient from the batches before it, reported as `kl_coefficient`; the
    KL of the batch then gives the next coefficient.

    Args:
      coefficient: at step 0.
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
    """The next coefficient [] of a KL penalty that holds the KL at a target above 0 (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)

    >>> from alignax.experience.shaping import adaptive_kl_update
    >>> print(f"{adaptive_kl_update(0.1, kl=12.0, target=6.0, horizon=100, n=50):.3f}")  # 0.1 (1 + 0.2 * 50 / 100)
    0.110

    Args:
      beta: the current coefficient, [].
      kl: the mean KL of whole responses under `beta`, in nats, [].
      target: the KL to hold, in nats.
      horizon: samples in which the coefficient may change by a fifth.
      n: samples since the last update.
    """
    return beta * (1.0 + jnp.clip(kl / target - 1.0, -0.2, 0.2) * n / horizon)


def clip_rewards(limit: float) -> Experience:
    """Clips `rewards` [B, N] to [-limit, limit]."""
    check_positive("limit", limit)
    return Partial(_clip_rewards, limit)


def _clip_rewards(limit: float, batch: Batch) -> Batch:
    return batch | {"rewards": jnp.clip(field(batch, "rewards", "score(model), uwo()"), -limit, limit)}


def missing_eos_penalty(penalty: float) -> Experience:
    """Subtracts `penalty` from the `rewards` [B, N] of responses that were cut before their EOS (the field `truncated` [B, N])."""
    return Partial(_missing_eos_penalty, penalty)


def _missing_eos_penalty(penalty: float, batch: Batch) -> Batch:
    cut = of_rollout(batch, "truncated")
    return batch | {"rewards": field(batch, "rewards", "score(model), uwo()") - penalty * cut}


def overlong_penalty(max_length: float, margin: float) -> Experience:
    """Adds DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13) to `rewards` [B, N].

    0 up to max_length - margin tokens, then falling linearly to -1 at max_length, -1 beyond

    >>> batch = {"completion_mask": jnp.array([[[True, True, False], [True, True, True]]]), "rewards": jnp.zeros((1, 2))}
    >>> print(overlong_penalty(max_length=4, margin=2)(batch)["rewards"])
    [[ 0.  -0.5]]

    Args:
      max_length: tokens of the longest completion, EOS included.
      margin: tokens over which the penalty falls, above 0 and at most `max_length`.
    """
    if not 0 < margin <= max_length:
        raise ValueError(f"the margin is {margin} tokens and max_length is {max_length}; the margin must be above 0 and at most max_length")
    return Partial(_overlong_penalty, max_length, margin)


def _overlong_penalty(max_length: float, margin: float, batch: Batch) -> Batch:
    penalty = jnp.clip((max_length - margin - lengths(batch)) / margin, -1.0, 0.0)
    return batch | {"rewards": field(batch, "rewards", "score(model), uwo()") + penalty}


def whiten_rewards(shift_mean: bool = False, eps: float = 1e-8) -> Experience:
    """Scales `token_rewards` [B, N, T] to variance 1 over the completion tokens of the batch, as in the code of Ziegler et al. 2019.

    Use it after `kl_reward`.

    Args:
      shift_mean: whether to shift the mean to 0 too. By default the mean stays, since an offset of every token rewards or punishes length.
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
    """The whitened token rewards [B, N, T] and their mean []; responses whose reward is missing take no part, and do not change."""
    rewards, known = token_rewards(batch), rewarded_tokens(batch)
    white, mean = whiten(rewards, known, eps)
    return jnp.where(batch["completion_mask"] & ~known, rewards, white), mean


def shaping(potential: Callable[[Batch], jax.Array], gamma: float = 1.0) -> Experience:
    """Adds potential-based shaping (Ng et al. 1999) to `token_rewards` [B, N, T], which does not change the best policy.

    r_t + gamma F(s_(t+1)) - F(s_t),   F = 0 after the last token

    >>> batch = {"completion_mask": jnp.ones((1, 1, 3), bool), "rewards": jnp.ones((1, 1))}
    >>> print(shaping(lambda batch: jnp.array([[[0.5, 2.0, 3.0]]]))(batch)["token_rewards"])
    [[[ 1.5  1.  -2. ]]]

    Args:
      potential: batch -> F [B, N, T] before each token is chosen, read at completion tokens, like a critic's values. A potential with
        parameters is a `jax.tree_util.Partial` of them.
      gamma: the same discount as in `gae`.
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
