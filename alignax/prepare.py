"""From an experiment to a checked run: everything that can be refused is refused here, before any compute."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from alignax import ensemble
from alignax import mesh as meshes
from alignax.averages import Average
from alignax.config import Experiment, asked, blaming, difference, flat, load_experiment
from alignax.data import Batches, Examples, Report, load, padded_length
from alignax.data.files import one_line
from alignax.generate.generator import check_room
from alignax.losses.algebra import Loss, Objective
from alignax.models import hf, lora, peft, transformer
from alignax.models.lora import Lora, is_quantised, join, split
from alignax.optim import make_optimizer, make_schedule
from alignax.train import Apply, init_state
from alignax.types import Batch, Model, Outputs, Params, TrainState

# Fields that may change when a run is resumed: they do not say what is computed, only where and how it is told.
FREE = (
    "workdir",
    "mesh.",
    "log.",
    "checkpoint.",
    "eval.",
    "export.",
    "max_skipped",
    "microbatches",
    "model.remat",
    "model.logps_chunk",
    "reference.cache",
)
STORED = "stored_ref_logps"  # the batch field that a cache of the reference brings
LEAST = {
    "batch_size": 1, "microbatches": 1, "max_skipped": 1, "steps": 0, "checkpoint.every": 1, "checkpoint.keep": 1, "log.every": 1,
    "model.logps_chunk": 1, "eval.every": 0, "eval.batch_size": 0, "eval.samples": 0, "eval.sample_prompts": 0, "eval.max_new_tokens": 1,
    "data.limit": 0, "seed": 0, "model.num_labels": 0, "ensemble.members": 0,
    "epochs": 0, "eval.temperature": 0, "optimizer.clip": 0, "optimizer.final": 0, "optimizer.weight_decay": 0,
    "optimizer.b1": 0, "optimizer.b2": 0, "optimizer.eps": 0,
}  # fmt: skip


class Run(NamedTuple):
    """A checked run: nothing computed, nothing written."""

    experiment: Experiment
    config: Any
    workdir: Path
    mesh: Mesh
    source: hf.Source  # the folder that the policy starts from
    reference: hf.Source | None  # None: no experience asks for one
    lora: Lora | None  # adapters, which alone are trained
    tokenizer: Any
    train: Batches  # of an ensemble those of its first member
    members: int  # of an ensemble; 0: one model
    evaluation: Examples | None
    reports: dict[str, Report]
    steps: int
    dtype: Any
    apply: Apply
    objective: Objective
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    averages: dict[str, Average]


def prepare(experiment: Experiment, mesh: Mesh | None = None) -> Run:
    """Reads config, data and model descriptions, and refuses what cannot work.

    Args:
      experiment: what to run.
      mesh: default: the config's, over the devices at hand.

    Raises:
      ValueError: with what is wrong, the value, and the remedy.
    """
    config = experiment.config
    if not config.workdir:
        raise ValueError("config field 'workdir' is empty; set --config.workdir=runs/NAME")
    check_fields(config)
    workdir = Path(config.workdir)
    mesh = mesh or meshes.make_mesh(config.mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    check_batches(config, mesh)
    source = hf.with_labels(open_model(config.model.path, config.model.init, "model.path"), config.model.num_labels)
    check_head(config, source, experiment)
    check_members(config, mesh)
    reference = None
    if "reference" in asked(experiment.experience):
        reference = open_model(config.reference.path, "pretrained", "reference.path") if config.reference.path else source
        if reference.config.vocab_size != source.config.vocab_size:
            raise ValueError(
                f"the reference has a vocabulary of {reference.config.vocab_size}, the policy of {source.config.vocab_size}; "
                "they must share a tokenizer"
            )
    if config.reference.token_kl:
        check_token_kl(source, reference)
    lora = make_lora(config, source)
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    if not config.data.train:
        raise ValueError("config field 'data.train' is empty; set --config.data.train=FILE")
    loaded = {s: load(s, config.data, tokenizer, source.config.vocab_size) for s in ("train", "eval") if config.data[s]}
    examples = {split: data.examples for split, data in loaded.items()}
    reports = {
        split if len(data.reports) == 1 else f"{split} ({path})": report
        for split, data in loaded.items()
        for path, report in data.reports.items()
    }
    check_positions(config, source, examples)
    if config.reference.cache:  # shapes of what is read or computed before the first step
        place = lambda e: dataclasses.replace(e, token_fields={STORED: np.zeros(len(e.tokens), np.float32)})
        examples = {split: place(e) for split, e in examples.items()}
    length = max(padded_length(e, 8 if on_cpu else 128) for e in examples.values())  # 128: the tile of TPU and GPU attention
    drawn = {"bootstrap": config.ensemble.bootstrap, "noise": config.data.label_noise, "noise_seed": config.seed}
    train = Batches(examples["train"], config.batch_size, config.seed, length, loaded["train"].mixture, **drawn)
    steps = config.steps or train.steps(config.epochs)
    if steps < 1:
        raise ValueError(f"epochs {config.epochs} make no step; raise epochs, or set steps")
    dtype = compute_dtype(config, mesh)
    apply = make_apply(dataclasses.replace(source.config, lora=lora), config, dtype, mesh)
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    with blaming(experiment.file):
        objective = experiment.loss(config)
        averages = {} if experiment.averages is None else dict(experiment.averages(config))
    check_objective(objective, experiment.file)
    check_averages(config, averages, reference)
    check_cache(config, averages, reference)
    return Run(
        experiment, config, workdir, mesh, source, reference, lora, tokenizer, train, config.ensemble.members, examples.get("eval"),
        reports, steps, dtype, apply, objective, schedule, optimizer, averages,
    )  # fmt: skip


def compute_dtype(config: Any, mesh: Mesh) -> Any:
    """The dtype of activations."""
    auto = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)


def check_fields(config: Any) -> None:
    """Refuses values that no run can have."""
    fields = flat(config)
    for name, least in LEAST.items():
        if fields[name] < least:
            raise ValueError(f"config field {name!r} is {fields[name]}; it must be at least {least}")
    for name in ("optimizer.b1", "optimizer.b2"):
        if fields[name] >= 1:
            raise ValueError(f"config field {name!r} is {fields[name]}; it must be below 1")
    if config.model.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"model.dtype {config.model.dtype!r} is unknown; use auto, float32 or bfloat16")
    if config.export.dtype not in hf.DTYPES:
        raise ValueError(f"export.dtype {config.export.dtype!r} is unknown; use {', '.join(hf.DTYPES)}")
    best = config.checkpoint.best.removeprefix("-")
    if best and not (config.data.eval and config.eval.every):
        raise ValueError(f"checkpoint.best {best!r} needs evaluations; set data.eval and eval.every")


def check_head(config: Any, source: hf.Source, experiment: Experiment) -> None:
    """Refuses what a reward model cannot do: sample, and be the policy of an experience."""
    if not source.config.num_labels:
        return
    if max(config.eval.samples, config.eval.sample_prompts):
        raise ValueError("a reward model gives scores and no text; set eval.samples and eval.sample_prompts to 0")
    if experiment.gold is not None:
        raise ValueError(f"gold() of {experiment.file} rewards text, which a reward model does not give; remove it")


def check_members(config: Any, mesh: Mesh) -> None:
    """Refuses ensembles that are none, or that the mesh does not divide."""
    members, axis = config.ensemble.members, mesh.shape["member"]
    if not members and (axis > 1 or config.ensemble.bootstrap or config.ensemble.own_noise):
        raise ValueError(f"mesh.member is {axis} and ensemble.members 0; set ensemble.members, or leave bootstrap and own_noise out")
    if members and not config.model.num_labels:
        raise ValueError(f"ensemble.members is {members}, and only reward models have members; set model.num_labels to 1")
    if members % axis:
        raise ValueError(f"ensemble.members {members} does not divide over mesh.member {axis}; use a multiple of {axis}")


def check_token_kl(source: hf.Source, reference: hf.Source | None) -> None:
    """Refuses a teacher that is not there, or whose head is another one."""
    if reference is None:
        raise ValueError("reference.token_kl is true and no reference is held; let experience(..) ask for reference")
    caps = [s.config.final_logit_softcapping for s in (source, reference)]
    if caps[0] != caps[1]:
        raise ValueError(f"reference.token_kl needs one final_logit_softcapping, policy and reference have {caps}; set it to false")


def check_cache(config: Any, averages: dict[str, Average], reference: hf.Source | None) -> None:
    """Refuses stored log-probs where there is nothing to store, or where they would go stale."""
    if not config.reference.cache:
        return
    where = f"reference.cache {config.reference.cache!r}"
    if Path(config.reference.cache).is_file():
        raise ValueError(f"{where} is a file; give a folder")
    if reference is None:
        raise ValueError(f"{where} is set and no reference is held; let experience(..) ask for reference, or leave it empty")
    if "reference" in averages:
        raise ValueError(f"{where} would go stale: the average 'reference' moves; leave it empty")
    if config.reference.token_kl:
        raise ValueError(f"{where} holds no distributions, which reference.token_kl needs; leave one of them out")


def check_averages(config: Any, averages: dict[str, Average], reference: hf.Source | None) -> None:
    """Refuses averages that nobody reads, or that are read and not there."""
    known = ["policy", *(name for name in averages if name != "reference")]
    for field, name in (("eval.params", config.eval.params), ("export.params", config.export.params)):
        if name not in known:
            raise ValueError(f"config field {field!r} is {name!r}; this experiment has {', '.join(known)}")
    if "reference" in averages and config.reference.token_kl:
        raise ValueError("reference.token_kl needs a reference that stands still; remove the average 'reference', or set it to false")
    if "policy" in averages or ("reference" in averages and reference is None):
        raise ValueError('an average is called "policy", or "reference" where no experience asks for one; rename or remove it')
    if "reference" in averages and config.reference.path and (config.reference.path != config.model.path):
        raise ValueError(f"a moving reference starts from the policy, not from reference.path {config.reference.path!r}; leave it empty")


def check_objective(objective: Any, file: Path) -> None:
    """Refuses what is no loss, nor a function from the step to one."""
    cause = ""
    if callable(objective) and not isinstance(objective, Loss):
        try:
            objective = objective(jnp.zeros((), jnp.int32))
        except Exception as e:
            cause = f" (called with a step: {' '.join(str(e).split())})"
    if not isinstance(objective, Loss):
        raise ValueError(
            f"loss(config) of {file} returns {objective!r}{cause}; return a loss, dpo() say, or a function from the step to one"
        )


def check_batches(config: Any, mesh: Mesh) -> None:
    """Refuses batches that do not divide into their parts."""
    shards = meshes.batch_shards(mesh)
    parts = shards * config.microbatches
    for name, size in (("batch_size", config.batch_size), ("eval.batch_size", eval_batch_size(config))):
        if size % parts:
            raise ValueError(
                f"{name} {size} does not divide into {parts} parts ({shards} batch shards x {config.microbatches} microbatches); "
                f"use a multiple of {parts}"
            )


def check_positions(config: Any, source: hf.Source, examples: dict[str, Examples]) -> None:
    """Refuses rows and samples that are longer than the model's positions; padding has none."""
    most = source.config.max_position_embeddings
    longest = max(int(e.lengths.max()) for e in examples.values())
    if longest > most and dict(source.config.rope_scaling).get("rope_type") != "dynamic":
        raise ValueError(f"rows of {longest} tokens exceed the model's {most} positions; lower data.max_length")
    prompt = max(int(e.prompt_lengths.max()) for e in examples.values())
    if max(config.eval.samples, config.eval.sample_prompts):
        check_room(source.config, prompt, config.eval.max_new_tokens, "eval.max_new_tokens")


def open_model(path: str, init: str, field: str) -> hf.Source:
    """Opens a model folder and checks its tensors against its config."""
    if not path:
        raise ValueError(f"config field {field!r} is empty; set --config.{field}=FOLDER, a Hugging Face model folder")
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init {init!r} is unknown; use pretrained or random")
    source = hf.open_folder(path)
    hf.stop_ids(source)  # the export at the end reads them
    if init == "pretrained":
        hf.check_tensors(source, hf.tensor_files(source))
    return source


def make_lora(config: Any, source: hf.Source) -> Lora | None:
    """The adapters that a config asks for, their patterns resolved to matrices of the model."""
    c = config.lora
    if c.path:
        return dataclasses.replace(peft.read_config(Path(c.path), source)[0], int8=c.int8)
    lora.check(c)
    if config.model.freeze:
        if c.rank or not source.config.num_labels:
            raise ValueError("model.freeze trains a reward model's head alone; set model.num_labels to 1 and lora.rank to 0")
        return Lora(1, 1.0, ())
    if not c.rank:
        return None
    if config.model.init != "pretrained":
        raise ValueError(
            f"lora.rank {c.rank} adapts trained weights, model.init is {config.model.init!r}; set it to pretrained, or rank to 0"
        )
    targets = lora.find_targets(c.targets, peft.Adapted(source).names, source.config.num_experts > 0)
    return Lora(c.rank, c.alpha, targets, c.rslora, c.dora, c.int8)


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The tokenizer of a model folder, from local files only; `vocab_size`: rows of the model's embedding."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        eos, size, _ = tokenizer.eos_token_id, len(tokenizer), tokenizer("a")  # some damage shows only in use
    except Exception as e:  # a damaged tokenizer.json raises a bare Exception
        raise ValueError(f"{str(path)!r} has no tokenizer that transformers reads ({one_line(e)})") from e
    if eos is None:
        raise ValueError(f"the tokenizer in {str(path)!r} has no EOS token; set eos_token in its tokenizer_config.json")
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer in {str(path)!r} has {size} tokens and the embedding {vocab_size} rows; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def check_workdir(run: Run) -> None:
    """Refuses the workdir of another run, and one that cannot be written."""
    workdir, experiment = run.workdir, run.experiment
    saved = workdir / "config.py"
    place = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if saved.is_file():
        lines = difference(load_experiment(saved), experiment, FREE)
        if lines:
            raise ValueError(f"workdir {str(workdir)!r} belongs to another run ({'; '.join(lines[:4])}); choose another workdir")
    elif not place.is_dir():
        raise ValueError(f"workdir {str(workdir)!r} cannot be a folder: {str(place)!r} is a file; choose another workdir")
    elif place == workdir and any(p.name != "config.py.tmp" for p in workdir.iterdir()):
        raise ValueError(f"workdir {str(workdir)!r} holds other files; choose a new or empty folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"workdir {str(workdir)!r} cannot be written: {str(place)!r} is closed to you; choose another workdir")


def eval_batch_size(config: Any) -> int:
    """Examples of an evaluation batch."""
    return config.eval.batch_size or config.batch_size


def reference_apply(run: Run) -> Apply:
    """The forward pass of the reference: the policy's own, so that equal parameters give equal numbers."""
    assert run.reference is not None
    if run.reference.config == run.source.config and run.lora is None:
        return run.apply
    return make_apply(reference_config(run), run.config, run.dtype, run.mesh)


def reference_config(run: Run) -> transformer.ModelConfig:
    """The reference's shape and options; of adapters, those of their base as it is stored."""
    assert run.reference is not None
    bare = dataclasses.replace(run.lora, targets=()) if run.lora is not None and run.reference is run.source else None
    return dataclasses.replace(run.reference.config, lora=bare)


def taught_apply(run: Run, frozen: dict[str, Any]) -> Apply:
    """The forward pass that is trained: the policy's, with the reference at its side where `reference.token_kl` asks for their KL."""
    if not run.config.reference.token_kl:
        return policy_model(run, frozen, None).apply
    reference = reference_model(run, frozen)
    assert run.reference is not None and reference is not None
    adapted = dataclasses.replace(run.source.config, lora=run.lora)
    apply = make_apply(adapted, run.config, run.dtype, run.mesh, (reference_config(run), reference.params))
    return lambda params, batch: apply(full(run, frozen, params), batch)


def make_apply(model: transformer.ModelConfig, config: Any, dtype: Any, mesh: Mesh, teacher: Any = None) -> Apply:
    """A forward pass as the config wants it."""
    c = config.model
    return transformer.forward(model, dtype=dtype, remat=c.remat, chunk=c.logps_chunk, mesh=mesh, teacher=teacher)


def full(run: Run, frozen: dict[str, Params], params: Params) -> Params:
    """The whole of the policy's parameters, from those that are trained."""
    return params if run.lora is None else join(frozen["base"], params)


def policy_model(run: Run, frozen: dict[str, Params], params: Params) -> Model:
    """The policy, as a function of what is trained."""

    def apply(params: Params, batch: Batch) -> Outputs:
        return run.apply(full(run, frozen, params), batch)

    return Model(apply, params)


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
        config = dataclasses.replace(source.config, lora=run.lora if name == "base" else None)
        params = split(hf.abstract_params(config, run.mesh))[0]
        describe = lambda path, x: jax.ShapeDtypeStruct(x.shape, frozen_dtype(path, run, name), sharding=x.sharding)
        return jax.tree_util.tree_map_with_path(describe, params)

    return {name: described(name, source) for name, source in frozen_sources(run).items()}


def frozen_sources(run: Run) -> dict[str, hf.Source]:
    """The folders of the parameters that are held and not trained."""
    base = {} if run.lora is None else {"base": run.source}
    c = run.config.eval
    idle = run.config.reference.cache and not (c.temperature == 1 and max(c.samples, c.sample_prompts))
    return base if run.reference is None or idle or (base and run.reference is run.source) else base | {"reference": run.reference}


def abstract_trained(run: Run, mesh: Mesh | None = None) -> Params:
    """Shapes, types and (with a mesh) shardings of what is trained: all parameters, or the adapters; of an ensemble all members'."""
    one = hf.abstract_params(run.source.config, mesh) if run.lora is None else hf.abstract_adapters(run.source.config, run.lora, mesh)
    return ensemble.stacked(one, run.members, mesh) if run.members else one


def abstract_batch(run: Run, evaluation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a training batch, or of an evaluation batch, which members of an ensemble share."""
    sizes = (eval_batch_size(run.config),) if evaluation else batch_sizes(run)
    layout = meshes.batch_sharding(run.mesh, len(sizes) == 2)
    describe = lambda x: jax.ShapeDtypeStruct((*sizes, *x.shape[1:]), x.dtype, sharding=layout)
    return {name: describe(x) for name, x in run.train.batch(0, slice(0)).items()}


def batch_sizes(run: Run) -> tuple[int, ...]:
    """The leading axes of a training batch: [B], of an ensemble [K, B]."""
    return (run.members, run.config.batch_size) if run.members else (run.config.batch_size,)


def new_state(run: Run, params: Params, key: jax.Array, averages: dict[str, Params]) -> TrainState:
    """The state at step 0, of an ensemble all members'; pure."""
    make = lambda params, averages: init_state(params, run.optimizer, key, averages)
    if run.members:
        make = ensemble.over_members(make, in_axes=0, out_axes=ensemble.AXES)
    return make(params, averages)


def state_shardings(run: Run) -> TrainState:
    """Where each leaf of the training state lives."""
    abstract = abstract_trained(run, run.mesh)
    params = jax.tree.map(lambda x: x.sharding, abstract)
    init = ensemble.over_members(run.optimizer.init, 0, 0) if run.members else run.optimizer.init
    one: Any = meshes.sharding(run.mesh)
    opt_state = meshes.optimizer_shardings(run.mesh, run.optimizer, jax.eval_shape(init, abstract), params)
    return TrainState(one, params, opt_state, one, one, one, dict.fromkeys(run.averages, params))


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and shardings of the training state; nothing is computed."""
    params = abstract_trained(run)
    averages = dict.fromkeys(run.averages, params)
    shapes = jax.eval_shape(lambda p, a: new_state(run, p, jax.random.key(0), a), params, averages)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(run))
