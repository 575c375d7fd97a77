"""The reference point of KTO: the KL of the policy from the reference, estimated on mismatched prompts and responses.

The policy was not trained on the response of another prompt, for or against it. So the log-ratio of such a response measures how far the
policy has moved from the reference in general (Ethayarajh et al. 2024, arXiv:2402.01306).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.experience.chain import Experience
from alignax.experience.logps import logps
from alignax.losses.algebra import examples, sequence
from alignax.types import Batch, Model, Outputs, Params


def mismatched_kl(policy: Model, reference: Model, microbatches: int = 1) -> Experience:
    """Writes `kto_kl` [B] f32, the same for every row: max(0, mean of log pi/ref), over each prompt with the next row's completion.

    The next row is that of the global batch, among rows with a completion; the last row takes the first one's. Pairs of rows that share
    their prompt or their completion are left out. If nothing is left, as in a batch of one row, the estimate is 0, and KTO equals
    `apo_zero_unpaired`. A completion is cut where its new row ends.

    It costs a forward pass of each model.

    Args:
      policy: at this step; no gradient goes into it.
      reference: the frozen reference.
      microbatches: number of parts of the rows that are scored one after another, to bound memory.

    Raises:
      ValueError: for examples with several responses.
    """
    return Partial(_MismatchedKL(microbatches, policy.apply, reference.apply), policy.params, reference.params)


@dataclasses.dataclass(frozen=True)
class _MismatchedKL:
    """The static part of `mismatched_kl`."""

    microbatches: int
    policy: Callable[[Params, Batch], Outputs]
    reference: Callable[[Params, Batch], Outputs]

    def __call__(self, policy_params: Params, ref_params: Params, batch: Batch) -> Batch:
        mixed, valid = mismatched(batch)
        mixed = logps("old_logps", Model(self.policy, policy_params), self.microbatches)(mixed)
        mixed = logps("ref_logps", Model(self.reference, ref_params), self.microbatches)(mixed)
        ratio = sequence(mixed["old_logps"] - mixed["ref_logps"], mixed)[:, 0]  # [B]
        mean = jnp.where(valid, ratio, 0.0).sum() / jnp.maximum(valid.sum(), 1)
        return batch | {"kto_kl": jnp.full(valid.shape, jnp.maximum(mean, 0.0))}


def mismatched(batch: Batch) -> tuple[Batch, jax.Array]:
    """Makes rows of each prompt with the next real row's completion, and says which of them are mismatches: [B] bool.

    Returns:
      A batch of `tokens`, `mask` and `completion_mask` [B, 1, T], where rows that are not mismatches are padding; and the mismatches [B].
    """
    B, N, T = batch["tokens"].shape
    if N != 1:
        raise ValueError(f"mismatched_kl takes single responses, but these examples have {N} responses per prompt; give data with labels")
    tokens, mask, scored = (batch[name][:, 0] for name in ("tokens", "mask", "completion_mask"))  # [B, T]
    real = examples(batch)  # [B]
    order = jnp.argsort(~real, stable=True)  # real rows first
    after = jnp.roll(order, -1).at[real.sum() - 1].set(order[0])
    partner = jnp.zeros(B, jnp.int32).at[order].set(after)  # [B]
    begin = mask.argmax(axis=1, keepdims=True)  # [B, 1] first token, first scored token
    split = scored.argmax(axis=1, keepdims=True)
    t = jnp.arange(T)[None]
    prompt = split - begin  # tokens of the prompt
    own, other = begin + t, split[partner] + t - prompt  # [B, T] places that each new token comes from
    is_prompt = t < prompt
    take = lambda x: jnp.where(
        is_prompt,
        jnp.take_along_axis(x, jnp.minimum(own, T - 1), axis=1),
        jnp.take_along_axis(x[partner], jnp.clip(other, 0, T - 1), axis=1),
    )
    inside = is_prompt | (other < T)
    new_mask, new_scored = take(mask) & inside, take(scored) & inside & ~is_prompt
    new_tokens = jnp.where(new_mask, take(tokens), 0)
    # The old rows, aligned to the left, are compared with the new ones: a new row that equals one of its two sources is no mismatch.
    shift = lambda x: jnp.take_along_axis(x, jnp.minimum(own, T - 1), axis=1)
    aligned_mask = shift(mask) & (own < T)
    aligned = jnp.where(aligned_mask, shift(tokens), 0)
    same = lambda x, m: ((x == new_tokens) & (m == new_mask)).all(axis=1)
    valid = real & ~same(aligned, aligned_mask) & ~same(aligned[partner], aligned_mask[partner])
    keep = lambda m: (m & valid[:, None])[:, None]
    return {"tokens": new_tokens[:, None], "mask": keep(new_mask), "completion_mask": keep(new_scored)}, valid
