"""The program of online training: experience runs once for a rollout, then the shared step runs on each minibatch of it.

A rollout of B = minibatches x batch_size prompts is trained on in minibatches x epochs steps. The first epoch keeps the order of the
prompts, each further epoch has a random order of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignax import mesh as meshes
from alignax.averages import PROPOSAL, averaged
from alignax.config import PRETRAIN, ROLLOUTS, steps_of_turn
from alignax.experience import advance
from alignax.experience.chain import with_reported
from alignax.experience.logps import in_parts
from alignax.generate import sampler_gap
from alignax.host.functions import names_of
from alignax.losses.algebra import Loss, Objectives, by_name, lengths, sequence
from alignax.reading import Noting
from alignax.run.prepare import Run
from alignax.run.roles import policy_model
from alignax.run.state import Held, make_experience, off_policy
from alignax.run.steps import objectives, taught_apply
from alignax.train import Apply, make_step
from alignax.types import Batch, Metrics, Outputs, TrainState, microbatch, readings

LAST = ("skipped_total", "skipped_in_a_row", "learning_rate")  # metrics that are states: the last step's value counts


def make_learn(run: Run) -> Callable[[TrainState, Held, dict[str, Batch]], tuple[TrainState, Metrics]]:
    """The program of online training, `(state, frozen, batches) -> (state, metrics)`; metrics are means over its steps.

    The batches are `rollouts` [B, N, ..] and, with pretraining data, `pretrain`, which has one batch for every step on its first axis. With
    `log.rollouts` the metric `shown` is the result of `first_responses`.
    """
    c, after, learning = run.config, averaged(run.learning.averages), run.learning

    def learn(state: TrainState, frozen: Held, batches: dict[str, Batch]) -> tuple[TrainState, Metrics]:
        batch, further = batches[ROLLOUTS], {name: x for name, x in batches.items() if name != ROLLOUTS}
        parts = c.rollout.minibatches * c.microbatches
        once = reads_once(run, state, frozen, batch)
        if once:
            metrics, (carry, batch, reported) = {}, advance(make_experience(run, frozen, state), state.carry, batch)
        else:
            carry, batch, metrics, reported = experienced(run, state, frozen, batch, parts)
        state = dataclasses.replace(state, carry=carry)
        losses = objectives(run, frozen, state)
        apply = taught_apply(run, frozen, losses)
        options: Any = {"combine": run.experiment.combine, "packing": run.packing, "gradient_dtype": c.optimizer.gradient_dtype}
        train_step = make_step(apply, losses, learning.optimizer, c.microbatches, once, **options)
        if off_policy(run):
            own = {name: loss for name, loss in losses.items() if name != PRETRAIN}
            check_corrected(apply, own, state, batch, c.rollout.minibatches)

        def step(state: TrainState, part: dict[str, Batch]) -> tuple[TrainState, Metrics]:
            rate = learning.schedule(state.step - state.skipped)
            state, metrics, *out = train_step(state, {name: part.get(name, part[ROLLOUTS]) for name in losses})
            metrics = (scored(run, part[ROLLOUTS], out[0]) if once else {}) | metrics
            return after(state), metrics | {"learning_rate": jnp.asarray(rate)}

        def epoch(state: TrainState, given: tuple[jax.Array | None, dict[str, Batch]]) -> tuple[TrainState, Metrics]:
            order, beside = given
            taken = batch if order is None else jax.tree.map(lambda x: x[order], batch)
            return jax.lax.scan(step, state, {ROLLOUTS: microbatch(taken, c.rollout.minibatches)} | beside)

        beside = jax.tree.map(lambda x: x.reshape((c.rollout.epochs, -1, *x.shape[1:])), further)
        state, found = epoch(state, (None, jax.tree.map(lambda x: x[0], beside)))
        if c.rollout.epochs > 1:
            key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 3)
            draw = lambda i: jax.random.permutation(jax.random.fold_in(key, i), batch["tokens"].shape[0])
            orders = jax.vmap(draw)(jnp.arange(c.rollout.epochs - 1))
            state, more = jax.lax.scan(epoch, state, (orders, jax.tree.map(lambda x: x[1:], beside)))
            found = jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape((-1, *a.shape[1:]))]), found, more)
        shown: dict[str, Any] = {"shown": first_responses(run, batch)} if c.log.rollouts else {}
        tokens = c.rollout.epochs * batch["mask"].sum(dtype=jnp.float32)
        tokens += sum(x["mask"].sum(dtype=jnp.float32) for x in further.values())
        return state, with_reported(metrics | pooled(found) | {"tokens": tokens} | shown, reported)

    return learn


def first_responses(run: Run, batch: Batch) -> Batch:
    """The first b groups of a rollout as it is trained on, `log.rollouts` responses or more, replicated on every device.

    The fields are `tokens`, `mask`, `completion_mask` [b, N, T] and `prompt_id` [b]; if the rollout has them, `reward` (before any KL
    penalty), `advantage` (the mean over scored tokens) and `truncated` [b, N]; if `reward(..)` gives several numbers, `scores` [b, N, K].
    """
    groups = -(-run.config.log.rollouts // batch["tokens"].shape[1])
    out = {name: batch[name] for name in ("tokens", "mask", "completion_mask", "prompt_id", "truncated") if name in batch}
    if "rewards" in batch:
        out["reward"] = batch.get("raw_rewards", batch["rewards"])
    if names_of(run.experiment):
        out["scores"] = batch["scores"]
    if "advantages" in batch:
        total = jnp.where(batch["completion_mask"], batch["advantages"], 0.0).sum(axis=-1)
        out["advantage"] = total / jnp.maximum(lengths(batch), 1)
    whole = meshes.sharding(run.mesh)
    return {name: jax.lax.with_sharding_constraint(x[:groups], whole) for name, x in out.items()}


def check_corrected(apply: Apply, objective: Objectives, state: TrainState, batch: Batch, minibatches: int) -> None:
    """Refuses a loss of another policy's samples that does not read `sampled_logps`; traces the loss on shapes alone."""
    name, read = "sampled_logps", set()

    def look(state: TrainState, batch: Batch) -> list[jax.Array]:
        part = jax.tree.map(lambda x: x[0], microbatch(Noting(batch, frozenset({name}), read.add), minibatches))
        return values(apply, [loss.trained() for loss in by_name(objective, state.step).values()], state, part)

    jax.eval_shape(look, state, batch)
    if not read:
        raise ValueError(
            "rollouts are sampled from another distribution than that of the policy that learns from them (rollout.ahead, rollout.int8, "
            f"rollout.top_p below 1, speaker(..), sampler(..), or the average {PROPOSAL!r}), but the loss does not read {name}; correct "
            "the loss, as in importance_weighted(grpo())"
        )


def reads_once(run: Run, state: TrainState, frozen: Held, batch: Batch) -> bool:
    """Whether a rollout needs no forward pass of the policy beside the training step's own; traced on shapes alone.

    True if all of this holds: the rollout is on-policy and has a single step, so all ratios are 1; there is no critic; neither the
    experience nor the loss reads `old_logps` or `old_entropy`; and the experience keeps the sampled responses.
    """
    if steps_of_turn(run.config) > 1 or off_policy(run) or run.config.model.critic:
        return False
    kept, read = [], set()

    def look(state: TrainState, frozen: Held, batch: Batch) -> list[jax.Array]:
        before = dict.fromkeys(("old_logps", "old_entropy"), jnp.zeros(batch["mask"].shape))
        noting = Noting(batch | before, frozenset(before), read.add)
        _, after, _ = advance(make_experience(run, frozen, state), state.carry, noting)
        kept.extend(after[name] is batch[name] for name in ("tokens", "mask", "completion_mask"))
        own = {name: loss for name, loss in objectives(run, frozen, state).items() if name != PRETRAIN}
        return values(taught_apply(run, frozen, own), by_name(own, state.step).values(), state, after)

    jax.eval_shape(look, state, frozen, batch)
    return all(kept) and not read


def values(apply: Apply, losses: Iterable[Loss], state: TrainState, batch: Batch) -> list[jax.Array]:
    """The values of several losses on a batch, each []."""
    out = apply(state.params, batch)
    return [loss(out, batch, loss.normalised(batch))[0] for loss in losses]


def make_judge(run: Run) -> Callable[[TrainState, Held, Batch], Metrics]:
    """The program that judges samples by experience and reference, `(state, frozen, samples) -> metrics`, each [].

    `reward_se` is the standard error of `reward`, from the means per prompt (ddof 1); NaN for a single prompt.
    """

    def judge(state: TrainState, frozen: Held, batch: Batch) -> Metrics:
        _, batch, metrics, _ = experienced(run, state, frozen, batch, 1)
        if "rewards" not in batch:
            return metrics
        x, known = known_rewards(batch)
        count, real = known.sum(axis=1), known.any(axis=1)  # [B]
        each = jnp.where(real, x.sum(axis=1) / jnp.maximum(count, 1), 0.0)
        n = real.sum()
        squares = jnp.where(real, jnp.square(each - each.sum() / jnp.maximum(n, 1)), 0.0).sum()
        return metrics | {"reward_se": jnp.sqrt(squares / (n - 1) / n)}

    return judge


def experienced(run: Run, state: TrainState, frozen: Held, batch: Batch, parts: int) -> tuple[dict[str, Any], Batch, Metrics, Metrics]:
    """The next carry, the rollout after experience, metrics of the rollout, and metrics that the experience reports.

    The policy's forward pass, in `parts` parts, first adds `old_logps`, `old_entropy` and a critic's `values` to the rollout.
    """
    policy = policy_model(run.roles, frozen, state.params, run.packing)
    out = in_parts(lambda part: policy.apply(policy.params, part), batch, parts, policy.apply)
    sampled = scored(run, batch, out)  # before experience, which may replace the responses
    batch = batch | {"old_logps": out.logps, "old_entropy": out.entropy} | ({} if out.values is None else {"values": out.values})
    carry, batch, reported = advance(make_experience(run, frozen, state), state.carry, batch)
    return carry, batch, sampled | measured(batch, off_policy(run), names_of(run.experiment), outside(run)), reported


def scored(run: Run, batch: Batch, out: Outputs) -> Metrics:
    """Metrics of a rollout and of the policy's outputs `out` for it."""
    own = measured(batch | {"old_logps": out.logps}, off_policy(run), names_of(run.experiment), outside(run))
    return own | {"entropy": per_token(out.entropy, batch)}


def outside(run: Run) -> bool:
    """Whether `sampler(..)` of the experiment samples the rollouts."""
    return run.experiment.sampler is not None


def measured(batch: Batch, other: bool = False, names: Sequence[str] = (), external: bool = False) -> Metrics:
    """Metrics of a rollout, each [], over responses with a scored token.

    `sampler_kl`, if another policy sampled the rollout (`other`): an estimate of KL(sampler || policy) in nats, summed over a response.
    Importance weights then correct `kl` and `kl_k3`. `sampler_gap`, if the policy itself sampled, or a sampler outside of alignax
    (`external`): the largest difference between log-probs at sampling time and in the policy's forward pass.

    `kl` and `kl_k3`: estimates of KL(policy || reference) in nats, summed over a response (Schulman 2020, "Approximating KL
    divergence"): k1 = sum_t lr and k3 = sum_t exp(-lr) - 1 + lr, lr = log pi - log ref; both unbiased, k1 signed, k3 >= 0.
    `reward`: the mean over responses, NaN if none has a reward. `reward_std`: the mean standard deviation within a group (ddof 0).
    `bad_rewards`: the number of responses without a reward. `signal_rate`: the share of groups whose rewards differ.
    `score/member_k`, `disagreement`: mean score of each ensemble member, and the members' mean standard deviation (ddof 0).
    `score/NAME`: mean of each number of `reward(..)`, with a name of `names`, over the responses that have it.
    `judge_cut`: the number of responses whose end the reward models do not read.
    """
    real = batch["completion_mask"].any(axis=-1)  # [B, N]
    mean = lambda x: jnp.where(real, x, 0.0).sum() / jnp.maximum(real.sum(), 1)
    out: Metrics = {"scored_rate": real.mean()}
    weights = jnp.ones(real.shape)  # [B, N] pi / sampler
    if "sampled_logps" in batch and other:
        distance = sequence(batch["sampled_logps"] - batch["old_logps"], batch)
        out["sampler_kl"] = mean(distance)
        # A softmax gives weights with mean 1 that stay finite however far apart the two policies are.
        weights = real.sum() * jax.nn.softmax(jnp.where(real, -distance, -jnp.inf), axis=None)
    if "sampled_logps" in batch and (external or not other):
        out["sampler_gap"] = sampler_gap(batch["old_logps"], batch)
    if "ref_logps" in batch:
        lr = jnp.where(batch["completion_mask"], batch["old_logps"] - batch["ref_logps"], 0.0)
        out |= {"kl": mean(weights * lr.sum(axis=-1)), "kl_k3": mean(weights * (jnp.expm1(-lr) + lr).sum(axis=-1))}
    if "rewards" in batch:
        group, known = known_rewards(batch)
        count = jnp.maximum(known.sum(axis=1, keepdims=True), 1)
        centred = jnp.where(known, group - group.sum(axis=1, keepdims=True) / count, 0.0)
        out["reward"] = jnp.where(known.any(), group.sum() / jnp.maximum(known.sum(), 1), jnp.nan)
        out["bad_rewards"] = (real & ~jnp.isfinite(batch["rewards"])).sum()
        if known.shape[1] > 1:
            highest, lowest = (jnp.where(known, group, x) for x in (-jnp.inf, jnp.inf))
            out["signal_rate"] = (highest.max(axis=1) > lowest.min(axis=1)).mean()
        out["reward_std"] = jnp.sqrt(jnp.square(centred).sum(axis=1) / count[:, 0]).mean()
    if names:
        known = real[..., None] & jnp.isfinite(batch["scores"])  # [B, N, K]
        each = jnp.where(known, batch["scores"], 0.0).sum(axis=(0, 1)) / known.sum(axis=(0, 1))  # NaN (0 / 0) if no response has the number
        out |= {f"score/{name}": each[k] for k, name in enumerate(names)}
    elif "scores" in batch and batch["scores"].shape[-1] > 1:
        out |= {f"score/member_{k}": mean(batch["scores"][..., k]) for k in range(batch["scores"].shape[-1])}
        out["disagreement"] = mean(batch["scores"].std(axis=-1))
    if cut := [batch[name] for role in readings(batch) if (name := f"{role}_cut") in batch]:
        out["judge_cut"] = (functools.reduce(jnp.logical_or, cut) & real).sum()
    if "advantages" in batch:
        out["advantage_mean"] = per_token(batch["advantages"], batch)
        out["advantage_std"] = jnp.sqrt(per_token(jnp.square(batch["advantages"] - out["advantage_mean"]), batch))
    return out


def known_rewards(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Rewards [B, N] of all sampled responses before any KL penalty, 0 where unknown, and the mask [B, N] of the known ones."""
    rewards = batch.get("raw_rewards", batch["rewards"])
    rewards = batch.get("group_rewards", jnp.where(batch["completion_mask"].any(axis=-1), rewards, jnp.nan))
    known = jnp.isfinite(rewards)
    return jnp.where(known, rewards, 0.0), known


def per_token(x: jax.Array, batch: Batch) -> jax.Array:
    """The mean of x [B, N, T] over scored tokens: []."""
    return jnp.where(batch["completion_mask"], x, 0.0).sum() / jnp.maximum(lengths(batch).sum(), 1)


def pooled(metrics: Metrics) -> Metrics:
    """One value for each metric [U] of U steps: its mean; for `skipped` the sum, for `finite/` whether all are, for states the last."""
    out = {}
    for name, x in metrics.items():
        out[name] = x[-1] if name in LAST else x.all() if name.startswith("finite/") else x.sum() if name == "skipped" else jnp.mean(x)
    return out
