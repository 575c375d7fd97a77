"""The training step and the evaluation of a run, with experience first, as pure functions of state, frozen parameters and batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignax.averages import averaged
from alignax.config import DATA, asked
from alignax.experience import advance
from alignax.experience.chain import with_reported
from alignax.generate import policy_config, sampler_gap
from alignax.losses.algebra import Objective, statistics_of
from alignax.packing import part_by_part
from alignax.run.prepare import Run, by_batch
from alignax.run.roles import REFERENCE, Role, frozen_model, make_apply, policy_apply, whole
from alignax.run.state import Held, given_models, make_experience
from alignax.train import Apply, make_evaluation, make_step
from alignax.types import Batch, Metrics, Model, Outputs, Params, TrainState


def objectives(run: Run, held: Held, state: TrainState) -> dict[str, Objective]:
    """The losses of a run by the name of their batch, made with the models that they ask for."""
    names = asked(run.experiment.loss)[1:]  # the first parameter is the config
    if not names:
        return run.learning.objectives
    given = given_models(run, held, state)
    return by_batch(run.config, run.experiment.loss(run.config, **{name: given[name] for name in names}))


def taught_apply(run: Run, held: Held, losses: Mapping[str, Objective]) -> Apply:
    """The policy's forward pass for training, with the statistics that the losses read.

    With `reference.token_kl` it runs the reference, too, and computes the KL between the two.
    """
    role, wanted = run.policy, statistics_of(*losses.values())
    if not run.config.reference.token_kl:
        return policy_apply(run.roles, held, role.giving(wanted))
    teacher = run.roles[REFERENCE]
    forward = make_apply(role.config, run.config, role.dtype, run.mesh, (teacher.config, held[teacher.tree]), wanted)
    return policy_apply(run.roles, held, forward)


def make_data_step(run: Run) -> Callable[[TrainState, Held, dict[str, Batch]], tuple[TrainState, Metrics]]:
    """The program of training on data, `(state, frozen, batches) -> (state, metrics)`: one step on the batch called "data"."""
    after, learning = averaged(run.learning.averages), run.learning

    def step(state: TrainState, held: Held, batches: dict[str, Batch]) -> tuple[TrainState, Metrics]:
        rate = learning.schedule(state.step - state.skipped)
        losses = objectives(run, held, state)
        apply, combine = taught_apply(run, held, losses), run.experiment.combine
        options: Any = {"combine": combine, "packing": run.packing, "gradient_dtype": run.config.optimizer.gradient_dtype}
        train_step = make_step(apply, losses, learning.optimizer, run.config.microbatches, **options)
        carry, batch, reported = advance(make_experience(run, held, state), state.carry, batches[DATA])
        state, metrics = train_step(dataclasses.replace(state, carry=carry), dict.fromkeys(losses, batch))
        state = after(state)
        metrics |= {"learning_rate": jnp.asarray(rate), "tokens": batch["mask"].sum(dtype=jnp.float32)}
        return state, with_reported(metrics, reported)

    return step


def make_evaluate(run: Run) -> Callable[[TrainState, Held, Batch], tuple[Any, Outputs]]:
    """The program that evaluates a batch of data: `(state, frozen, batch) -> (sums, Outputs)`, see `alignax.train.make_evaluation`."""

    def evaluate(state: TrainState, held: Held, batch: Batch) -> tuple[Any, Outputs]:
        _, batch, _ = advance(make_experience(run, held, state), state.carry, batch)
        losses = objectives(run, held, state)
        out = part_by_part(taught_apply(run, held, losses), run.packing)(state.params, batch)
        return make_evaluation(lambda out, batch: out, losses.get(DATA, losses))(out, state.step, batch), out

    return evaluate


def make_score(run: Run, role: Role) -> Callable[[Params, Batch], jax.Array]:
    """The program that scores samples with a frozen model, `(parameters, batch) -> array`, float32.

    The array is scores [B, N, K] of reward models, or log-probs [B, N, T] of a language model.
    """

    apply = frozen_model(role, None, run.packing).apply

    def score(params: Params, batch: Batch) -> jax.Array:
        out = apply(params, batch)
        return out.logps if out.scores is None else out.scores

    return score


def make_compare(run: Run) -> Callable[[Params, Held, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """The program that runs `compare` on an evaluation's samples, `(trained, frozen, batch) -> (k1, k3, gap)`.
    Both models have the distribution of the sampler: at `eval.temperature`, over the tokens of the tokenizer.
    """
    spoken = lambda role: policy_config(role.config, run.config.eval.temperature, run.words.unused)
    apply = lambda role: part_by_part(make_apply(spoken(role), run.config, run.policy.dtype, run.mesh), run.packing)

    def program(params: Params, held: Held, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        reference = run.roles[REFERENCE]
        policy = Model(apply(run.policy), whole(run.roles, held, params))
        return compare(policy, Model(apply(reference), held[reference.tree]), batch)

    return program


def compare(policy: Model, reference: Model, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The estimates k1 and k3 of KL(policy || reference) for each sampled completion, [B, N] each, in nats, and the sampler's gap [].

    k1 = sum_t lr and k3 = sum_t exp(-lr) - 1 + lr, lr = log pi - log ref, over the tokens of a completion; both unbiased, k1 signed,
    k3 >= 0 (Schulman 2020, "Approximating KL divergence"). The gap is between log-probs of sampler and forward pass, see `sampler_gap`.

    Args:
      policy: the model that sampled the completions.
      reference: the other model of the KL.
      batch: completions [B, N, T] with their `sampled_logps`.
    """
    logps = policy.apply(policy.params, batch).logps
    lr = logps - reference.apply(reference.params, batch).logps  # [B, N, T], 0 outside completions
    return lr.sum(-1), (jnp.expm1(-lr) + lr).sum(-1), sampler_gap(logps, batch)
