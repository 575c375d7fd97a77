"""Makes a checked run from an experiment: all that can be refused is refused here, before any computation."""

import dataclasses
import datetime
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax import output, paths
from alignax.averages import Average
from alignax.config import (
    DATA,
    PRETRAIN,
    ROLLOUTS,
    Experiment,
    asked,
    check_kept,
    difference,
    identity,
    load_experiment,
    of_run,
    steps_of_turn,
)
from alignax.config.blame import blaming
from alignax.data import Batches, Examples, Report, load, padded_length
from alignax.data.mixture import Loaded
from alignax.data.template import dated
from alignax.distributed import is_main
from alignax.generate import Generator, stops_of
from alignax.host.functions import models_asked
from alignax.host.workers import Workers
from alignax.losses.algebra import Objective
from alignax.models import hf
from alignax.models.reward import CRITIC
from alignax.models.rope import shares_prompts
from alignax.models.tokenizers import load_tokenizer
from alignax.optim import make_optimizer, make_schedule, own_optimizer
from alignax.packing import Packing
from alignax.rewards import judge as judging
from alignax.rewards.judge import Judge
from alignax.run.checkpoint import began, unlisted
from alignax.run.checks import (
    check_averages,
    check_batches,
    check_cache,
    check_fields,
    check_judged,
    check_moments,
    check_objective,
    check_positions,
    check_pretrain,
    check_profile,
    check_rollout,
)
from alignax.run.external import External
from alignax.run.memory import fitting, held, part_shape
from alignax.run.opening import Vocabulary, notices, open_models, without_idle_reference
from alignax.run.roles import GOLD, POLICY, REFERENCE, Role, abstract_frozen, kernel, models
from alignax.run.sampling import make_samplers
from alignax.run.stored import FOLDER, cache_folder, placed

# Fields that may change when a run is resumed: they say where and how something is computed or reported, not what is computed; and how long
# the run is, which `check_length` restricts.
FREE = (
    "steps",
    "epochs",
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
    "model.attention",
    "model.packing",
    "reference.cache",
    "rollout.mesh",
    "rollout.reward_workers",
    "rollout.timeout",
    "rollout.bad_rewards",
)


PAYS = {"cpu": 0.75}  # rows that fill less of their padded positions than this are packed; elsewhere 0.5, since padded rows have kernels


class Data(NamedTuple):
    """The data of a run."""

    train: Batches  # for an ensemble, the batches of its first member
    pretrain: Batches | None  # batches of the loss called "pretrain"
    evaluation: Examples | None
    reports: dict[str, Report]

    @property
    def evaluated(self) -> Examples:
        """The examples whose prompts evaluations sample: the evaluation data, or else the training data."""
        return self.evaluation or self.train.examples


class Learning(NamedTuple):
    """The losses, the optimizer with its schedule, and the averages of a run."""

    objectives: dict[str, Objective]  # losses by name; the first is that of the data or of rollouts, see `by_batch`
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    averages: dict[str, Average]

    @property
    def objective(self) -> Objective:
        """The first loss, which is that of the data or of rollouts."""
        return next(iter(self.objectives.values()))


class Run(NamedTuple):
    """A checked run. Nothing is computed or written yet."""

    experiment: Experiment
    config: Any
    workdir: Path
    mesh: Mesh
    roles: dict[str, Role]  # the models by name
    judges: dict[str, Judge]  # by role: how reward models, and language models of another tokenizer, read samples
    words: Vocabulary
    data: Data
    learning: Learning
    steps: int
    workers: Workers  # the processes that call reward functions
    samplers: dict[str, Generator | External]  # the generators by name, see `alignax.run.sampling`
    packing: Packing | None  # how rows are packed; None: they are padded
    cache: Path | None  # folder of the reference's log-probs of the data; None: they are computed in every step
    day: datetime.date  # the day that chat templates are told, on which the run began
    remat: str  # in words, what `model.remat` "auto" chose, and why; empty for a policy by name

    @property
    def readers(self) -> dict[str, Judge]:
        """The judges of those reward models that the experience or the loss asks for, by the role's name."""
        asks = (*asked(self.experiment.experience), *asked(self.experiment.loss)[1:])
        return {name: judge for name, judge in self.judges.items() if name in asks}

    @property
    def policy(self) -> Role:
        """The role of the policy, which is trained."""
        return self.roles[POLICY]

    @property
    def source(self) -> hf.Source:
        """The folder that the policy starts from."""
        return self.policy.source

    @property
    def train(self) -> Batches:
        """The training batches; for an ensemble, the batches of its first member."""
        return self.data.train


def prepare(experiment: Experiment, mesh: Mesh | None = None) -> Run:
    """Makes a checked run: reads config, data and model descriptions, and refuses what cannot work.

    Args:
      experiment: the experiment to run.
      mesh: the mesh to run on; default: the config's mesh over the devices at hand.

    Raises:
      ValueError: for anything that cannot work; the message has the value and the remedy.
    """
    config = experiment.config
    if not config.workdir:
        raise ValueError("config field 'workdir' is empty; set --config.workdir=runs/NAME")
    check_fields(config)
    check_moments(experiment)
    if chooses := config.model.remat == "auto":
        experiment = recomputing(experiment, "full")  # until all that the choice depends on is known
        config = experiment.config
    mesh = mesh or meshes.make_mesh(config.mesh)
    check_batches(config, mesh)
    roles, words = open_models(experiment, mesh)
    source, reference = roles[POLICY].source, roles.get(REFERENCE)
    if not config.data.train:
        raise ValueError("config field 'data.train' is empty; set --config.data.train=FILE")
    day = began(paths.of(config.workdir))  # templates may read the day: a run that goes on tomorrow keeps its rows
    words = words._replace(tokenizer=dated(words.tokenizer, day))
    whole = source.config.num_labels > 0 or bool(scoring(roles))  # reward models also read what a template writes after the EOS
    loaded = {
        split: load(
            split, config.data, words.tokenizer, source.config.vocab_size, words.ends, experiment.row, whole and split != "pretrain"
        )
        for split in ("train", "eval", "pretrain")
        if config.data[split]
    }
    judges, every = judged(experiment, roles, words, loaded, day)
    examples = {split: own for split, own in every.items() if split != "pretrain"}
    readers = [source, *(roles[name].source for name in (REFERENCE, CRITIC) if name in roles and roles[name].source is not source)]
    for model in readers:
        check_positions(config, model, examples, every if model is source else examples)
    check_rollout(config, readers, experiment, examples)
    for strings in (config.rollout.stop, config.eval.stop):
        stops_of(words.tokenizer, strings)  # refuses stop strings that cannot occur
    data = streams(config, examples, every, loaded, 8 if mesh.devices.flat[0].platform == "cpu" else 128)
    steps = step_count(config, data.train)
    check_profile(config, steps)
    schedule = make_schedule(config.optimizer, steps)
    optimizer = own_optimizer(experiment, schedule) if experiment.optimizer else make_optimizer(config.optimizer, schedule)
    packing = make_packing(config, roles, mesh, data.train)
    objectives, averages = learning(experiment, roles, mesh)
    remat = ""
    if chooses:
        shape = part_shape(config, mesh, packing, config.rollout.samples or data.train.examples.N, data.train.length)
        chosen, remat = fitting(config, roles, mesh, optimizer, len(averages), shape)
        experiment = recomputing(experiment, chosen)
        config, (roles, _) = experiment.config, open_models(experiment, mesh)
        objectives, averages = learning(experiment, roles, mesh)
    check_averages(config, averages, reference, (*models_asked(experiment), *asked(experiment.speaker)))
    check_cache(config, averages, reference)
    if cache := cache_folder(experiment, roles, averages, data.train, steps):
        train = dataclasses.replace(data.train, examples=placed(data.train.examples))
        data, roles = (
            data._replace(train=train, evaluation=data.evaluation and placed(data.evaluation)),
            without_idle_reference(experiment, roles),
        )
    for role in roles.values():
        for block in (0,) if packing is None else (0, packing.block):
            kernel(role, config, mesh, data.train.length, block)  # refuses a kernel whose conditions do not hold
    for line in notices(roles, words.tokenizer, config.lora.path, config.rollout.samples > 0) if is_main() else ():
        print(f"notice: {line}", file=sys.stderr)
    taken = lambda: held(roles, mesh, optimizer, len(averages))
    return Run(
        experiment, config, paths.of(config.workdir), mesh, roles, judges, words, data,
        Learning(objectives, schedule, optimizer, averages), steps,
        Workers(experiment.file, config, config.rollout.reward_workers, config.rollout.timeout),
        make_samplers(experiment, roles, words, mesh, data.train.examples, data.evaluated, taken),
        packing, cache, day, remat,
    )  # fmt: skip


def recomputing(experiment: Experiment, remat: str) -> Experiment:
    """The experiment with another `model.remat`."""
    config = experiment.config.copy_and_resolve_references()
    config.model.remat = remat
    return experiment._replace(config=config)


def scoring(roles: dict[str, Role]) -> dict[str, Role]:
    """The frozen reward models of a run, by name."""
    return {name: role for name, role in roles.items() if role.members and not role.trained}


def judged(
    experiment: Experiment, roles: dict[str, Role], words: Vocabulary, loaded: dict[str, Loaded], day: datetime.date
) -> tuple[dict[str, Judge], dict[str, Examples]]:
    """The judges, which say how models read samples as text, and every split, with tokens of their own for reward models that need them."""
    config, read = experiment.config, [split for split in loaded if split != "pretrain"]
    # Only models that read samples as text need conversations.
    every = {split: dataclasses.replace(data.examples, conversations=[]) for split, data in loaded.items()}
    judges, asks, functions = {}, (*asked(experiment.experience), *asked(experiment.loss)[1:]), (GOLD, *models_asked(experiment))
    for name, role in (scoring(roles) | {name: role for name, role in roles.items() if role.reads_text}).items():
        own = dated(load_tokenizer(role.source.path, role.source.config.vocab_size), day)
        if config.rollout.samples or name in functions:
            judges[name] = judging.of_rollouts(config, name, role.source, own, words.tokenizer, [loaded[split].examples for split in read])
        if not config.rollout.samples and name in asks:
            bare = {split: loaded[split]._replace(examples=every[split]) for split in read}
            every |= judging.of_data(config, name, role.source, own, words.tokenizer, words.ends, bare, experiment.row)
            if shared := [every[split] for split in read if name not in every[split].others]:
                check_judged(role.source, shared)
    if judges:
        every |= {split: dataclasses.replace(every[split], conversations=loaded[split].examples.conversations) for split in read}
    return judges, every


def learning(experiment: Experiment, roles: dict[str, Role], mesh: Mesh) -> tuple[dict[str, Objective], dict[str, Average]]:
    """The losses of an experiment by the name of their batch, and its averages; models that losses ask for are shapes here."""
    config, file = experiment.config, experiment.file
    given = models(roles, abstract_frozen(roles, mesh), None)
    with blaming(file):
        loss = experiment.loss(config, **{name: given[name] for name in asked(experiment.loss)[1:]})
        averages = {} if experiment.averages is None else experiment.averages(config)
    if not isinstance(averages, Mapping):
        raise ValueError(f'averages() of {file} returns {averages!r}; return averages by name, for example {{"ema": ema(0.999)}}')
    check_objective(loss, file)
    check_pretrain(config, loss, file, experiment.combine is not None)
    return by_batch(config, loss), dict(averages)


def by_batch(config: Any, loss: Any) -> dict[str, Objective]:
    """The losses that loss(..) returns, by name: "data" or "rollouts" first, "pretrain" last; other names if gradients are combined."""
    first = ROLLOUTS if config.rollout.samples else DATA
    return (
        dict(sorted(loss.items(), key=lambda own: (own[0] == PRETRAIN) - (own[0] == first))) if isinstance(loss, Mapping) else {first: loss}
    )


def streams(config: Any, examples: dict[str, Examples], every: dict[str, Examples], loaded: dict[str, Loaded], tile: int) -> Data:
    """The data of a run: training batches, in rows long enough for evaluation data and samples, and batches of `data.pretrain`.

    The length of rows is a multiple of `tile`, as TPU and GPU attention requires.
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
    train = Batches(examples["train"], config.batch_size, config.seed, length, loaded["train"].mixture, **drawn)
    pretrain = None
    if config.data.pretrain:
        own = every["pretrain"]
        pretrain = Batches(own, config.batch_size, config.seed, padded_length(own, tile), loaded["pretrain"].mixture)
    reports = {
        split if len(own.reports) == 1 else f"{split} ({path})": report
        for split, own in loaded.items()
        for path, report in own.reports.items()
    }
    return Data(train, pretrain, examples.get("eval"), reports)


def make_packing(config: Any, roles: dict[str, Role], mesh: Mesh, train: Batches) -> Packing | None:
    """How the rows of a run are packed; None where they are padded.

    Rows are padded where `model.packing` is -1, and by default where packed parts would hold hardly fewer positions. On a mesh with a
    context axis they are packed.

    Raises:
      ValueError: for padded rows on a mesh with a context axis.
    """
    wanted, cpu = config.model.packing, mesh.devices.flat[0].platform == "cpu"
    shared = all(shares_prompts(role.config) for role in roles.values())
    context = mesh.shape["context"]
    if wanted < 0 and context > 1:
        raise ValueError(
            f"model.packing=-1 pads rows, and mesh.context={context} shards packed rows only; use model.packing=0, or mesh.context=1"
        )
    if wanted < 0:
        return None
    online, least = config.rollout.samples > 0, 1024 if cpu else 8192
    N = config.rollout.samples or train.examples.N
    padded = config.batch_size // meshes.batch_shards(mesh) * N * train.length // config.microbatches  # positions of a microbatch
    positions = min(wanted or least, padded)
    if online and not wanted:  # as many of the longest groups, each with its prompt once, as make twice `least` or fit into a microbatch
        group = int(train.examples.prompt_lengths.max()) + N * config.rollout.max_new_tokens
        positions = group * max(1, min(padded // group, -(-2 * least // group)))
    packing = Packing(max(positions, 1), mesh, shared, 64 if cpu else 256)
    pays = PAYS.get(mesh.devices.flat[0].platform, 0.5)
    return packing if wanted or online or context > 1 or real_share(train.examples, train.length, shared) < pays else None


def real_share(examples: Examples, length: int, shared: bool) -> float:
    """The share of the positions of padded rows that are tokens; with `shared`, without the copies of an example's prompt."""
    repeated = examples.prompt_lengths.sum() * (1 - 1 / examples.N) if shared else 0
    return float(examples.lengths.sum() - repeated) / (len(examples.lengths) * length)


def step_count(config: Any, train: Batches) -> int:
    """The number of training steps: `steps`, or as many as `epochs` take, always in whole rollouts."""
    turn = steps_of_turn(config)
    steps = config.steps or -(-train.steps(config.epochs) * (config.rollout.epochs if config.rollout.samples else 1) // turn) * turn
    if steps < 1:
        raise ValueError(f"epochs {config.epochs} make no step; raise epochs, or set steps")
    if steps % turn:
        raise ValueError(f"steps {steps} do not divide into rollouts of {turn} steps (minibatches x epochs); use a multiple of {turn}")
    return steps


def origin(experiment: Experiment) -> str:
    """The text that a run writes into the folders that it exports, to recognise them later."""
    return f"run {identity(experiment, FREE)}"


def check_workdir(run: Run) -> None:
    """Refuses a workdir that belongs to another run, holds other files, or cannot be written."""
    workdir, experiment = run.workdir, run.experiment
    check_kept(experiment)
    if "\\" in str(workdir.absolute()):  # tensorstore reads it as a slash: the arrays would go into another folder
        raise ValueError(f"workdir {str(workdir)!r} has a backslash, which checkpoints would read as a slash; choose another name")
    saved, far = workdir / "config.py", paths.remote(workdir) is not None
    if far and (why := output.closed(saved) or unlisted(workdir)):
        raise ValueError(f"workdir {str(workdir)!r} cannot be written: {why}")
    place = workdir if far else output.standing(workdir)
    if of_run(saved):
        if begun(workdir):
            old = load_experiment(saved)
            if lines := difference(old, experiment, FREE):
                raise ValueError(f"workdir {str(workdir)!r} belongs to another run ({'; '.join(lines[:4])}); choose another workdir")
            check_length(run, step_count(old.config, run.train))
    elif place.is_file() or not (far or place.is_dir()):
        raise ValueError(f"workdir {str(workdir)!r} cannot be a folder: {str(place)!r} is a file; choose another workdir")
    elif place == workdir and any(p.name != output.LOCK and not output.unfinished(p) for p in workdir.iterdir()):
        raise ValueError(f"workdir {str(workdir)!r} holds other files; choose a new or empty folder")
    if not far and not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"workdir {str(workdir)!r} cannot be written: you have no write permission for {str(place)!r}; choose another workdir"
        )
    for folder in exports(run) if run.config.export.final else ():
        output.claim(folder, origin(experiment), remedy="move it away")


def check_length(run: Run, before: int) -> None:
    """Lets the run in a workdir, of `before` steps until now, grow, with a notice; refuses to shorten it."""
    if run.steps < before:
        raise ValueError(
            f"workdir {str(run.workdir)!r} belongs to another run ({before} steps there, {run.steps} now): a run may grow, but not shrink; "
            f"set --config.steps={before} or more, or choose another workdir"
        )
    if run.steps > before and is_main():
        print(
            f"notice: the run grows from {before} to {run.steps} steps; in the steps already taken, the learning rate and other schedules "
            f"followed the old total, and from now on they follow the new one",
            file=sys.stderr,
        )


def begun(workdir: Path) -> bool:
    """Whether a run has made anything in its workdir but its config.py and log-probs of the reference, which a run that was stopped while
    it was prepared leaves there."""
    made = (path for path in workdir.rglob("*") if path.name not in ("config.py", output.LOCK))
    return any(path.is_file() and path.stat().st_size for path in made if path.relative_to(workdir).parts[0] != FOLDER)


def exports(run: Run) -> list[Path]:
    """The folders that a run exports at its end: `export`, with adapters also `adapter`; in each, one folder per ensemble member."""
    kinds = ["adapter", "export"] if run.policy.lora is not None and run.policy.lora.targets else ["export"]
    members = [f"member_{k}" for k in range(run.policy.members)] or [""]
    return [run.workdir / kind / name for kind in kinds for name in members]
