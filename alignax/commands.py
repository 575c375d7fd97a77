"""What the commands do. Bad input is told apart from failures: it is found in `prepare`, before any compute."""

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alignax import distributed, output, plan, rewards
from alignax.blame import blaming
from alignax.checkpoint import Checkpoints
from alignax.config import BadInput, Experiment, code, default_config, eval_batch_size, flat, load_experiment, set_field, trunk_values
from alignax.data import Examples, check, load, load_examples, padded_length
from alignax.data.mixture import sources
from alignax.distributed import is_main, together
from alignax.evaluate import Evaluation
from alignax.fit import fit, members_of, merged
from alignax.generate import Generator, Stops, console, shape_for
from alignax.generate.console import Request
from alignax.generate.generator import check_room
from alignax.mesh import make_mesh
from alignax.metrics import Log, table
from alignax.models import hf
from alignax.models.reward import CRITIC
from alignax.models.tensorfiles import check_finite
from alignax.prepare import (
    Run,
    check_workdir,
    compute_dtype,
    load_tokenizer,
    make_lora,
    open_critic,
    open_model,
    open_source,
    origin,
    prepare,
)
from alignax.programs import abstract_models
from alignax.ridge import fit_ridge
from alignax.start import check_same, check_step, described, fingerprint, start
from alignax.types import Params

# How samples of a policy are read, whatever data a reward model was trained on.
SAMPLES = (
    "data.kind=sft", "data.bad_rows=drop", "data.limit=0", "data.columns.prompt=prompt", "data.columns.completion=completion",
    "data.columns.margin=", "data.columns.attributes=", "data.columns.system=", "data.format=", "data.order=",
)  # fmt: skip


@contextmanager
def refusing() -> Iterator[None]:
    """Marks the errors of bad input, so that they are told apart from failures of a run."""
    try:
        yield
    except BadInput:
        raise
    except (ValueError, OSError) as e:
        raise BadInput(str(e)) from e


def train(file: str, overrides: Sequence[str], dry: bool) -> None:
    """`alignax train`."""
    with refusing():
        distributed.initialize()
        with together():
            experiment = load_experiment(file, overrides)
            check_moved(experiment, overrides)
        distributed.check_alike({"experiment": code(experiment)})
    if dry:
        with refusing():
            if experiment.main is not None and not experiment.config.model.path:
                raise ValueError(f"{file} runs several stages, each with a config of its own; --dry-run shows a single run")
            planned = checked(experiment)
            check_step(planned)
            print(plan.describe(planned))
    elif experiment.main is not None:
        with blaming(experiment.file, own=True):
            experiment.main(experiment)
    else:
        run(experiment)


def run(experiment: Experiment) -> dict[str, dict[str, float]]:
    """The single run that an experiment describes, or what is left of it; returns its evaluation metrics before and after."""
    with refusing():
        started = start(checked(experiment))
    return fit(started)


def checked(experiment: Experiment) -> Run:
    """A run that may write into its workdir."""
    with together():
        run = prepare(experiment)
        check_workdir(run)
    return run


def check_moved(experiment: Experiment, overrides: Sequence[str]) -> None:
    """Refuses the config.py of a workdir that says another one, which would begin there anew; an override says what is meant."""
    here, said = experiment.file.parent, experiment.config.workdir
    of_run = experiment.file.name == "config.py" and any((here / part).is_dir() for part in ("checkpoints", "stages"))
    if of_run and here.resolve() != Path(said).resolve() and not any(override.startswith("workdir=") for override in overrides):
        raise ValueError(
            f"{experiment.file} is of a run in {str(here)!r}, and its workdir is {said!r}: it was moved, or this is another folder to "
            f"start from; add --config.workdir={here} to go on, or name another workdir to begin anew"
        )


def overopt(file: str, overrides: Sequence[str]) -> None:
    """`alignax overopt`: an experiment that measures with the laboratory."""
    with refusing():
        experiment = load_experiment(file, overrides)
        check_moved(experiment, overrides)
        if experiment.main is None:
            raise ValueError(f"{file} has no main(), which runs the laboratory; see experiments/overoptimization.py")
        with blaming(experiment.file, own=True):
            experiment.main(experiment)


def report(workdirs: Sequence[Path], force: bool = False) -> None:
    """`alignax report`: the page of each workdir anew, and of several one more, on which they lie side by side."""
    from alignax.overopt import report

    with refusing():
        for page in [*(workdir / "report.html" for workdir in workdirs), workdirs[0] / "comparison.html"]:
            output.claim(page, 'name="generator" content="alignax"', force)
        for workdir in workdirs:
            print(report.write(workdir))
        if len(workdirs) > 1:
            print(report.compare(workdirs))


def saved_experiment(workdir: Path, overrides: Sequence[str]) -> Experiment:
    """The experiment of a past run, to be looked at on the devices at hand rather than on those that it ran on."""
    file = workdir / "config.py"
    if not file.is_file():
        raise ValueError(f"{str(workdir)!r} is not the workdir of a run: it has no config.py")
    here = [f"workdir={workdir}", "reference.cache=", "mesh.member=1", "mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1"]
    return load_experiment(file, [*here, *overrides])


def evaluate(workdir: Path, overrides: Sequence[str], out: str = "", force: bool = False) -> None:
    """`alignax eval`: the newest checkpoint on the evaluation data, as a table; `out` is a file for JSON, "-" for JSON alone, or empty."""
    with refusing():
        distributed.initialize()
        if out not in ("", "-"):
            claim(Path(out), force=force)
        with together():
            run = prepare(saved_experiment(workdir, overrides))
        started = start(run, write=False)
        step, _ = started.checkpoints.newest(lambda step: step)
    log = Log(workdir, steps=step, start=step, every=1, tensorboard=False, writes=False)
    evaluation = Evaluation(run, started.frozen, log)
    with closing(started.checkpoints), closing(run.workers):
        scores = evaluation(started.state, step)
    if is_main():
        if out != "-":
            print(table([["metric", f"step {step}"], *([name, f"{x:.4f}"] for name, x in sorted(scores.items()))]))
        if out:
            rows = 0 if run.evaluation is None or evaluation.online else len(run.evaluation)
            of = {"workdir": str(workdir), "step": step, "params": run.config.eval.params, "rows": rows, "prompts": len(evaluation.sampled)}
            metrics = {name: x if math.isfinite(x) else None for name, x in sorted(scores.items())}
            write_json(of | {"metrics": metrics, "config": flat(run.config)}, out)


class Saved(NamedTuple):
    """What a run has trained, as whole models."""

    config: Any
    source: hf.Source
    mesh: Mesh
    step: int
    models: Iterator[tuple[str, Params]]  # name and parameters of each member; of a run without members one, whose name is empty


def saved_models(workdir: Path, overrides: Sequence[str]) -> Saved:
    """The newest checkpoint of a run, adapters merged. The run's data need not be there."""
    with together():
        config = saved_experiment(workdir, overrides).config
        source = hf.with_heads(open_source(config.model.path, "model.path"), config.model.num_labels, trunk_values(config))
    mesh = make_mesh(config.mesh)
    return Saved(config, source, mesh, *newest_models(workdir, config, source, mesh, config.export.params))


def newest_models(workdir: Path, config: Any, source: hf.Source, mesh: Mesh, name: str) -> tuple[int, Iterator[tuple[str, Params]]]:
    """The step of a run's newest checkpoint, and its models (see `Saved`); `name`: "policy" or an average."""
    lora, members = make_lora(config, source), config.ensemble.members
    with closing(Checkpoints(workdir, writes=False)) as checkpoints:
        now = described(source, load_tokenizer(source.path, source.config.vocab_size))
        if lora is not None:  # the base is read again
            now["policy"] = fingerprint(hf.load_params(source, mesh, jax.random.key(config.seed)))
        trained = abstract_models(source, lora, open_critic(config), members, mesh)

        def read(step: int) -> tuple[dict[str, Any], Params]:
            about = checkpoints.about(step)
            check_same(workdir, step, about, now)
            return about, checkpoints.restore_params(step, trained, name)

        step, (about, params) = checkpoints.newest(read)
        if step and about.get("skipped") == step:
            raise ValueError(f"none of the {step} steps in {str(workdir)!r} was finite: it holds the model that it began from alone")
        check_finite(params, "float32", f"checkpoint {step} in {str(workdir)!r}")
        params.pop(CRITIC, None)
    return step, ((name, merged(source, lora, one, mesh) if lora else one) for name, one in members_of(params, members))


def averaged_models(soup: Path, overrides: Sequence[str]) -> Saved:
    """The mean of model folders, as `saved_models` gives what a run has trained."""
    with together():
        config = folder_config(soup, overrides)
        source = open_model(config.model.path, config.model.init, "model.path")
    mesh = make_mesh(config.mesh)
    return Saved(config, source, mesh, 0, iter([("", hf.load_params(source, mesh))]))


def export(workdir: Path, folder: Path, overrides: Sequence[str], force: bool = False) -> None:
    """`alignax export`: the newest checkpoint as a Hugging Face folder, of an ensemble one for each member; or the mean of folders.

    What another run or program has written there is replaced with `force` alone.
    """
    with refusing():
        distributed.initialize()
        soup = "@" in str(workdir) and not workdir.exists()
        by, members = f"mean {workdir}", 0
        if not soup:
            experiment = saved_experiment(workdir, overrides)
            by, members = origin(experiment), experiment.config.ensemble.members
        for name in names_of(members):
            claim(folder / name, by, force)
        saved = (averaged_models if soup else saved_models)(workdir, overrides)
        eos = load_tokenizer(saved.source.path, saved.source.config.vocab_size).eos_token_id
        there, dtype = folder.exists(), saved.config.export.dtype
        for name, params in saved.models:
            hf.export(params, saved.source, folder / name, dtype, eos=eos, origin=by)
    if is_main():
        what = f"the mean {workdir}" if soup else f"step {saved.step} of {workdir}"
        print(f"{what} is in {folder}, in {dtype}{' (an earlier export there was replaced)' if there else ''}")


def names_of(members: int) -> list[str]:
    """The folders of the members of an ensemble; of one model the folder itself."""
    return [f"member_{k}" for k in range(members)] or [""]


def claim(place: Path, by: str = "", force: bool = False) -> None:
    """What `alignax.output.claim` refuses, on all processes; process 0 looks."""
    with together():
        if is_main():
            output.claim(place, by, force)


def eval_rm(place: str, file: str, overrides: Sequence[str], out: str, force: bool = False) -> None:
    """`alignax eval-rm`: how well a reward model, or an ensemble, tells chosen from rejected responses, on `data.eval` and `data.ood`.

    Args:
      place: the workdir of a run, or folders of reward models with commas between them.
      file: of folders, an experiment file, which says how the data are read.
      overrides: of the config.
      out: a file for JSON, "-" for JSON alone, or empty.
      force: replace what stands there.
    """
    with refusing():
        distributed.initialize()
        if out not in ("", "-"):
            claim(Path(out), force=force)
        if not file and not is_workdir(place):
            raise ValueError(f"{place!r} is no workdir of a run; for model folders give --config FILE.py too, experiments/rm_hh.py say")
        config, source, mesh, params = reward_models(place, file, overrides)
        rewards.check_one_score(source)
        row = load_experiment(Path(place) / "config.py" if is_workdir(place) else file).row
        loaded = pairs_of(config, source, row)
    result = {}
    model = rewards.ensemble_model(source.config, params, mesh)
    for split, examples in loaded.items():
        length, size = padded_length(examples), eval_batch_size(config)
        with refusing():
            scores = rewards.score_examples(model.apply, model.params, examples, mesh, size, length)
        lengths = np.add.reduceat(examples.scored, examples.offsets[:-1]).reshape(-1, 2)
        result[split] = rewards.judge(scores, lengths)
    if is_main():
        if out != "-":
            print("\n".join(rewards.text(result)))
        if out:
            write_json(result, out)


def write_json(value: Any, out: str) -> None:
    """Writes JSON into a file, or with "-" onto the console."""
    lines = json.dumps(value, indent=2, ensure_ascii=False)
    print(lines) if out == "-" else output.write_text(Path(out), lines + "\n")


def is_workdir(place: str) -> bool:
    """Whether a run has written there."""
    return (Path(place) / "config.py").is_file()


def reward_models(place: str, file: str, overrides: Sequence[str]) -> tuple[Any, hf.Source, Mesh, Params]:
    """Config, first folder, mesh and parameters [K, ...] of reward models: the workdir of a run, or folders with commas between them.

    Of folders the config is that of the experiment file; without one, the default.
    """
    if is_workdir(place):
        if file:
            raise ValueError(f"{place!r} is the workdir of a run, which has a config of its own; leave out --config {file}")
        config, source, mesh, _, models = saved_models(Path(place), overrides)
        if not source.config.num_labels:
            raise ValueError(f"{place!r} is the run of a language model; give reward models (model.num_labels 1)")
        return config, source, mesh, rewards.stack([params for _, params in models], source.config, mesh)
    folders = place.split(",")
    config = load_experiment(file, overrides).config if file else folder_config(Path(folders[0]), overrides)
    mesh = make_mesh(config.mesh)
    source, params = rewards.load_ensemble(folders, mesh)
    return config, source, mesh, params


def anchor(place: str, folder: Path, file: str, overrides: Sequence[str], samples: str, scale: bool, force: bool = False) -> None:
    """`alignax anchor`: folders of reward models whose scores on samples have mean 0, and with `scale` standard deviation 1.

    Args:
      place: as for `eval_rm`.
      folder: what is written; of several members it holds a folder for each.
      file: of folders, an experiment file that says how long rows may be; may be empty.
      overrides: of the config.
      samples: rows with a prompt and a completion by the initial policy, as `alignax generate --out` writes them.
      scale: whether to divide by the standard deviation.
      force: replace what another has written there.
    """
    by = f"anchor {place} by {samples}"
    with refusing():
        distributed.initialize()
        config, source, mesh, params = reward_models(place, file, [*SAMPLES, *overrides])
        tokenizer = load_tokenizer(source.path, source.config.vocab_size)
        ends = hf.end_ids(source, tokenizer)
        examples, report = load_examples(samples, config.data, tokenizer, source.config.vocab_size, ends)
        dtype, members = config.export.dtype, len(jax.tree.leaves(params)[0])
        for name in names_of(members if members > 1 else 0):
            claim(folder / name, by, force)
        params = rewards.rounded(params, dtype)
        model = rewards.ensemble_model(source.config, params, mesh)
        scores = rewards.score_examples(model.apply, params, examples, mesh, eval_batch_size(config), padded_length(examples))
        found = rewards.anchored(params, scores, scale)
        for name, one in members_of(found.params, members):
            hf.export(one, source, folder / name if members > 1 else folder, dtype, origin=by)
    if is_main():
        print("\n".join(f"samples: {line}" if i == 0 else line for i, line in enumerate(report.lines())))
        for k, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
            print(f"member {k}: mean {numbers(mean)} becomes 0, standard deviation {numbers(std)}{' becomes 1' if scale else ''}")
        print(f"anchored reward models are in {folder}, in {dtype}")


def ridge(folder: Path, file: str, overrides: Sequence[str], penalty: float, force: bool = False) -> None:
    """`alignax ridge`: a reward model whose head is fitted in closed form to `data.train`, on the trunk of `model.path` as it stands."""
    with refusing():
        distributed.initialize()
        experiment = load_experiment(file, overrides)
        config, by = experiment.config, f"ridge {origin(experiment)}"
        claim(folder, by, force)
        if not config.data.train:
            raise ValueError("config field 'data.train' is empty; set --config.data.train=FILE")
        source = hf.with_heads(open_model(config.model.path, "pretrained", "model.path"), config.model.num_labels)
        if not source.config.num_labels:
            raise ValueError(f"{config.model.path!r} is a language model; set model.num_labels to 1, or to how many attributes there are")
        tokenizer = load_tokenizer(source.path, source.config.vocab_size)
        ends = hf.end_ids(source, tokenizer)
        examples, reports, _ = load("train", config.data, tokenizer, source.config.vocab_size, ends, experiment.row)
        mesh = make_mesh(config.mesh)
        how = {"penalty": penalty, "batch_size": eval_batch_size(config), "dtype": compute_dtype(config, mesh)}
        params = fit_ridge(source.config, hf.load_params(source, mesh), examples, mesh, **how)
        hf.export(params, source, folder, config.export.dtype, eos=tokenizer.eos_token_id, origin=by)
    if is_main():
        for path, report in reports.items():
            print("\n".join([f"train data: {path}", *(f"  {line}" for line in report.lines())]))
        print(f"a head of {source.config.num_labels} scores, fitted to {len(examples)} examples, is in {folder}, in {config.export.dtype}")


def numbers(values: np.ndarray) -> str:
    """Numbers in a line."""
    return ", ".join(f"{x:.4g}" for x in values)


def pairs_of(config: Any, source: hf.Source, row: Callable[[dict], Any] | None) -> dict[str, Examples]:
    """The pairs of `data.eval` and `data.ood`, tokenised; `row` is the experiment's."""
    if not config.data.eval:
        raise ValueError("config field 'data.eval' is empty; set --config.data.eval=FILE")
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    splits = [split for split in ("eval", "ood") if config.data[split]]
    ends = hf.end_ids(source, tokenizer)
    loaded = {split: load(split, config.data, tokenizer, source.config.vocab_size, ends, row).examples for split in splits}
    for split, examples in loaded.items():
        if examples.N != 2:
            raise ValueError(f"data.{split} has {examples.N} responses of a prompt, eval-rm takes pairs; set data.kind to preference")
    return loaded


def generate(model: Path, request: Request, overrides: Sequence[str], force: bool = False) -> None:
    """`alignax generate`: completions of prompts, by a Hugging Face folder or by the newest checkpoint of a run, data not needed."""
    with refusing():
        distributed.initialize()
        with together():
            saved = (model / "config.py").is_file()
            config = saved_experiment(model, overrides).config if saved else folder_config(model, overrides)
            source = open_model(config.model.path, config.model.init, "model.path")
            source = hf.with_heads(source, config.model.num_labels, trunk_values(config))
            if source.config.num_labels:
                raise ValueError(f"{str(model)!r} is a reward model, which gives scores and no text; give a language model")
            tokenizer = load_tokenizer(source.path, source.config.vocab_size)
            source = hf.with_vocabulary(source, tokenizer)
            if (beyond := hf.unread(source)) and is_main():
                print(f"alignax: {hf.GENERATION} asks for {beyond}; not read here, see --help for what is", file=sys.stderr)
            stops = Stops(tokenizer, tuple(request.stop)) if request.stop else None
            prompts = console.read(request, tokenizer, config.data)
            longest = max((len(p.ids) for p in prompts or ()), default=1)
            check_room(source.config, longest, request.max_new_tokens)
            console.begin(request, prompts is None, force)
        mesh = make_mesh(config.mesh)

        @functools.cache
        def generator(count: int, longest: int) -> Generator:
            shape = shape_for(count, longest, request.max_new_tokens, mesh=mesh, slots=request.slots)
            ids = hf.end_ids(source, tokenizer)
            dtype = compute_dtype(config, mesh)
            how = request.sampling()
            return Generator(source.config, shape, how, stop_ids=ids, stops=stops, dtype=dtype, cache_dtype=request.cache, mesh=mesh)

        generator(request.n * len(prompts or [0]), longest)
        if saved:
            _, models = newest_models(model, config, source, mesh, config.eval.params)
            ((_, params),) = models
        else:
            params = hf.load_params(source, mesh)
    key = jax.random.key(request.seed)
    if prompts is not None:
        console.answer(generator(request.n * len(prompts), longest), params, prompts, key, request, tokenizer)
        return
    for i, prompt in enumerate(console.typed(request, tokenizer, config.data)):
        room = source.config.max_position_embeddings - request.max_new_tokens
        # In powers of 2, so that few lengths are compiled.
        longest = min(max(64, 1 << (len(prompt.ids) - 1).bit_length()), room)
        try:
            console.answer(generator(request.n, longest), params, [prompt], jax.random.fold_in(key, i), request, tokenizer, True)
        except ValueError as e:  # a prompt that is too long: the next may be shorter
            print(f"alignax: {e}", file=sys.stderr)


def folder_config(folder: Path, overrides: Sequence[str]) -> Any:
    """The default config, of a model folder."""
    config = default_config()
    for override in [f"model.path={folder}", *overrides]:
        set_field(config, override)
    return config


def check_data(file: str, overrides: Sequence[str], out: str, force: bool = False) -> None:
    """`alignax check-data`: what a run would make of its data; `out` is a file for JSON, "-" for JSON alone, or empty.

    Raises:
      BadInput: also after the report, for bad rows that a run would stop at.
    """
    with refusing():
        experiment = load_experiment(file, overrides)
        config = experiment.config
        if out not in ("", "-"):
            output.claim(Path(out), force=force)
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and out != "-"
        result = check.check(config.data, *tokenizer_alone(config.model.path), colour=colour, row=experiment.row)
        if out != "-":
            print("\n".join(check.text(result)))
        if out:
            write_json(result, out)
        if config.data.bad_rows == "error" and (found := check.stops(result)):
            raise ValueError(f"a run would stop here: {found}. Correct the rows, or leave them out with --config.data.bad_rows=drop")


def tokenizer_alone(path: str) -> tuple[Any, int, tuple[int, ...]]:
    """The tokenizer of a folder that may lack a model, and, where it has a config.json, the rows of the embedding and the ends."""
    if path and not Path(path).is_dir():
        path = sources(path, "model.path")[0][0]  # of a soup the first one's
    if not Path(path or " ").is_dir():
        raise ValueError(f"model folder {path!r} does not exist; set --config.model.path=FOLDER, one with a tokenizer")
    if (Path(path) / "config.json").is_file():
        source = hf.open_folder(path)
        tokenizer = load_tokenizer(Path(path), source.config.vocab_size)
        return tokenizer, source.config.vocab_size, hf.end_ids(source, tokenizer)
    tokenizer = load_tokenizer(Path(path), sys.maxsize)
    return tokenizer, len(tokenizer), ()
