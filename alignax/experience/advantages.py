"""Advantages: how much better a response or a token was than expected.

    chain(logps("ref_logps", reference), kl_reward(0.05), leave_one_out())        # RLOO
    chain(kl_reward(0.05), gae(), whiten_advantages())                           # PPO, with a critic's `values`
    group_relative()                                                             # GRPO
    chain(score(ensemble), gdpo((1.0, 0.5)))                                     # GDPO, for several rewards; for PAMA see pama()

Each function writes `advantages` [B, N, T], 0 outside the completion. A response whose reward is missing (NaN, or not finite), or that
has no completion, has advantage 0 and takes no part in its group's statistics. Statistics are two-pass, over the whole batch that the
experience sees, without padding rows.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience, chain
from alignax.losses.algebra import lengths, sequence
from alignax.losses.pairs import check_positive, field, of_rollout
from alignax.losses.responses import advantages_of
from alignax.types import Batch


def group_relative(std: bool = True, eps: float = 1e-4) -> Experience:
    """Advantages relative to the group, as in GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2). Writes `advantages` [B, N, T].

    (r - mean) / (std + eps),   over the responses to a prompt, std of the sample (ddof 1)

    A group of one, or of equal rewards, has advantages of 0. The division gives all groups the same size however much their rewards
    differ, so nearly solved and nearly hopeless prompts count most. Dr. GRPO leaves it out (Liu et al. 2025, arXiv:2503.20783).

    >>> batch = {"completion_mask": jnp.ones((1, 2, 1), bool), "rewards": jnp.array([[3.0, 1.0]])}  # rewards [B, N]
    >>> print([round(x, 2) for x in group_relative()(batch)["advantages"].ravel().tolist()])
    [0.71, -0.71]
    >>> print(group_relative(std=False)(batch)["advantages"].ravel())
    [ 1. -1.]

    Args:
      std: whether to divide by the standard deviation.
      eps: added to the standard deviation.
    """
    check_positive("eps", eps)  # a group of equal rewards is 0 / eps
    return Partial(_scaled, eps) if std else Partial(_centred)


def _scaled(eps: float, batch: Batch) -> Batch:
    return of_responses(batch, standardised(*_rewards(batch), eps))


def standardised(rewards: jax.Array, valid: jax.Array, eps: float) -> jax.Array:
    """The standardised rewards [B, N]: minus their group's mean, over its standard deviation + eps (ddof 1); 0 where not `valid` [B, N]."""
    centred = _centre(rewards, valid)
    degrees = jnp.maximum(valid.sum(axis=1, keepdims=True) - 1, 1)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / degrees)
    return centred / (std + eps)


def _centred(batch: Batch) -> Batch:
    return of_responses(batch, _centre(*_rewards(batch)))


def batch_scaled(eps: float = 1e-4) -> Experience:
    """Advantages with the group's mean and the batch's deviation (Liu et al. 2025, arXiv:2508.08221). Writes `advantages` [B, N, T].

    (r - mean of the group) / (std of the batch + eps),   std of the sample (ddof 1), over responses

    Groups keep their relative spread: a group of nearly equal rewards counts little, where `group_relative()` enlarges it. It is TRL's
    `scale_rewards="batch"`. REINFORCE++ with a baseline divides by another deviation, that of the centred rewards over tokens:
    `chain(group_relative(std=False), whiten_advantages())`.

    Args:
      eps: added to the deviation.
    """
    check_positive("eps", eps)
    return Partial(_batch_scaled, eps)


def _batch_scaled(eps: float, batch: Batch) -> Batch:
    rewards, valid = _rewards(batch)
    _, std = _moments(rewards, valid)
    return of_responses(batch, _centre(rewards, valid) / (std + eps))


def gdpo(weights: Sequence[float] = (), eps: float = 1e-4) -> Experience:
    """Advantages of several rewards by group reward-decoupled normalisation (GDPO, Liu et al. 2026, arXiv:2601.05242).

    z_k = (r_k - mean) / (std + eps) in each group,   S = sum_k w_k z_k,   advantages (S - mean) / (std + eps) over the batch's responses

    Reads `scores` [B, N, K], writes `advantages` [B, N, T]. If rewards are summed first, responses with different rewards may have equal
    sums, and the reward of the largest scale dominates. Normalising each reward in its group prevents both. Both deviations are of the
    sample (ddof 1). A reward that is equal in a whole group adds nothing there. A missing score (NaN) is left out of its response's sum; a
    response without any score has advantage 0. Put a KL into the loss, since `kl_reward` does not act on `scores`.

    >>> batch = {"completion_mask": jnp.ones((1, 2, 1), bool), "scores": jnp.array([[[1.0, 300.0], [0.0, 100.0]]])}
    >>> print([round(x, 2) for x in gdpo()(batch)["advantages"].ravel().tolist()])
    [0.71, -0.71]

    Args:
      weights: w, one for each score; (): 1 each.
      eps: added to the deviations.
    """
    check_positive("eps", eps)
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"the weights of gdpo() are {tuple(weights)}; give a finite number for each reward")
    return Partial(_gdpo, tuple(weights), eps)


def _gdpo(weights: tuple[float, ...], eps: float, batch: Batch) -> Batch:
    scores = field(batch, "scores", "score(ensemble)")  # [B, N, K]
    K = scores.shape[-1]
    if K == 1:
        raise ValueError("gdpo() needs several rewards, but scores have 1; use chain(mean, group_relative(), whiten_responses())")
    if len(weights) not in (0, K):
        raise ValueError(f"gdpo() has {len(weights)} weights, but scores have {K} rewards; give one weight for each")
    real = batch["completion_mask"].any(axis=-1)
    valid = real[..., None] & jnp.isfinite(scores)
    each = [standardised(jnp.where(valid[..., k], scores[..., k], 0.0), valid[..., k], eps) for k in range(K)]
    total = jnp.stack([w * z for w, z in zip(weights or (1.0,) * K, each, strict=True)]).sum(axis=0)
    known = valid.any(axis=-1)
    return of_responses(batch, _white(total, known, eps))


def leave_one_out() -> Experience:
    """Advantages against the mean of the group's other responses, as in RLOO (Ahmadian et al. 2024, arXiv:2402.14740).

    r_i - mean of r_j over j != i  =  n / (n - 1) (r_i - mean)

    Writes `advantages` [B, N, T]. The baseline does not depend on the response, so the gradient is unbiased. A group of one has
    advantage 0.

    >>> batch = {"completion_mask": jnp.ones((1, 3, 1), bool), "rewards": jnp.array([[3.0, 1.0, 2.0]])}
    >>> print(leave_one_out()(batch)["advantages"].ravel())
    [ 1.5 -1.5  0. ]
    """
    return Partial(_leave_one_out)


def _leave_one_out(batch: Batch) -> Batch:
    rewards, valid = _rewards(batch)
    centred = _centre(rewards, valid)
    n = valid.sum(axis=1, keepdims=True)
    return of_responses(batch, centred * n / jnp.maximum(n - 1, 1))


def gae(gamma: float = 1.0, lam: float = 0.95) -> Experience:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16), and the returns that train a critic.

    d_t = r_t + gamma V_(t+1) - V_t,   A_t = d_t + gamma lam A_(t+1),   returns A_t + V_t

    Reads a critic's `values` [B, N, T] and `token_rewards` [B, N, T] (without them `rewards` [B, N], placed on the last completion token).
    Writes `advantages` and `returns` [B, N, T]. t runs over the completion tokens of a response and skips other tokens between them; V and
    A are 0 after the last one. With a missing reward advantages are 0 and returns equal values.

    >>> batch = {"completion_mask": jnp.ones((1, 1, 2), bool), "rewards": jnp.array([[1.0]]), "values": jnp.array([[[0.5, 0.5]]])}
    >>> out = gae(gamma=1.0, lam=0.5)(batch)
    >>> print(out["advantages"].ravel(), out["returns"].ravel())
    [0.25 0.5 ] [0.75 1.  ]

    Args:
      gamma: discount of each token; below 1 a long response is worth less.
      lam: 1 takes the whole return, without bias by the critic; 0 trusts the critic after one token.
    """
    check_discount("gamma", gamma)
    check_discount("lam", lam)
    return Partial(_gae, gamma, lam)


def _gae(gamma: float, lam: float, batch: Batch) -> Batch:
    mask, known = batch["completion_mask"], rewarded_tokens(batch)
    rewards, values = token_rewards(batch), field(batch, "values", "a critic's values, gae()")
    if values.ndim != mask.ndim:
        raise ValueError(f"gae() takes one value per token, but this critic gives {values.shape[-1]}; set model.critic_heads to 1")

    def back(carry: tuple[jax.Array, jax.Array], at: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        reward, value, here = at  # [B, N] each
        following, advantage = carry  # value and advantage of the next completion token
        new = reward + gamma * following - value + gamma * lam * advantage
        return (jnp.where(here, value, following), jnp.where(here, new, advantage)), jnp.where(here, new, 0.0)

    over_time = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, known))
    nothing = jnp.zeros(mask.shape[:2])
    _, advantages = jax.lax.scan(back, (nothing, nothing), over_time, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return batch | {"advantages": advantages, "returns": jnp.where(mask, advantages + values, 0.0)}


def rewards_to_go(gamma: float = 1.0) -> Experience:
    """Advantages that are the rewards to go, without a baseline: sum over s >= t of gamma^(s - t) r_s at each completion token.

    It is `gae` with lam 1 and values of 0. Writes `advantages` [B, N, T]. With a missing reward they are 0.

    >>> batch = {"completion_mask": jnp.ones((1, 1, 3), bool), "rewards": jnp.array([[1.0]])}
    >>> print(rewards_to_go(gamma=0.5)(batch)["advantages"])
    [[[0.25 0.5  1.  ]]]
    """
    check_discount("gamma", gamma)
    return Partial(_rewards_to_go, gamma)


def _rewards_to_go(gamma: float, batch: Batch) -> Batch:
    ignorant = batch | {"values": jnp.zeros(batch["completion_mask"].shape)}
    return batch | {"advantages": _gae(gamma, 1.0, ignorant)["advantages"]}


def whiten_advantages(eps: float = 1e-8) -> Experience:
    """Whitens `advantages` [B, N, T] over the completion tokens of the batch: (A - mean) / sqrt(var + eps), ddof 1.

    Responses whose reward is missing take no part, and keep 0.

    >>> batch = {"completion_mask": jnp.ones((1, 1, 3), bool), "rewards": jnp.ones((1, 1)), "advantages": jnp.array([[[1.0, 2.0, 3.0]]])}
    >>> print(whiten_advantages()(batch)["advantages"])
    [[[-1.  0.  1.]]]
    """
    check_positive("eps", eps)
    return Partial(_whiten_advantages, eps)


def _whiten_advantages(eps: float, batch: Batch) -> Batch:
    white, _ = whiten(field(batch, "advantages", "gae()"), rewarded_tokens(batch), eps)
    return batch | {"advantages": white}


def whiten_responses(eps: float = 1e-4) -> Experience:
    """Whitens `advantages` [B, N, T] over the responses of the batch: (A - mean) / (std + eps), ddof 1; a long response counts once.

    For advantages of whole responses: `chain(kl_reward(0.05), leave_one_out(), whiten_responses())` is TRL's RLOO with
    `normalize_advantages`. If advantages differ by token, mean and std are those of the responses' mean advantages. Responses whose reward
    is missing take no part, and keep 0.
    """
    check_positive("eps", eps)
    return Partial(_whiten_responses, eps)


def _whiten_responses(eps: float, batch: Batch) -> Batch:
    tokens = rewarded_tokens(batch)
    advantages = jnp.where(tokens, field(batch, "advantages", "leave_one_out()"), 0.0)
    mean, std = _moments(sequence(advantages, batch) / jnp.maximum(lengths(batch), 1.0), tokens.any(axis=-1))
    return batch | {"advantages": jnp.where(tokens, (advantages - mean) / (std + eps), 0.0)}


def top_entropy(share: float = 0.2) -> Experience:
    """Keeps `advantages` [B, N, T] at the tokens of highest entropy, and sets the others to 0 (Wang et al. 2025, arXiv:2506.01939, eq. 5).

    A [H >= tau],   tau the quantile 1 - share of the batch's completion tokens, linear between neighbours

    Tokens at which the policy is undecided determine what follows; the paper trains on a fifth of the tokens. The loss is still averaged
    over all tokens, so the gradient is a part of the full one, and a KL in the loss is over all tokens. H is the entropy of the policy
    before the step, the field `old_entropy` [B, N, T], which every rollout has.

    Args:
      share: of the completion tokens, in (0, 1]; 1 keeps all.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share is {share}; it must be a share of tokens, in (0, 1] (the paper uses 0.2)")
    return Partial(_top_entropy, share)


def _top_entropy(share: float, batch: Batch) -> Batch:
    mask, entropy = batch["completion_mask"], of_rollout(batch, "old_entropy")
    tau = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1 - share)  # NaN without a token
    return batch | {"advantages": jnp.where(mask & (entropy >= tau), advantages_of(batch), 0.0)}


def reinforce_plus_plus(gamma: float = 1.0) -> Experience:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): rewards to go, whitened over the batch, without a critic or groups.

    Writes `advantages` [B, N, T]. The KL is in the reward: `chain(kl_reward(0.01), reinforce_plus_plus())`. The paper's second form has the
    group's mean as baseline: `chain(group_relative(std=False), whiten_advantages())`.
    """
    return chain(rewards_to_go(gamma), whiten_advantages())


def check_discount(name: str, value: float) -> None:
    """Refuses a discount outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be a discount, in [0, 1]")


def whiten(x: jax.Array, mask: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Whitens x where `mask` is True, else gives 0: (x - mean) / sqrt(var + eps), and the mean [].

    Two-pass; var is of the sample (ddof 1). x and mask have one shape.
    """
    count = mask.sum()
    mean = jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1)
    centred = jnp.where(mask, x - mean, 0.0)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
    return centred / jnp.sqrt(variance + eps), mean


def last_scored(batch: Batch) -> jax.Array:
    """True at the last completion token of each response: [B, N, T] bool."""
    mask = batch["completion_mask"]
    return mask & (jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1) == 1)


def token_rewards(batch: Batch) -> jax.Array:
    """The field `token_rewards` [B, N, T]; without it, `rewards` [B, N] on the last completion token of each response."""
    if "token_rewards" in batch:
        return batch["token_rewards"]
    return jnp.where(last_scored(batch), field(batch, "rewards", "score(model), uwo()")[..., None], 0.0)


def rewarded_tokens(batch: Batch) -> jax.Array:
    """True at the completion tokens of responses without a missing reward: [B, N, T] bool."""
    return batch["completion_mask"] & jnp.isfinite(sequence(token_rewards(batch), batch))[..., None]


def _rewards(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The rewards, 0 where missing, and a mask that is True where they are known: [B, N] each."""
    rewards = field(batch, "rewards", "score(model), uwo()")
    valid = batch["completion_mask"].any(axis=-1) & jnp.isfinite(rewards)
    return jnp.where(valid, rewards, 0.0), valid


def _moments(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and standard deviation (ddof 1) of the valid entries of the whole batch: [] each; two-pass."""
    count = valid.sum()
    mean = jnp.where(valid, x, 0.0).sum() / jnp.maximum(count, 1)
    return mean, jnp.sqrt(jnp.where(valid, jnp.square(x - mean), 0.0).sum() / jnp.maximum(count - 1, 1))


def _white(x: jax.Array, valid: jax.Array, eps: float) -> jax.Array:
    mean, std = _moments(x, valid)
    return jnp.where(valid, (x - mean) / (std + eps), 0.0)


def _centre(rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """The rewards [B, N] minus their group's mean, 0 where not valid."""
    mean = rewards.sum(axis=1, keepdims=True) / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    # Rounding may move the mean of equal rewards off them, and dividing by their tiny standard deviation would enlarge that.
    low = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1, keepdims=True)
    equal = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1, keepdims=True) <= low
    return jnp.where(valid & ~equal, rewards - mean, 0.0)


def of_responses(batch: Batch, advantages: jax.Array) -> Batch:
    """The batch with `advantages` [B, N, T]: each response's advantage [B, N] at all of its completion tokens."""
    return batch | {"advantages": jnp.where(batch["completion_mask"], advantages[..., None], 0.0)}
