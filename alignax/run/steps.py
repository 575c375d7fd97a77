"""The training step and the evaluation of a run, each behind its experience, as pure functions of state, frozen parameters and batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignax.averages import averaged
from alignax.config import DATA, asked
from alignax.experience import advance
from alignax.experience.chain import with_reported
from alignax.losses.algebra import Objective, statistics_of
from alignax.run.prepare import Run, by_batch
from alignax.run.roles import REFERENCE, Role, make_apply, policy_apply
from alignax.run.state import Held, given_models, make_experience
from alignax.train import Apply, make_evaluation, make_step
from alignax.types import Batch, Metrics, Outputs, Params, TrainState


def objectives(run: Run, held: Held, state: TrainState) -> dict[str, Objective]:
    """The losses of a run by the batch that each is of, made of the models that they ask for."""
    names = asked(run.experiment.loss)[1:]  # the first is the config
    if not names:
        return run.learning.objectives
    given = given_models(run, held, state)
    return by_batch(run.config, run.experiment.loss(run.config, **{name: given[name] for name in names}))


def taught_apply(run: Run, held: Held, losses: Mapping[str, Objective]) -> Apply:
    """The forward pass that is trained: the policy's, with the statistics that the losses read.

    The reference is at its side where `reference.token_kl` asks for their KL.
    """
    role, wanted = run.policy, statistics_of(*losses.values())
    if not run.config.reference.token_kl:
        return policy_apply(run.roles, held, role.giving(wanted))
    teacher = run.roles[REFERENCE]
    forward = make_apply(role.config, run.config, role.dtype, run.mesh, (teacher.config, held[teacher.tree]), wanted)
    return policy_apply(run.roles, held, forward)


def make_data_step(run: Run) -> Callable[[TrainState, Held, dict[str, Batch]], tuple[TrainState, Metrics]]:
    """The program of training on data, `(state, frozen, batches) -> (state, metrics)`: one step on the batch of that name."""
    after, learning = averaged(run.learning.averages), run.learning

    def step(state: TrainState, held: Held, batches: dict[str, Batch]) -> tuple[TrainState, Metrics]:
        rate = learning.schedule(state.step - state.skipped)
        losses = objectives(run, held, state)
        apply, combine = taught_apply(run, held, losses), run.experiment.combine
        train_step = make_step(apply, losses, learning.optimizer, run.config.microbatches, combine=combine)
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
        out = taught_apply(run, held, losses)(state.params, batch)
        return make_evaluation(lambda out, batch: out, losses.get(DATA, losses))(out, state.step, batch), out

    return evaluate


def make_gold(role: Role) -> Callable[[Params, Batch], jax.Array]:
    """The program that scores samples with the gold reward models, `(parameters, batch) -> scores` [B, N]: the mean of several."""

    def gold(params: Params, batch: Batch) -> jax.Array:
        scores = role.apply(params, batch).scores
        assert scores is not None
        return scores.mean(axis=-1)

    return gold
