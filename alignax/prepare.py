"""From an experiment to a checked run: everything that can be refused is refused here, before any compute."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.config import Experiment, difference, load_experiment
from alignax.data import Batches, Examples, Report, load_examples, padded_length
from alignax.losses.algebra import Objective
from alignax.models import hf, transformer
from alignax.optim import make_optimizer, make_schedule
from alignax.train import Apply, init_state
from alignax.types import TrainState

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
)


class Run(NamedTuple):
    """A checked run: nothing computed, nothing written."""

    experiment: Experiment
    config: Any
    workdir: Path
    mesh: Mesh
    source: hf.Source  # the folder that the policy starts from
    reference: hf.Source | None  # None: the loss needs no reference
    tokenizer: Any
    train: Batches
    evaluation: Examples | None
    reports: dict[str, Report]
    steps: int
    dtype: Any
    apply: Apply
    objective: Objective
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation


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
    for name in ("batch_size", "microbatches", "max_skipped"):
        if config[name] < 1:
            raise ValueError(f"config field {name!r} is {config[name]}; it must be at least 1")
    workdir = Path(config.workdir)
    mesh = mesh or meshes.make_mesh(config.mesh)
    parts = meshes.batch_shards(mesh) * config.microbatches
    for name, size in (("batch_size", config.batch_size), ("eval.batch_size", eval_batch_size(config))):
        unit = parts if name == "batch_size" else meshes.batch_shards(mesh)
        if size % unit:
            raise ValueError(
                f"{name} {size} does not divide into {unit} parts ({meshes.batch_shards(mesh)} batch shards"
                f"{f' x {config.microbatches} microbatches' if unit == parts else ''}); use a multiple of {unit}"
            )
    source = open_model(config.model.path, config.model.init, "model.path")
    reference = None
    if experiment.experience is not None:
        reference = open_model(config.reference.path, "pretrained", "reference.path") if config.reference.path else source
        if reference.config.vocab_size != source.config.vocab_size:
            raise ValueError(
                f"the reference has a vocabulary of {reference.config.vocab_size}, the policy of {source.config.vocab_size}; "
                "they must share a tokenizer"
            )
    tokenizer = load_tokenizer(source)
    examples, reports = {}, {}
    for split in ("train", "eval"):
        if path := config.data[split]:
            examples[split], reports[split] = load_examples(path, config.data, tokenizer, source.config.vocab_size)
    if "train" not in examples:
        raise ValueError("config field 'data.train' is empty; set --config.data.train=FILE")
    multiple = 8 if jax.default_backend() == "cpu" else 128  # the tile of TPU and GPU attention
    length = max(padded_length(e, multiple) for e in examples.values())
    length = min(length, -(-config.data.max_length // multiple) * multiple)
    if length > source.config.max_position_embeddings and dict(source.config.rope_scaling).get("rope_type") != "dynamic":
        raise ValueError(
            f"rows of {length} tokens exceed the model's {source.config.max_position_embeddings} positions; lower data.max_length"
        )
    train = Batches(examples["train"], config.batch_size, config.seed, length)
    steps = config.steps or train.steps(config.epochs)
    if steps < 1:
        raise ValueError(f"epochs {config.epochs} make no step; raise epochs, or set steps")
    if config.model.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"model.dtype {config.model.dtype!r} is unknown; use auto, float32 or bfloat16")
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)
    apply = transformer.forward(source.config, dtype=dtype, remat=config.model.remat, chunk=config.model.logps_chunk, mesh=mesh)
    name = config.checkpoint.best.removeprefix("-")
    if name and not (config.data.eval and config.eval.every):
        raise ValueError(f"checkpoint.best {name!r} needs evaluations; set data.eval and eval.every")
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    objective = experiment.loss(config)
    return Run(
        experiment, config, workdir, mesh, source, reference, tokenizer, train, examples.get("eval"), reports, steps, dtype, apply,
        objective, schedule, optimizer,
    )  # fmt: skip


def open_model(path: str, init: str, field: str) -> hf.Source:
    """Opens a model folder and checks its tensors against its config."""
    if not path:
        raise ValueError(f"config field {field!r} is empty; set --config.{field}=FOLDER, a Hugging Face model folder")
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init {init!r} is unknown; use pretrained or random")
    source = hf.open_folder(path)
    if init == "pretrained":
        hf.check_tensors(source, hf.tensor_files(source.path))
    return source


def load_tokenizer(source: hf.Source) -> Any:
    """The folder's tokenizer, from local files only."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.path), local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{str(source.path)!r} has no tokenizer that transformers reads ({str(e).splitlines()[0]})") from e
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {str(source.path)!r} has no EOS token; set eos_token in its tokenizer_config.json")
    if len(tokenizer) > source.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {str(source.path)!r} has {len(tokenizer)} tokens and the embedding {source.config.vocab_size} rows; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def check_workdir(run: Run) -> None:
    """Refuses the workdir of another run."""
    workdir, experiment = run.workdir, run.experiment
    saved = workdir / "config.py"
    if saved.is_file():
        lines = difference(load_experiment(saved), experiment, FREE)
        if lines:
            raise ValueError(f"workdir {str(workdir)!r} belongs to another run ({'; '.join(lines[:4])}); choose another workdir")
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"workdir {str(workdir)!r} holds other files; choose a new or empty folder")


def eval_batch_size(config: Any) -> int:
    """Examples of an evaluation batch."""
    return config.eval.batch_size or config.batch_size


def reference_apply(run: Run) -> Apply:
    """The forward pass of the reference: the policy's own, so that equal parameters give equal numbers."""
    assert run.reference is not None
    if run.reference.config == run.source.config:
        return run.apply
    c = run.config.model
    return transformer.forward(run.reference.config, dtype=run.dtype, remat=c.remat, chunk=c.logps_chunk, mesh=run.mesh)


def state_shardings(run: Run) -> TrainState:
    """Where each leaf of the training state lives."""
    abstract = hf.abstract_params(run.source.config, run.mesh)
    params = jax.tree.map(lambda x: x.sharding, abstract)
    opt_state = jax.eval_shape(run.optimizer.init, abstract)
    one: Any = meshes.sharding(run.mesh)
    return TrainState(one, params, meshes.optimizer_shardings(run.mesh, run.optimizer, opt_state, params), one, one, one)


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and shardings of the training state; nothing is computed."""
    params = hf.abstract_params(run.source.config)
    shapes = jax.eval_shape(lambda p: init_state(p, run.optimizer, jax.random.key(0)), params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(run))
