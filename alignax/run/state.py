"""The arguments of a run's programs: its experience, its training state and its batches, with the shapes and shardings of each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.averages import PROPOSAL
from alignax.config import DATA, PRETRAIN, ROLLOUTS, asked, eval_batch_size, prompts_of_rollout, steps_of_turn
from alignax.config.blame import check_call
from alignax.data import Batches
from alignax.experience import Experience, chain, first_carry
from alignax.host.functions import reward_fields
from alignax.rewards import members
from alignax.rewards.judge import FIELDS
from alignax.run.prepare import Run
from alignax.run.roles import GOLD, REFERENCE, STORED_MODEL, abstract_frozen, abstract_trained, models, policy_model
from alignax.run.sampling import EVALUATION, ROLLOUT, sampled_rows
from alignax.train import init_state
from alignax.types import Batch, Model, Params, TrainState

AHEAD = "ahead"  # name of the next rollout in the carry
Held = Mapping[str, Params]  # frozen parameter trees by name, see `alignax.run.roles.frozen`


def make_experience(run: Run, held: Held, state: TrainState) -> Experience:
    """The experience of the experiment, made from the models that it asks for; the empty chain if the experiment has none."""
    make = run.experiment.experience
    if make is None:
        return chain()
    given: dict[str, Any] = given_models(run, held, state) | {"config": run.config, "prompts": len(run.data.train.examples)}
    made = make(**{name: given[name] for name in asked(make)})
    check_call(made, f"what experience() of {run.experiment.file} returns", "batch")
    return made


def given_models(run: Run, held: Held, state: TrainState) -> dict[str, Model]:
    """The models for experience and losses, by name. The reference may be an average of the policy, or stored log-probs of the data."""
    given = models(run.roles, held, state.params, run.packing)
    if run.cache is not None:
        given[REFERENCE] = STORED_MODEL
    if REFERENCE in state.averages:
        given[REFERENCE] = policy_model(run.roles, held, state.averages[REFERENCE], run.packing)
    return given


def off_policy(run: Run) -> bool:
    """Whether rollouts come from another policy than the one that is trained, or from another distribution of it."""
    sampler = run.samplers[ROLLOUT]
    return run.config.rollout.ahead or PROPOSAL in run.learning.averages or not (sampler.sampling.exact and sampler.speaker.exact)


# State ----------------------------------------------------------------------------------------------------------------------


def new_state(run: Run, params: Params, key: jax.Array, held: Held) -> TrainState:
    """The training state at step 0; for an ensemble, the states of all members. Averages start from the parameters. Pure."""

    def make(params: Params) -> TrainState:
        state = init_state(params, run.learning.optimizer, key, dict.fromkeys(run.learning.averages, params))
        carry = first_carry(make_experience(run, held, state))
        return dataclasses.replace(state, carry=carry | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), waiting(run)))

    return members.over_members(make, 0, members.AXES)(params) if run.policy.members else make(params)


def waiting(run: Run) -> dict[str, Any]:
    """The shapes of the carry's part outside of experience: with `rollout.ahead` the next rollout, else nothing."""
    return {AHEAD: training_rollout(run)} if run.config.rollout.ahead else {}


def state_shardings(run: Run, carry: Any) -> TrainState:
    """The sharding of each leaf of the training state; `carry` has the shapes of the carry. Every device holds all of experience's part."""
    abstract = abstract_trained(run.roles, run.mesh)
    params = jax.tree.map(lambda x: x.sharding, abstract)
    optimizer = run.learning.optimizer
    init = members.over_members(optimizer.init, 0, 0) if run.policy.members else optimizer.init
    one: Any = meshes.sharding(run.mesh)
    opt_state = meshes.optimizer_shardings(run.mesh, optimizer, jax.eval_shape(init, abstract), params)
    remembered = jax.tree.map(lambda _: one, carry) | jax.tree.map(lambda x: x.sharding, waiting(run))
    return TrainState(one, params, opt_state, one, one, one, dict.fromkeys(run.learning.averages, params), remembered)


def abstract_state(run: Run) -> TrainState:
    """The shapes, types and shardings of the training state; nothing is computed."""
    held = abstract_frozen(run.roles, run.mesh)
    shapes = jax.eval_shape(lambda p, f: new_state(run, p, jax.random.key(0), f), abstract_trained(run.roles), held)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(run, shapes.carry))


# Batches --------------------------------------------------------------------------------------------------------------------


def abstract_batches(run: Run) -> dict[str, Any]:
    """The shapes and shardings of the training program's batches, by name: of data, or of rollouts and pretraining."""
    c = run.config
    if not c.rollout.samples:
        return {DATA: abstract_batch(run)}
    batches: dict[str, Any] = {ROLLOUTS: training_rollout(run)}
    if run.data.pretrain is not None:
        batches[PRETRAIN] = abstract_rows(run.mesh, run.data.pretrain, steps_of_turn(c), c.batch_size)
    return batches


def abstract_batch(run: Run, evaluation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a training batch of data, or of an evaluation batch, which all members of an ensemble share."""
    return abstract_rows(run.mesh, run.data.train, *((eval_batch_size(run.config),) if evaluation else batch_sizes(run)))


def abstract_rows(mesh: Mesh, stream: Batches, *sizes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a stream's rows with leading axes of the given sizes, see `alignax.mesh.put_batch`."""
    layout = meshes.batch_sharding(mesh, len(sizes) == 2)
    describe = lambda x: jax.ShapeDtypeStruct((*sizes, *x.shape[1:]), x.dtype, sharding=layout)
    return {name: describe(x) for name, x in stream.batch(0, slice(0)).items()}


def batch_sizes(run: Run) -> tuple[int, ...]:
    """The sizes of a training batch's leading axes: [B], or [K, B] for an ensemble."""
    return (run.policy.members, run.config.batch_size) if run.policy.members else (run.config.batch_size,)


def training_rollout(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a rollout that is trained on."""
    return abstract_rollout(run, prompts_of_rollout(run.config), run.config.rollout.samples)


def abstract_rollout(run: Run, prompts: int, samples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a rollout of B = `prompts` prompts, with N = `samples` responses each."""
    B, N, T = prompts, samples, run.data.train.length
    layout = meshes.batch_sharding(run.mesh)
    tokens: dict[str, Any] = {"tokens": jnp.int32, "mask": jnp.bool_, "completion_mask": jnp.bool_, "sampled_logps": jnp.float32}
    fields = {name: ((B, N, T), dtype) for name, dtype in tokens.items()}
    fields |= {"truncated": ((B, N), jnp.bool_), "prompt_id": ((B,), jnp.int32)}
    for judge in run.readers.values():
        fields |= {f"{judge.role}_{name}": ((B, N, judge.length), tokens[name]) for name in FIELDS}
        fields |= {f"{judge.role}_cut": ((B, N), jnp.bool_)} | ({} if judge.shared else {f"{judge.role}_foreign": ((B,), jnp.bool_)})
    fields |= {name: ((B, N, *more), jnp.float32) for name, more in reward_fields(run.experiment).items()}
    fields |= {GOLD: ((B, N), jnp.float32)} if GOLD in run.roles else {}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, (shape, dtype) in fields.items()}


def abstract_read(run: Run, role: str, sampler: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a sampler's samples in the form that the frozen model `role` reads."""
    c, shape = run.config, run.samplers[sampler].shape
    B, N = prompts_of_rollout(c), c.rollout.samples
    if sampler == EVALUATION:
        B, N = len(sampled_rows(c, run.data.evaluated)), c.eval.samples_per_prompt
    T = run.data.train.length if c.rollout.samples else shape.prompt + shape.new
    T = run.judges[role].length if role in run.judges else T
    layout, shape = meshes.batch_sharding(run.mesh), (padded(run.mesh, B), N, T)
    types = dict(zip(FIELDS, (jnp.int32, jnp.bool_, jnp.bool_), strict=True))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in types.items()}


def abstract_compared(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of an evaluation's samples for the comparison of policy and reference."""
    shape = run.samplers[EVALUATION].shape
    B, N, T = len(sampled_rows(run.config, run.data.evaluated)), run.config.eval.samples_per_prompt, shape.prompt + shape.new
    types = dict(zip((*FIELDS, "sampled_logps"), (jnp.int32, jnp.bool_, jnp.bool_, jnp.float32), strict=True))
    layout, rows = meshes.batch_sharding(run.mesh), padded(run.mesh, B)
    return {name: jax.ShapeDtypeStruct((rows, N, T), dtype, sharding=layout) for name, dtype in types.items()}


def padded(mesh: Mesh, prompts: int) -> int:
    """The number of rows of a padded batch of prompts: a multiple of the batch shards, 0 for no prompts."""
    shards = meshes.batch_shards(mesh)
    return -(-prompts // shards) * shards


def put_padded(mesh: Mesh, batch: dict[str, np.ndarray], least: int = 0) -> Batch:
    """The batch on the mesh, with padding rows up to a multiple of the batch shards, and up to `least` rows in all."""
    n = len(next(iter(batch.values())))
    size = padded(mesh, max(n, least))
    full = {name: np.concatenate([x, np.zeros((size - n, *x.shape[1:]), x.dtype)]) for name, x in batch.items()}
    return meshes.put_batch(mesh, lambda rows: {name: x[rows] for name, x in full.items()}, size)
