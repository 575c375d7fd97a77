"""Selection of the tokens that `lp_reg` may protect: the least likely tokens with a negative advantage.

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.losses.pairs import field
from alignax.losses.responses import advantages_of
from alignax.types import Batch


def low_probability_tokens(share: float = 0.01) -> Experience:
    """Writes `low_probability` [B, N, T] bool: the least likely share of the batch's completion tokens with A < 0.

    Reads `advantages` and `old_logps` [B, N, T]. Of n tokens with A < 0 the floor(share * n) least likely are selected; none if that is 1.
    The released code ranks by the current policy in each microbatch; here the ranks are data, over the whole batch.

    >>> batch = {"completion_mask": jnp.ones((1, 1, 4), bool), "advantages": -jnp.ones((1, 1, 4))}
    >>> batch["old_logps"] = jnp.array([[[-9.0, -1.0, -8.0, -2.0]]])
    >>> print(low_probability_tokens(0.5)(batch)["low_probability"])
    [[[ True False  True False]]]

    Args:
      share: rho, in [0, 1]; the paper's are 0.01 and 0.005.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share is {share}; it must be a share of tokens, in [0, 1] (the paper uses 0.01)")
    return Partial(_low_probability_tokens, share)


def _low_probability_tokens(share: float, batch: Batch) -> Batch:
    worse = batch["completion_mask"] & (advantages_of(batch) < 0)
    old = jnp.where(worse, field(batch, "old_logps", 'logps("old_logps", policy)'), jnp.inf)
    order = jnp.argsort(old.ravel(), stable=True)
    rank = jnp.zeros(old.size, jnp.int32).at[order].set(jnp.arange(old.size, dtype=jnp.int32)).reshape(old.shape)
    count = jnp.floor(share * worse.sum())
    return batch | {"low_probability": worse & (rank < jnp.where(count > 1, count, 0))}
