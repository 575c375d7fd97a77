"""From an experiment to a checked run: everything that can be refused is refused here, before any compute."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from alignax import judges as judging
from alignax import mesh as meshes
from alignax import output
from alignax.averages import Average
from alignax.blame import blaming
from alignax.checkpoint import began
from alignax.checks import (
    check_averages,
    check_batches,
    check_cache,
    check_fields,
    check_head,
    check_judged,
    check_members,
    check_objective,
    check_positions,
    check_pretrain,
    check_rollout,
    check_token_kl,
)
from alignax.config import (
    HEAD,
    ROLLOUTS,
    Experiment,
    asked,
    check_kept,
    difference,
    identity,
    load_experiment,
    of_run,
    steps_of_turn,
    trunk_values,
)
from alignax.data import Batches, Examples, Report, load, padded_length
from alignax.data.files import short
from alignax.data.mixture import Loaded, Mixture, sources
from alignax.data.template import Today
from alignax.distributed import is_main
from alignax.generate import policy_config, stops_of
from alignax.judges import Judge
from alignax.losses.algebra import Objective
from alignax.models import hf, lora, peft, transformer
from alignax.models.lora import Lora
from alignax.models.small_files import chat_template, small_files, tokenizer_parts
from alignax.models.tokenizers import check_token, check_tokenizer, load_tokenizer
from alignax.optim import make_optimizer, make_schedule
from alignax.rewards import check_one_score, open_ensemble
from alignax.train import Apply
from alignax.workers import Workers

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
    "rollout.reward_workers",
    "rollout.timeout",
    "rollout.bad_rewards",
)
STORED = "stored_ref_logps"  # the batch field that a cache of the reference brings


class Run(NamedTuple):
    """A checked run: nothing computed, nothing written."""

    experiment: Experiment
    config: Any
    workdir: Path
    mesh: Mesh
    source: hf.Source  # the folder that the policy starts from
    reference: hf.Source | None  # None: no experience asks for one
    lora: Lora | None  # adapters, which alone are trained
    critic: hf.Source | None  # the folder of a critic of its own tree
    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a completion, see `hf.end_ids`
    unused: tuple[tuple[int, int], ...]  # those that are never sampled, see `hf.with_vocabulary`
    train: Batches  # of an ensemble those of its first member
    pretrain: Batches | None  # of the loss called "pretrain"
    judges: list[hf.Source]  # reward models that experience asks for as `ensemble`
    judge: Judge | None  # how they read samples; None: as the policy has them
    members: int  # of an ensemble that is trained; 0: one model
    evaluation: Examples | None
    reports: dict[str, Report]
    steps: int
    dtype: Any
    apply: Apply
    objective: Objective  # online of rollouts
    beside: dict[str, Objective]  # those of further batches, by name
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    averages: dict[str, Average]
    workers: Workers  # that call its reward functions


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
    mesh = mesh or meshes.make_mesh(config.mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    check_batches(config, mesh)
    models = open_models(experiment, mesh)
    source, reference = models.source, models.reference
    if not config.data.train:
        raise ValueError("config field 'data.train' is empty; set --config.data.train=FILE")
    ends = hf.end_ids(source, models.tokenizer)
    Today.day = began(Path(config.workdir))  # a run that goes on tomorrow has the same rows
    loaded = {
        split: load(split, config.data, models.tokenizer, source.config.vocab_size, ends, experiment.row)
        for split in ("train", "eval", "pretrain")
        if config.data[split]
    }
    judge, every = judged(experiment, models, ends, loaded)
    examples = {split: own for split, own in every.items() if split != "pretrain"}
    reports = {
        split if len(data.reports) == 1 else f"{split} ({path})": report
        for split, data in loaded.items()
        for path, report in data.reports.items()
    }
    readers = [source, *filter(None, (reference if reference is not source else None, models.critic))]
    for model in readers:
        check_positions(config, model, examples, every if model is source else examples)
    if config.reference.cache:  # shapes of what is read or computed before the first step
        place = lambda e: dataclasses.replace(e, token_fields={STORED: np.zeros(len(e.tokens), np.float32)})
        examples = {split: place(e) for split, e in examples.items()}
    check_rollout(config, readers, experiment, examples)
    for strings in (config.rollout.stop, config.eval.stop):
        stops_of(models.tokenizer, strings)  # refuses those that cannot occur
    train, pretrain = streams(config, examples, every, {split: data.mixture for split, data in loaded.items()}, 8 if on_cpu else 128)
    steps = step_count(config, train)
    dtype = compute_dtype(config, mesh)
    apply = make_apply(dataclasses.replace(source.config, lora=models.lora), config, dtype, mesh)
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    objectives, averages = learning(experiment)
    check_averages(config, averages, reference)
    check_cache(config, averages, reference)
    beside = {name: objective for name, objective in objectives.items() if name != ROLLOUTS}
    for line in notices(models, config.lora.path, config.rollout.samples > 0) if is_main() else ():
        print(f"notice: {line}", file=sys.stderr)
    return Run(
        experiment, config, Path(config.workdir), mesh, source, reference, models.lora, models.critic, models.tokenizer, ends,
        models.unused, train, pretrain, models.judges, judge, config.ensemble.members, examples.get("eval"), reports, steps, dtype, apply,
        objectives[ROLLOUTS], beside, schedule, optimizer, averages,
        Workers(experiment.file, config, config.rollout.reward_workers, config.rollout.timeout),
    )  # fmt: skip


class Models(NamedTuple):
    """The models of a run, checked and not loaded; see `Run`."""

    source: hf.Source
    reference: hf.Source | None
    lora: Lora | None
    critic: hf.Source | None
    judges: list[hf.Source]
    tokenizer: Any
    unused: tuple[tuple[int, int], ...]


def open_models(experiment: Experiment, mesh: Mesh) -> Models:
    """Opens the folders that a run reads, and refuses those that do not go together."""
    config = experiment.config
    source = open_model(config.model.path, config.model.init, "model.path")
    source = hf.with_heads(source, config.model.num_labels, trunk_values(config))
    check_head(config, source, experiment)
    check_members(config, mesh)
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    if source.config.num_labels:  # an export says what it pads with
        check_token("pad token", source.path, tokenizer.pad_token_id, source.config.vocab_size)
    unused = hf.with_vocabulary(source, tokenizer).config.unused_tokens
    source = spoken(config, source, unused)
    reference = open_reference(config, source, tokenizer, unused) if "reference" in asked(experiment.experience) else None
    if config.reference.path and reference is None:
        raise ValueError("reference.path is set and no reference is held; let experience(..) ask for reference, or leave it empty")
    if config.reference.token_kl:
        check_token_kl(source, reference)
    adapters = make_lora(config, source)
    if config.lora.path:
        peft.weights(Path(config.lora.path))
        if tokenizer_parts(Path(config.lora.path))[:-2]:
            check_tokenizer(Path(config.lora.path), source.config.vocab_size, f"lora.path {config.lora.path!r}", source, tokenizer)
    critic = open_critic(config)
    if critic is not None:
        check_tokenizer(critic.path, critic.config.vocab_size, f"model.critic {config.model.critic!r}", source, tokenizer)
    judges = open_judges(config) if "ensemble" in asked(experiment.experience) else []
    if config.reward.path and not judges:
        raise ValueError("reward.path is set and no reward model is asked for; let experience(..) ask for ensemble, or leave it empty")
    return Models(source, reference, adapters, critic, judges, tokenizer, unused)


def judged(
    experiment: Experiment, models: Models, ends: tuple[int, ...], loaded: dict[str, Loaded]
) -> tuple[Judge | None, dict[str, Examples]]:
    """How the reward models read samples, and every split, with what they read of rows where that is not what the policy does."""
    config, judges, every = experiment.config, models.judges, {split: data.examples for split, data in loaded.items()}
    if not judges:
        return None, every
    own, read = load_tokenizer(judges[0].path, judges[0].config.vocab_size), {s: x for s, x in loaded.items() if s != "pretrain"}
    if not config.rollout.samples:
        every |= judging.of_data(config, judges[0], own, models.tokenizer, read, experiment.row)
        judge, shared = None, [every[split] for split in read if every[split].judge is None]
    else:
        prompts = [data.examples for data in read.values()]
        judge = judging.of_rollouts(config, judges[0], own, models.tokenizer, ends, prompts)
        shared = prompts if judge is None else []
    if shared:
        check_judged(config, judges[0], shared)
    return judge, every


def learning(experiment: Experiment) -> tuple[dict[str, Objective], dict[str, Average]]:
    """The losses of an experiment by the batch that they are of, a single one of rollouts, and its averages."""
    config, file = experiment.config, experiment.file
    with blaming(file):
        given = experiment.loss(config)
        averages = {} if experiment.averages is None else experiment.averages(config)
    if not isinstance(averages, Mapping):
        raise ValueError(f'averages() of {file} returns {averages!r}; return averages by name, {{"ema": ema(0.999)}} say')
    check_objective(given, file)
    check_pretrain(config, given, file)
    return dict(given) if isinstance(given, Mapping) else {ROLLOUTS: given}, dict(averages)


def streams(
    config: Any, examples: dict[str, Examples], every: dict[str, Examples], mixtures: Mapping[str, Mixture | None], tile: int
) -> tuple[Batches, Batches | None]:
    """The batches of training, in rows that hold evaluation data and samples too, and those of `data.pretrain`, if there are any.

    Lengths of rows are multiples of `tile`, which TPU and GPU attention asks for.
    """
    length = max(padded_length(e, tile) for e in examples.values())
    if config.rollout.samples:
        longest = max(int(e.prompt_lengths.max()) for e in examples.values())
        length = -(-(longest + max(config.rollout.max_new_tokens, config.eval.max_new_tokens)) // tile) * tile
    drawn = {
        "shuffle": config.data.order != "file",
        "bootstrap": config.ensemble.bootstrap,
        "noise": config.data.label_noise,
        "noise_seed": config.seed,
    }
    train = Batches(examples["train"], config.batch_size, config.seed, length, mixtures["train"], **drawn)
    if not config.data.pretrain:
        return train, None
    own = every["pretrain"]
    return train, Batches(own, config.batch_size, config.seed, padded_length(own, tile), mixtures["pretrain"])


def step_count(config: Any, train: Batches) -> int:
    """Training steps: `steps`, or as many as `epochs` take; whole rollouts."""
    turn = steps_of_turn(config)
    steps = config.steps or -(-train.steps(config.epochs) * (config.rollout.epochs if config.rollout.samples else 1) // turn) * turn
    if steps < 1:
        raise ValueError(f"epochs {config.epochs} make no step; raise epochs, or set steps")
    if steps % turn:
        raise ValueError(f"steps {steps} do not divide into rollouts of {turn} steps (minibatches x epochs); use a multiple of {turn}")
    return steps


def spoken(config: Any, source: hf.Source, unused: tuple[tuple[int, int], ...]) -> hf.Source:
    """A policy or a reference whose samples are scored: its distribution is the one that is sampled from.

    Without rollouts it is the model's own, over all rows of its head, as transformers has it: data are scored, which hold no other tokens.
    """
    if not config.rollout.samples:
        return source
    return source._replace(config=policy_config(source.config, config.rollout.temperature, unused))


def open_reference(config: Any, source: hf.Source, tokenizer: Any, unused: tuple[tuple[int, int], ...]) -> hf.Source:
    """The model of `reference.path`, or the one that the policy starts from."""
    if not config.reference.path:
        return source
    reference = spoken(config, open_model(config.reference.path, "pretrained", "reference.path"), unused)
    if reference.config.vocab_size != source.config.vocab_size:
        raise ValueError(
            f"the reference has a vocabulary of {reference.config.vocab_size}, the policy of {source.config.vocab_size}; "
            "they must share a tokenizer"
        )
    if tokenizer_parts(reference.path)[:-2]:  # a folder of weights alone is taken at its size
        check_tokenizer(reference.path, reference.config.vocab_size, f"reference.path {config.reference.path!r}", source, tokenizer)
    return reference


def paths_of(text: str) -> list[str]:
    """The paths of a text with commas between them."""
    return [path.strip() for path in text.split(",")]


def open_judges(config: Any) -> list[hf.Source]:
    """The reward models of `reward.path`."""
    if not config.reward.path:
        raise ValueError("experience(..) asks for ensemble and config field 'reward.path' is empty; set --config.reward.path=FOLDER,FOLDER")
    judges = open_ensemble(paths_of(config.reward.path))
    check_one_score(judges[0])
    return judges


def open_critic(config: Any) -> hf.Source | None:
    """The folder that `model.critic` names, as a reward model with a score for every value; None, where it names none."""
    c = config.model
    return None if c.critic in ("", HEAD) else hf.with_heads(open_model(c.critic, "pretrained", "model.critic"), c.critic_heads)


def compute_dtype(config: Any, mesh: Mesh) -> Any:
    """The dtype of activations."""
    auto = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)


def open_model(path: str, init: str, field: str) -> hf.Source:
    """Opens a model folder, or a soup of several, and checks its tensors against its config."""
    if not path:
        raise ValueError(f"config field {field!r} is empty; set --config.{field}=FOLDER, a Hugging Face model folder")
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init {init!r} is unknown; use pretrained or random")
    source = open_source(path, field)
    hf.stop_ids(source)  # refuses what is no token
    small_files(source.path)
    if init == "pretrained":
        for part, _ in hf.ingredients(source):
            hf.check_tensors(part, hf.tensor_files(part))
    elif source.soup:
        raise ValueError(f"{field} {path!r} is a mean of weights, and model.init 'random' reads none; name one folder")
    return source


def open_source(text: str, field: str) -> hf.Source:
    """The folder that a field names, or the soup of several: `FOLDER@0.5,OTHER@0.5`. The weights stay on disk."""
    named = sources(text, field)
    if all(share is not None for _, share in named):
        return hf.make_soup([(hf.open_folder(path), share) for path, share in named if share is not None])
    if len(named) > 1:
        raise ValueError(f"{field} {text!r} names several models; give each its share of the mean, as in FOLDER@0.5,OTHER@0.5")
    return hf.open_folder(text)


def make_lora(config: Any, source: hf.Source) -> Lora | None:
    """The adapters that a config asks for, their patterns resolved to matrices of the model."""
    c = config.lora
    if c.path:
        given = peft.read_config(Path(c.path), source)[0]
        if c.rank not in (0, given.rank):
            raise ValueError(f"lora.rank is {c.rank}, and the adapters in lora.path {c.path!r} have rank {given.rank}; set it to 0")
        return dataclasses.replace(given, int8=c.int8)
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


def notices(models: Models, adapters: str = "", online: bool = False) -> list[str]:
    """What a user should know of the models of a run, and of the folder of adapters that it goes on from; none of it stops the run."""
    source, critic, lines = models.source, models.critic, []
    if beyond := sorted((i, token) for token, i in models.tokenizer.get_vocab().items() if i >= source.config.vocab_size):
        shown = ", ".join(f"{short(token)} ({i})" for i, token in beyond[:3])
        lines.append(
            f"the tokenizer in {str(source.path)!r} has {len(beyond)} tokens beyond the {source.config.vocab_size} rows of the embedding, "
            f"{shown}{' ..' if beyond[3:] else ''}; texts with them are refused"
        )
    if online and (unread := hf.unread(source)):
        lines.append(f"{hf.GENERATION} in {str(source.path)!r} asks for {unread}; rollouts are sampled as the config says, without it")
    for field, model in (("model.num_labels", source), ("model.critic", critic)):
        if model is not None and model.stored.num_labels not in (0, model.config.num_labels):
            lines.append(
                f"the head in {str(model.path)!r} gives {model.stored.num_labels} scores, and {field} asks for {model.config.num_labels}: "
                "it is left out, and a head begins anew"
            )
    if adapters and (theirs := chat_template(Path(adapters))) is not None and theirs != chat_template(source.path):
        lines.append(
            f"the chat template in lora.path {adapters!r} is another than the one in {str(source.path)!r}, which is used; put the "
            "adapters' chat_template.jinja into that folder, if conversations are to read as they were trained on"
        )
    if adapters and (end := tokenizer_parts(Path(adapters))[-1]) not in (None, models.tokenizer.eos_token):
        lines.append(
            f"the tokenizer in lora.path {adapters!r} ends texts with {short(end)}, and the one in {str(source.path)!r}, which is used, "
            f"with {short(models.tokenizer.eos_token)}; set eos_token in the latter's tokenizer_config.json, if they are to end as trained"
        )
    return lines


def origin(experiment: Experiment) -> str:
    """What a run writes into the folders of its models, to know them again."""
    return f"run {identity(experiment, FREE)}"


def check_workdir(run: Run) -> None:
    """Refuses the workdir of another run, and one that cannot be written."""
    workdir, experiment = run.workdir, run.experiment
    check_kept(experiment)
    if "\\" in str(workdir.absolute()):  # tensorstore reads it as a slash: the arrays would go into another folder
        raise ValueError(f"workdir {str(workdir)!r} has a backslash, which checkpoints take for a slash; choose another name")
    saved = workdir / "config.py"
    place = output.standing(workdir)
    if of_run(saved):
        lines = difference(load_experiment(saved), experiment, FREE)
        if lines:
            raise ValueError(f"workdir {str(workdir)!r} belongs to another run ({'; '.join(lines[:4])}); choose another workdir")
    elif not place.is_dir():
        raise ValueError(f"workdir {str(workdir)!r} cannot be a folder: {str(place)!r} is a file; choose another workdir")
    elif place == workdir and any(p.name != output.LOCK and not output.unfinished(p) for p in workdir.iterdir()):
        raise ValueError(f"workdir {str(workdir)!r} holds other files; choose a new or empty folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"workdir {str(workdir)!r} cannot be written: {str(place)!r} is closed to you; choose another workdir")
    for folder in exports(run) if run.config.export.final else ():
        output.claim(folder, origin(experiment), remedy="move it away")


def exports(run: Run) -> list[Path]:
    """The folders that a run writes at its end: `export`, of adapters also `adapter`, of an ensemble one in each for every member."""
    kinds = ["adapter", "export"] if run.lora is not None and run.lora.targets else ["export"]
    members = [f"member_{k}" for k in range(run.members)] or [""]
    return [run.workdir / kind / name for kind in kinds for name in members]


def make_apply(model: transformer.ModelConfig, config: Any, dtype: Any, mesh: Mesh, teacher: Any = None) -> Apply:
    """A forward pass as the config wants it."""
    c, mixture = config.model, (config.reference.jsd_beta, config.reference.jsd_temperature)
    return transformer.forward(model, dtype=dtype, remat=c.remat, chunk=c.logps_chunk, mesh=mesh, teacher=teacher, mixture=mixture)
