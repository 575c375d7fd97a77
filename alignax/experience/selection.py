"""From groups to pairs: what offline losses are trained on, made of samples."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.losses.pairs import field
from alignax.types import Batch


def best_and_worst() -> Experience:
    """Pairs [B, 2, ..] of each group's responses of the highest and of the lowest reward, as online DPO has them.

    Guo et al. 2024, arXiv:2402.04792.

    Every field [B, N, ..] keeps these two, so any loss of pairs follows, `dpo()` say; iterated methods take several steps on a rollout.
    A group whose rewards are equal, or of which fewer than two are known, has nothing to say: its completion masks are False.
    Of equal rewards the first response counts. `group_rewards` [B, N] keeps the rewards of all, NaN where unknown.
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
