"""The data types of the library: the fields of a batch, the outputs of a forward pass, the state of training.

Dimension letters, everywhere: B prompts, N responses per prompt, T tokens, K ensemble members, L layers, D model, F hidden,
H heads, V vocabulary, M microbatches, R = B * N rows of the forward pass.

A batch is a plain dict of arrays whose leading axis is B. Every method has the same layout: SFT has N = 1, pairs have N = 2
(chosen 0, rejected 1), groups have N = G. The responses of a prompt always lie on one device and in one microbatch.

| field             | shape, type      | meaning                                                                          |
|-------------------|------------------|----------------------------------------------------------------------------------|
| `tokens`          | [B, N, T] int32  | prompt, completion and its EOS                                                   |
| `mask`            | [B, N, T] bool   | real tokens; False is padding                                                    |
| `completion_mask` | [B, N, T] bool   | scored tokens: the completion and its EOS; never position 0                      |
| `margin`          | [B] f32          | `data.columns.margin`: how much better the chosen response is                    |
| `attributes`      | [B, N, L] f32    | `data.columns.attributes`: human ratings of a response on L labels; NaN: not given |
| `ref_logps`       | [B, N, T] f32    | per-token log-probs of the reference (an experience writes them)                 |
| `ref_tokens`      | [B, N, T] int32  | what the reference reads in the place of `tokens`                                |
| `ref_mask`        | [B, N, T] bool   | real tokens of `ref_tokens`                                                      |
| `ensemble_tokens` | [B, N, T'] int32 | what the reward models read in the place of `tokens`, for samples and for rows in |
|                   |                  | another format; with `ensemble_mask`, `ensemble_completion_mask` (see `rewards.judge`) |
| `old_logps`       | [B, N, T] f32    | per-token log-probs of the policy before the step (an experience writes them)    |
| `old_entropy`     | [B, N, T] f32    | entropy of the old policy's next-token distributions, nats; every rollout has it |
| `sampled_logps`   | [B, N, T] f32    | per-token log-probs at sampling time (see `alignax.generate`)                    |
| `proxy_logps`     | [B, N, T] f32    | log-probs of the old policy without its noise, -inf: noise (see `lp_reg`)        |
| `low_probability` | [B, N, T] bool   | tokens that `lp_reg` may protect                                                 |
| `labels`          | [B, N] bool      | unpaired data: whether a response is desirable                                   |
| `scores`          | [B, N, K] f32    | a score from each member of a reward-model ensemble, or each number of reward(..) |
| `rewards`         | [B, N] f32       | reward of a whole response; the aggregate of several scores; NaN: missing        |
| `truncated`       | [B, N] bool      | a sampled response that was cut at the length limit, before an EOS               |
| `prompt_id`       | [B] int32        | number of a row's prompt; in a rollout the row of the data that holds the prompt |
| `gold`            | [B, N] f32       | gold reward of a sampled response, from the experiment's gold(..); NaN: missing  |
| `raw_rewards`     | [B, N] f32       | `rewards` before the KL penalty                                                  |
| `group_rewards`   | [B, N] f32       | rewards of the sampled responses where training uses other ones; NaN: unknown    |
| `quantiles`       | [B, N] int32     | quantile of a response's reward in Quark's pool; 0 is the best                   |
| `values`          | [B, N, T] f32    | a critic's estimate before tokens[t] is chosen, at completion tokens; a critic of |
|                   |                  | H heads gives [B, N, T, H]: first the KL's head, then one for each reward model  |
| `token_rewards`   | [B, N, T] f32    | reward of each completion token: the penalties, plus `rewards` on the last token |
| `advantages`      | [B, N, T] f32    | how much better tokens[t] was than expected; often one number for a response     |
| `returns`         | [B, N, T] f32    | target of a critic, at completion tokens; shaped like `values`                   |
| `chi2`            | [B] f32          | estimate from the batch of chi-squared of the policy from the reference          |
| `log_target`      | [B, N] f32       | log P of f-DPG's target distribution, not normalised; -inf where P = 0           |
| `log_z`           | [B] f32          | log Z, the log of the sum of P over all responses to the prompt; an estimate     |
| `fdpg_baseline`   | [B] f32          | mean pseudo-reward of earlier batches                                            |
| `kto_kl`          | [B] f32          | KL(policy || reference) from mismatched responses, at least 0, in nats           |
| `bco_shift`       | [B] f32          | mean log-ratio of the batch, in nats                                             |
| `aot_margins`     | [B] f32          | margin under the reference of the same rank as the policy's margin, in nats      |
| `aot_ratios`      | [B, 2] f32       | log-ratio of the same rank on the other side (chosen, rejected), in nats         |

A padding row is False in both masks, so it has no weight; its other fields are 0. Everything that is not differentiated is data:
reference log-probs, rewards and advantages are fields, written by experience functions. A number that only the log reads is not a
field: a function reports it (`alignax.experience.report`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

Batch = dict[str, jax.Array]
Params = Any  # a pytree of arrays
Metrics = dict[str, jax.Array]


class Outputs(NamedTuple):
    """The outputs of a forward pass, float32; arrays over tokens are 0 where `completion_mask` is False.

    A model may leave out the outputs that are None by default; a loss that reads one says so. An output that no loss reads is not computed.
    """

    logps: jax.Array  # [B, N, T] log pi(tokens[t] | tokens[<t]), nats; a reward model gives None, and None as its entropy
    entropy: jax.Array  # [B, N, T] entropy of the distribution that predicted tokens[t], nats
    log_sum_sq: jax.Array | None = None  # [B, N, T] log sum_v pi(v | tokens[<t])^2; carries no gradient
    ref_kl: jax.Array | None = None  # [B, N, T] KL(ref || pi) of the distributions that predict tokens[t], nats
    policy_kl: jax.Array | None = None  # [B, N, T] KL(pi || ref) of the distributions that predict tokens[t], nats
    scores: jax.Array | None = None  # [B, N] a reward model's score of each response; [B, N, labels], or [B, N, K] of an ensemble
    values: jax.Array | None = None  # [B, N, T] a critic's estimate of the return before tokens[t] is chosen; H heads: [B, N, T, H]
    jsd: jax.Array | None = None  # [B, N, T] generalised Jensen-Shannon divergence, nats, see alignax.models.statistics.jsd
    statistics: dict[str, jax.Array] = {}  # [B, N, T] each requested alignax.models.statistics.Statistic, by its name
    hidden: dict[int, jax.Array] = {}  # [B, N, T, D] output of each requested layer, by its index; in the compute dtype


class Model(NamedTuple):
    """A policy, a reference or a reward model: one pure `apply` and a parameter tree."""

    apply: Callable[[Params, Batch], Outputs]
    params: Params
    giving: Callable[[Any], Callable[[Params, Batch], Outputs]] | None = None  # statistics -> an `apply` that computes them too


@flax.struct.dataclass
class TrainState:
    """The state that a training step passes to the next one."""

    step: jax.Array  # [] int32: steps taken, skipped ones included; it determines the batch of a step
    params: Params
    opt_state: Any
    key: jax.Array  # PRNG key of the run; a step uses `jax.random.fold_in(key, step)`
    skipped: jax.Array  # [] int32: steps whose loss or gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32
    averages: dict[str, Params] = flax.struct.field(default_factory=dict)  # see alignax.averages
    carry: dict[str, Any] = flax.struct.field(default_factory=dict)  # what the experience remembers, see alignax.experience.chain


def readings(batch: Batch) -> list[str]:
    """The roles whose models read tokens of their own: the batch has `ROLE_tokens`, `ROLE_mask` and `ROLE_completion_mask`."""
    roles = [name.removesuffix("_completion_mask") for name in batch if name.endswith("_completion_mask")]
    return [role for role in roles if f"{role}_tokens" in batch and f"{role}_mask" in batch]


def rows(x: jax.Array) -> jax.Array:
    """Rows of the forward pass: [B, N, ...] -> [B * N, ...]."""
    return x.reshape((x.shape[0] * x.shape[1],) + x.shape[2:])


def microbatch(tree: Any, count: int) -> Any:
    """Splits every leaf's leading axis: [B, ...] -> [count, B / count, ...].

    Rows are dealt out like cards, so each microbatch holds rows of every data shard. A sharded batch that is cut into blocks would be
    computed `count` times over.
    """
    return jax.tree.map(lambda x: x.reshape((-1, count) + x.shape[1:]).swapaxes(0, 1), tree)


def gathered(parts: Any) -> Any:
    """Undoes `microbatch`: every leaf [count, B / count, ...] -> [B, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape((-1, *x.shape[2:])), parts)
