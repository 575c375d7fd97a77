"""Selection of pairs from groups of samples, for losses on preference pairs.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.losses.pairs import field
from alignax.types import Batch


def best_and_worst() -> Experience:
    """Makes pairs [B, 2, ..] of the responses with the highest and the lowest reward of each group, as in online DPO.

    Guo et al. 2024, arXiv:2402.04792.

    Every field [B, N, ..] is reduced to these two responses, so any loss on pairs may follow, for example `dpo()`. Iterated methods take
    several steps on a rollout. A group with equal rewards, or with fewer than two known ones, gets completion masks of False. Of responses
    with equal rewards the first is taken. `group_rewards` [B, N] keeps the rewards of all responses, NaN where unknown.

    >>> batch = {"completion_mask": jnp.ones((1, 3, 1), bool), "rewards": jnp.array([[0.5, 2.0, -1.0]])}
    >>> print(best_and_worst()(batch)["rewards"])
    [[ 2. -1.]]
    """
    return Partial(_best_and_worst)


def _best_and_worst(batch: Batch) -> Batch:
    rewards = field(batch, "rewards", "score(model), mean, best_and_worst()")  # [B, N]
    B, N = rewards.shape
    known = batch["completion_mask"].any(axis=-1) & jnp.isfinite(rewards)
    best = jnp.where(known, rewards, -jnp.inf).argmax(axis=1)
    worst = jnp.where(known, rewards, jnp.inf).argmin(axis=1)
    two = jnp.stack([best, worst], axis=1)  # [B, 2]

    def take(x: jax.Array) -> jax.Array:
        if x.ndim < 2 or x.shape[:2] != (B, N):
            return x
        return jnp.take_along_axis(x, two.reshape(B, 2, *(1,) * (x.ndim - 2)), axis=1)

    pairs = {name: take(x) for name, x in batch.items()}
    differ = (known.sum(axis=1) > 1) & (pairs["rewards"][:, 0] > pairs["rewards"][:, 1])
    kept = {"group_rewards": jnp.where(known, rewards, jnp.nan)}
    return pairs | kept | {"completion_mask": pairs["completion_mask"] & differ[:, None, None]}
