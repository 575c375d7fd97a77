"""The dictionary of the library: what a batch holds, what a forward pass returns, what training carries.

Dimension letters, everywhere: B prompts, N responses per prompt, T tokens, K ensemble members, L layers, D model, F hidden,
H heads, V vocabulary, M microbatches, R = B * N rows of the forward pass.

A batch is a plain dict of arrays whose leading axis is B. Every method has the same layout: SFT has N = 1, pairs have N = 2
(chosen 0, rejected 1), groups have N = G. A pair never straddles a device or a microbatch.

| field             | shape, type      | meaning                                                                          |
|-------------------|------------------|----------------------------------------------------------------------------------|
| `tokens`          | [B, N, T] int32  | prompt, completion and its EOS                                                   |
| `mask`            | [B, N, T] bool   | real tokens; False is padding                                                    |
| `completion_mask` | [B, N, T] bool   | scored tokens: the completion and its EOS; never position 0                      |
| `margin`          | [B] f32          | `data.columns.margin`: how much better the chosen response is                    |
| `attributes`      | [B, N, L] f32    | `data.columns.attributes`: what people gave a response, of L labels; NaN: not given |
| `ref_logps`       | [B, N, T] f32    | per-token log-probs of the reference (an experience writes them)                 |
| `ref_tokens`      | [B, N, T] int32  | what the reference beside the policy reads in the place of `tokens`              |
| `ref_mask`        | [B, N, T] bool   | the real ones of these                                                           |
| `ensemble_tokens` | [B, N, T'] int32 | what the reward models read in the place of `tokens`: samples, and rows in another |
|                   |                  | format; with `ensemble_mask`, `ensemble_completion_mask` (see `alignax.rewards.judge`)  |
| `old_logps`       | [B, N, T] f32    | those of the policy as it stands before the step (likewise)                      |
| `old_entropy`     | [B, N, T] f32    | entropy of that policy's next-token distributions, nats; of a rollout            |
| `sampled_logps`   | [B, N, T] f32    | those that a completion was sampled with (see `alignax.generate`)                |
| `proxy_logps`     | [B, N, T] f32    | those of the old policy without its noise, -inf of noise; see `alignax.losses.lp_reg` |
| `low_probability` | [B, N, T] bool   | tokens that `lp_reg` may protect                                                 |
| `labels`          | [B, N] bool      | unpaired data: whether a response is desirable                                   |
| `scores`          | [B, N, K] f32    | those of each member of an ensemble of reward models, or each number of reward(..) |
| `rewards`         | [B, N] f32       | reward of a whole response, of several scores their aggregate; NaN is missing    |
| `truncated`       | [B, N] bool      | a sampled response that was cut at its longest, before an EOS                    |
| `prompt_id`       | [B] int32        | which prompt a row is of: of a rollout the row of the data that it stands in     |
| `gold`            | [B, N] f32       | what gold(..) of the experiment says of a sampled response; NaN is missing       |
| `raw_rewards`     | [B, N] f32       | `rewards` before the KL penalty                                                  |
| `group_rewards`   | [B, N] f32       | where others are trained on: the rewards of what was sampled, NaN where unknown  |
| `quantiles`       | [B, N] int32     | of Quark's pool, which a response is of by its reward; 0 the best                |
| `values`          | [B, N, T] f32    | a critic's estimate before tokens[t] is chosen, at completion tokens; of a critic |
|                   |                  | of H heads [B, N, T, H]: of the KL, then of each reward model                    |
| `token_rewards`   | [B, N, T] f32    | reward of each completion token: the penalties, and on the last `rewards`        |
| `advantages`      | [B, N, T] f32    | how much better tokens[t] was than expected; of a group the same in a response   |
| `returns`         | [B, N, T] f32    | what a critic is trained on, at completion tokens; shaped like `values`          |
| `chi2`            | [B] f32          | chi-squared of the policy from its reference, the batch's estimate               |
| `log_target`      | [B, N] f32       | log P of the distribution that f-DPG aims at, not normalised; -inf where P = 0   |
| `log_z`           | [B] f32          | log of its sum over all responses to the prompt, as estimated so far             |
| `fdpg_baseline`   | [B] f32          | mean pseudo-reward of earlier batches                                            |
| `kto_kl`          | [B] f32          | KL(policy || reference) from mismatched responses, at least 0, in nats           |
| `bco_shift`       | [B] f32          | mean log-ratio of the batch, in nats                                             |
| `aot_margins`     | [B] f32          | reference margin of the rank of the policy's, in nats                            |
| `aot_ratios`      | [B, 2] f32       | log-ratio of the other side of the same rank, in nats                            |

A padding row is False in both masks, so it weighs nothing; its further fields are 0. What is not differentiated is data:
reference log-probs, rewards and advantages are further fields, written by experience functions. What only the log reads is none: a
function reports it (`alignax.experience.report`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

Batch = dict[str, jax.Array]
Params = Any  # a pytree of arrays
Metrics = dict[str, jax.Array]


class Outputs(NamedTuple):
    """What a forward pass returns, float32; arrays over tokens are 0 where `completion_mask` is False.

    A model may leave out what is None by default; a loss that reads it says so. What no loss reads is not computed.
    """

    logps: jax.Array  # [B, N, T] log pi(tokens[t] | tokens[<t]), nats; None of a reward model, entropy likewise
    entropy: jax.Array  # [B, N, T] entropy of the distribution that predicted tokens[t], nats
    log_sum_sq: jax.Array | None = None  # [B, N, T] log sum_v pi(v | tokens[<t])^2; carries no gradient
    ref_kl: jax.Array | None = None  # [B, N, T] KL(ref || pi) of the distributions that predict tokens[t], nats
    policy_kl: jax.Array | None = None  # [B, N, T] KL(pi || ref) of the same
    scores: jax.Array | None = None  # [B, N] a reward model's score of each response; [B, N, labels] or, of an ensemble, [B, N, K]
    values: jax.Array | None = None  # [B, N, T] a critic's estimate of what is to come before tokens[t] is chosen; [B, N, T, H] of heads
    jsd: jax.Array | None = None  # [B, N, T] generalised Jensen-Shannon divergence of the same, see alignax.models.statistics.jsd, nats
    statistics: dict[str, jax.Array] = {}  # [B, N, T] of each alignax.models.statistics.Statistic that was asked for, by its name
    hidden: dict[int, jax.Array] = {}  # [B, N, T, D] what each layer that was asked for gives, by its index; in the compute dtype


class Model(NamedTuple):
    """A policy, a reference or a reward model: one pure `apply` and a parameter tree."""

    apply: Callable[[Params, Batch], Outputs]
    params: Params
    giving: Callable[[Any], Callable[[Params, Batch], Outputs]] | None = None  # statistics -> the `apply` whose outputs have them too


@flax.struct.dataclass
class TrainState:
    """All that a training step carries from one step to the next."""

    step: jax.Array  # [] int32: steps taken, skipped ones included; the batch of a step is a function of it
    params: Params
    opt_state: Any
    key: jax.Array  # PRNG key of the run; a step uses `jax.random.fold_in(key, step)`
    skipped: jax.Array  # [] int32: steps whose loss or gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32
    averages: dict[str, Params] = flax.struct.field(default_factory=dict)  # see alignax.averages
    carry: dict[str, Any] = flax.struct.field(default_factory=dict)  # what experience remembers, see alignax.experience.chain


def readings(batch: Batch) -> list[str]:
    """The roles whose models read tokens of their own, which the batch has as `ROLE_tokens`, `ROLE_mask` and `ROLE_completion_mask`."""
    roles = [name.removesuffix("_completion_mask") for name in batch if name.endswith("_completion_mask")]
    return [role for role in roles if f"{role}_tokens" in batch and f"{role}_mask" in batch]


def rows(x: jax.Array) -> jax.Array:
    """Rows of the forward pass: [B, N, ...] -> [B * N, ...]."""
    return x.reshape((x.shape[0] * x.shape[1],) + x.shape[2:])


def microbatch(tree: Any, count: int) -> Any:
    """Splits every leaf's leading axis: [B, ...] -> [count, B / count, ...].

    Rows are dealt out like cards, not cut into blocks: each microbatch then holds rows of every data shard. Cut into blocks, a
    sharded batch would be computed `count` times over.
    """
    return jax.tree.map(lambda x: x.reshape((-1, count) + x.shape[1:]).swapaxes(0, 1), tree)


def gathered(parts: Any) -> Any:
    """What `microbatch` has dealt out, together again: [count, B / count, ...] -> [B, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape((-1, *x.shape[2:])), parts)
