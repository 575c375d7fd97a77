"""What a run computes: its models, the shapes and places of its arrays, and its two jitted programs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import ensemble
from alignax import mesh as meshes
from alignax.averages import PROPOSAL, averaged
from alignax.blame import check_call
from alignax.config import asked, eval_batch_size, prompts_of_rollout
from alignax.data import Batches
from alignax.experience import Experience, advance, chain, first_carry
from alignax.generate import policy_sampling
from alignax.judges import FIELDS
from alignax.models import hf, parameters, reward, transformer
from alignax.models.lora import Lora, is_quantised, join, split
from alignax.prepare import STORED, Run, make_apply
from alignax.rewards import ensemble_model
from alignax.train import Apply, init_state, make_evaluation, make_step
from alignax.types import Batch, Metrics, Model, Outputs, Params, TrainState

AHEAD = "ahead"  # the part of the carry that is the next rollout


def reference_apply(run: Run) -> Apply:
    """The forward pass of the reference: the policy's own, so that equal parameters give equal numbers."""
    assert run.reference is not None
    if reference_config(run) == run.source.config and run.lora is None:
        return run.apply
    return make_apply(reference_config(run), run.config, run.dtype, run.mesh)


def reference_config(run: Run) -> transformer.ModelConfig:
    """The reference's shape and options; of adapters, those of their base as it is stored."""
    assert run.reference is not None
    bare = dataclasses.replace(run.lora, targets=()) if run.lora is not None and run.reference is run.source else None
    return dataclasses.replace(run.reference.config, lora=bare, critic_heads=0)


def taught_apply(run: Run, frozen: dict[str, Any]) -> Apply:
    """The forward pass that is trained: the policy's, with the reference at its side where `reference.token_kl` asks for their KL."""
    if not run.config.reference.token_kl:
        return policy_model(run, frozen, None).apply
    reference = reference_model(run, frozen)
    assert run.reference is not None and reference is not None
    adapted = dataclasses.replace(run.source.config, lora=run.lora)
    apply = make_apply(adapted, run.config, run.dtype, run.mesh, (reference_config(run), reference.params))
    return with_values(run, lambda params, batch: apply(full(run, frozen, params), batch))


def with_values(run: Run, apply: Apply) -> Apply:
    """The forward pass, with the values of a critic of its own tree where there is one."""
    if run.critic is None:
        return apply
    values = transformer.critic(run.critic.config, dtype=run.dtype, remat=run.config.model.remat, mesh=run.mesh)
    return lambda params, batch: apply(params, batch)._replace(values=values(params[reward.CRITIC], batch))


def full(run: Run, frozen: dict[str, Params], params: Params) -> Params:
    """The whole of the policy's parameters, from those that are trained."""
    return params if run.lora is None else join(frozen["base"], params)


def policy_model(run: Run, frozen: dict[str, Params], params: Params) -> Model:
    """The policy, as a function of what is trained."""

    def apply(params: Params, batch: Batch) -> Outputs:
        return run.apply(full(run, frozen, params), batch)

    return Model(with_values(run, apply), params)


def reference_model(run: Run, frozen: dict[str, Params]) -> Model | None:
    """The frozen reference: of adapters their base, unless `reference.path` is another folder."""
    name = reference_name(run)
    return Model(reference_apply(run), frozen[name]) if run.reference is not None and name in frozen else None


def reference_name(run: Run) -> str:
    """Under what name the reference's parameters are held."""
    return "base" if run.lora is not None and run.reference is run.source else "reference"


def stored_outputs(params: Params, batch: Batch) -> Outputs:
    """A reference whose log-probs came with the data; it can score nothing else."""
    if STORED not in batch:
        raise ValueError("reference.cache holds log-probs of the data's own rows, and this experience scores others; leave it empty")
    return Outputs(batch[STORED], jnp.full_like(batch[STORED], jnp.nan))  # the entropy is not stored


def frozen_dtype(path: Any, run: Run, name: str) -> Any:
    """The dtype of a leaf of "base" or "reference": the compute dtype, to which the forward pass casts everything but the norms anyway."""
    leaf = hf.leaf_name(path)
    if name == "base" and is_quantised(run.lora, leaf):
        return jnp.int8
    return jnp.float32 if leaf.endswith(("norm", "norm_bias", "_scale")) else run.dtype


def abstract_frozen(run: Run) -> dict[str, Any]:
    """Shapes, types and shardings of the parameters that a run holds and does not train, by name: "base" of adapters, "reference"."""

    def described(name: str, source: hf.Source) -> Params:
        config = dataclasses.replace(source.config, lora=run.lora if name == "base" else None, critic_heads=0)
        params = parameters.abstract_params(config, run.mesh)
        params = params if name == "ensemble" else split(params)[0]
        describe = lambda path, x: jax.ShapeDtypeStruct(x.shape, frozen_dtype(path, run, name), sharding=x.sharding)
        return jax.tree_util.tree_map_with_path(describe, params)

    frozen = {name: described(name, source) for name, source in frozen_sources(run).items()}
    return frozen | ({"ensemble": ensemble.stacked(described("ensemble", run.judges[0]), len(run.judges), run.mesh)} if run.judges else {})


def frozen_sources(run: Run) -> dict[str, hf.Source]:
    """The folders of the parameters that are held and not trained, reward models apart."""
    base = {} if run.lora is None else {"base": run.source}
    c = run.config.eval
    idle = run.config.reference.cache and not (c.temperature > 0 and c.top_p == 1 and max(c.samples, c.sample_prompts))
    return base if run.reference is None or idle or (base and run.reference is run.source) else base | {"reference": run.reference}


def abstract_trained(run: Run, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of what is trained: all parameters, or the adapters; of an ensemble all members'."""
    return abstract_models(run.source, run.lora, run.critic, run.members, mesh)


def abstract_models(source: hf.Source, lora: Lora | None, critic: hf.Source | None, members: int, mesh: Mesh | None) -> Params:
    """Shapes, types and shardings of what a run of these models trains, see `abstract_trained`."""
    one = parameters.abstract_params(source.config, mesh) if lora is None else parameters.abstract_adapters(source.config, lora, mesh)
    if critic is not None:
        one = one | {reward.CRITIC: parameters.abstract_params(critic.config, mesh)}
    return ensemble.stacked(one, members, mesh) if members else one


def abstract_batch(run: Run, evaluation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a training batch, or of an evaluation batch, which members of an ensemble share."""
    return abstract_rows(run.mesh, run.train, *((eval_batch_size(run.config),) if evaluation else batch_sizes(run)))


def abstract_rows(mesh: Mesh, stream: Batches, *sizes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of rows of a stream whose leading axes are of those sizes, see `alignax.mesh.put_batch`."""
    layout = meshes.batch_sharding(mesh, len(sizes) == 2)
    describe = lambda x: jax.ShapeDtypeStruct((*sizes, *x.shape[1:]), x.dtype, sharding=layout)
    return {name: describe(x) for name, x in stream.batch(0, slice(0)).items()}


def batch_sizes(run: Run) -> tuple[int, ...]:
    """The leading axes of a training batch: [B], of an ensemble [K, B]."""
    return (run.members, run.config.batch_size) if run.members else (run.config.batch_size,)


def new_state(run: Run, params: Params, key: jax.Array, averages: dict[str, Params], frozen: dict[str, Params]) -> TrainState:
    """The state at step 0, of an ensemble all members'; pure."""

    def make(params: Params, averages: dict[str, Params]) -> TrainState:
        state = init_state(params, run.optimizer, key, averages)
        carry = first_carry(make_experience(run, frozen, state))
        return dataclasses.replace(state, carry=carry | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), waiting(run)))

    if run.members:
        make = ensemble.over_members(make, in_axes=0, out_axes=ensemble.AXES)
    return make(params, averages)


def waiting(run: Run) -> dict[str, Any]:
    """The part of the carry that is no experience's: with `rollout.ahead` the rollout that comes next, as shapes."""
    if not run.config.rollout.ahead:
        return {}
    return {AHEAD: abstract_rollout(run, prompts_of_rollout(run.config), run.config.rollout.samples)}


def state_shardings(run: Run, carry: Any) -> TrainState:
    """Where each leaf of the training state lives; `carry` says what is remembered: that of experience every device holds."""
    abstract = abstract_trained(run, run.mesh)
    params = jax.tree.map(lambda x: x.sharding, abstract)
    init = ensemble.over_members(run.optimizer.init, 0, 0) if run.members else run.optimizer.init
    one: Any = meshes.sharding(run.mesh)
    opt_state = meshes.optimizer_shardings(run.mesh, run.optimizer, jax.eval_shape(init, abstract), params)
    remembered = jax.tree.map(lambda _: one, carry) | jax.tree.map(lambda x: x.sharding, waiting(run))
    return TrainState(one, params, opt_state, one, one, one, dict.fromkeys(run.averages, params), remembered)


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and shardings of the training state; nothing is computed."""
    params = abstract_trained(run)
    averages = dict.fromkeys(run.averages, params)
    shapes = jax.eval_shape(lambda p, a, f: new_state(run, p, jax.random.key(0), a, f), params, averages, abstract_frozen(run))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(run, shapes.carry))


def abstract_rollout(run: Run, prompts: int, samples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a rollout."""
    B, N, T = prompts, samples, run.train.length
    layout = meshes.batch_sharding(run.mesh)
    tokens: dict[str, Any] = {"tokens": jnp.int32, "mask": jnp.bool_, "completion_mask": jnp.bool_, "sampled_logps": jnp.float32}
    fields = {name: ((B, N, T), dtype) for name, dtype in tokens.items()}
    fields |= {"truncated": ((B, N), jnp.bool_), "prompt_id": ((B,), jnp.int32)}
    if run.judge is not None:
        fields |= {f"judge_{name}": ((B, N, run.judge.length), tokens[name]) for name in FIELDS}
        fields["judge_cut"] = (B, N), jnp.bool_
    if run.experiment.reward is not None:
        fields["rewards"] = (B, N), jnp.float32
    if run.experiment.gold is not None:
        fields["gold"] = (B, N), jnp.float32
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, (shape, dtype) in fields.items()}


def off_policy(run: Run) -> bool:
    """Whether rollouts are of another policy, or of another distribution of it, than the one that learns from them."""
    c = run.config.rollout
    return c.ahead or PROPOSAL in run.averages or not policy_sampling(c.temperature, c.top_p).exact


def make_experience(run: Run, frozen: dict[str, Params], state: TrainState) -> Experience:
    """What the experiment puts in front of the step, from the models that it asks for; nothing, where it names none."""
    make = run.experiment.experience
    if make is None:
        return chain()
    given = {"config": run.config, "policy": policy_model(run, frozen, state.params), "reference": reference_model(run, frozen)}
    given["prompts"] = len(run.train.examples)
    if run.judges:
        given["ensemble"] = ensemble_model(run.judges[0].config, frozen["ensemble"], run.mesh, run.dtype)
    if run.config.reference.cache:
        given["reference"] = Model(stored_outputs, {})
    if "reference" in state.averages:
        given["reference"] = policy_model(run, frozen, state.averages["reference"])
    made = make(**{name: given[name] for name in asked(make)})
    check_call(made, f"what experience() of {run.experiment.file} returns", "batch")
    return made


def make_programs(run: Run) -> tuple[Callable, Callable]:
    """The jitted training step and the jitted evaluation of a batch, each behind the experience.

    Frozen parameters go in as an argument: they stay sharded where they are and are never compiled into the program.
    """
    after = averaged(run.averages)

    def step(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[TrainState, Metrics]:
        rate = run.schedule(state.step - state.skipped)
        train_step = make_step(taught_apply(run, frozen), run.objective, run.optimizer, run.config.microbatches)
        carry, batch = advance(make_experience(run, frozen, state), state.carry, batch)
        state, metrics = train_step(dataclasses.replace(state, carry=carry), batch)
        state = after(state)
        return state, metrics | {"learning_rate": jnp.asarray(rate), "tokens": batch["mask"].sum(dtype=jnp.float32)}

    def evaluate(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[Any, Outputs]:
        _, batch = advance(make_experience(run, frozen, state), state.carry, batch)
        out = taught_apply(run, frozen)(state.params, batch)
        return make_evaluation(lambda out, batch: out, run.objective)(out, state.step, batch), out

    if run.members:
        axes = ensemble.AXES
        train_all = ensemble.over_members(step, (axes, None, 0), (axes, 0))
        evaluate_all = ensemble.over_members(evaluate, (axes, None, None), 0)

        def steps(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[TrainState, Metrics]:
            state, metrics = train_all(state, frozen, batch)
            return state, ensemble.training_metrics(metrics)

        def evaluations(state: TrainState, frozen: dict[str, Params], batch: Batch) -> Any:
            sums, out = evaluate_all(state, frozen, batch)
            return ensemble.evaluation_sums(sums, out, batch)

        return jax.jit(steps, donate_argnums=0), jax.jit(evaluations)
    return jax.jit(step, donate_argnums=0), jax.jit(lambda *args: evaluate(*args)[0])
