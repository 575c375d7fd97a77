"""The commands of `alignax`, except those on reward models. Bad input is found in `prepare`, before any compute."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from alignax import distributed, output, paths
from alignax.config import Experiment, code, flat, load_experiment, trunk_values
from alignax.config.blame import blaming, refusing
from alignax.data import check
from alignax.data.mixture import sources
from alignax.distributed import is_main, together
from alignax.generate import Generator, Stops, combined, console, sampler, speaker
from alignax.generate.console import Request
from alignax.generate.generator import check_room
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.tokenizers import check_tokenizer, load_tokenizer
from alignax.models.transformer import ModelConfig
from alignax.run import plan, planned
from alignax.run.evaluation import Evaluation
from alignax.run.log import Log
from alignax.run.loop import fit
from alignax.run.opening import compute_dtype, open_model
from alignax.run.prepare import Run, check_workdir, origin, prepare
from alignax.run.saved import averaged_models, folder_config, is_workdir, names_of, newest_models, saved_experiment, saved_models
from alignax.run.start import check_step, start
from alignax.run.stop import preparing
from alignax.text import table
from alignax.types import Params


def train(file: str, overrides: Sequence[str], dry: bool, plan_file: str = "") -> None:
    """`alignax train`: trains an experiment, or goes on where it was stopped.

    Args:
      file: the experiment file.
      overrides: fields of the config, FIELD=VALUE.
      dry: prints the plan of the run and writes nothing.
      plan_file: a file of `alignax plan --json FILE`, or empty; what is not as it was planned is a warning on stderr.
    """
    with refusing():
        distributed.initialize()
        with together():
            experiment = load_experiment(file, overrides)
            check_moved(experiment, overrides)
            if plan_file and experiment.main is not None:
                raise ValueError(f"{file} runs several stages, or a model that it writes; leave out --plan, which is of a single run")
            made = planned.read(paths.of(plan_file)) if plan_file else None
        distributed.check_alike({"experiment": code(experiment)})
    if dry:
        with refusing():
            if experiment.main is not None and not experiment.config.model.path:
                raise ValueError(f"{file} runs several stages, each with a separate config; leave out --dry-run, which shows a single run")
            shown = checked(experiment)
            compare(made, shown)
            check_step(shown)
            print(plan.describe(shown))
    elif experiment.main is not None:
        with refusing(), blaming(experiment.file, own=True):
            experiment.main(experiment)
    else:
        run(experiment, made)


def run(experiment: Experiment, made: dict[str, Any] | None = None) -> dict[str, dict[str, float]]:
    """Runs an experiment as a single run, or what is left of it; returns its evaluation metrics before and after training.

    With a plan from `alignax.run.planned`, what is not as it was planned is a warning on stderr.
    """
    with preparing(), refusing():
        with together():
            run = prepare(experiment)
        compare(made, run)
        started = start(run)
    return fit(started)


def compare(made: dict[str, Any] | None, run: Run) -> None:
    """Says on stderr what of a run is not as a plan has it; process 0 does."""
    if made is not None and is_main():
        for line in planned.differences(made, run):
            print(f"alignax: warning: not as planned: {line}", file=sys.stderr)


def checked(experiment: Experiment) -> Run:
    """Prepares the run of an experiment, and checks that it may write into its workdir."""
    with together():
        run = prepare(experiment)
        check_workdir(run)
    return run


def check_moved(experiment: Experiment, overrides: Sequence[str]) -> None:
    """Refuses the config.py of a moved workdir: it names the old folder, where the run would begin anew; --config.workdir decides."""
    here, said = experiment.file.parent, experiment.config.workdir
    of_run = experiment.file.name == "config.py" and any((here / part).is_dir() for part in ("checkpoints", "stages"))
    if of_run and here.resolve() != paths.of(said).resolve() and not any(override.startswith("workdir=") for override in overrides):
        raise ValueError(
            f"{experiment.file} belongs to a run in {str(here)!r}, but it names the workdir {said!r}: the workdir was moved, or the "
            f"command was started in another folder; add --config.workdir={here} to resume the run, or give another workdir to start a "
            "new run"
        )


def overopt(file: str, overrides: Sequence[str]) -> None:
    """`alignax overopt`: runs the `main` of an experiment, which measures overoptimisation with the laboratory."""
    with refusing():
        experiment = load_experiment(file, overrides)
        check_moved(experiment, overrides)
        if experiment.main is None:
            raise ValueError(f"{file} has no main(), which runs the laboratory; see experiments/overoptimization.py")
        with blaming(experiment.file, own=True):
            experiment.main(experiment)


def report(workdirs: Sequence[Path], force: bool = False) -> None:
    """`alignax report`: writes report.html of each workdir anew; for several workdirs also comparison.html, in the first."""
    from alignax.overopt import report

    with refusing():
        for page in [*(workdir / "report.html" for workdir in workdirs), workdirs[0] / "comparison.html"]:
            output.claim(page, 'name="generator" content="alignax"', force)
        for workdir in workdirs:
            print(report.write(workdir))
        if len(workdirs) > 1:
            print(report.compare(workdirs))


def evaluate(workdir: Path, overrides: Sequence[str], out: str = "", force: bool = False) -> None:
    """`alignax eval`: evaluates the newest checkpoint and prints a table; `out`: a file for JSON too, "-" for JSON only, or empty."""
    with refusing():
        distributed.initialize()
        if out not in ("", "-"):
            output.claim_on_all(paths.of(out), force=force)
        with together():
            run = prepare(saved_experiment(workdir, overrides))
        started = start(run, write=False)
        step, _ = started.checkpoints.newest(lambda step: step)
    log = Log(workdir, steps=step, start=step, every=1, tensorboard=False, writes=False)
    evaluation = Evaluation(run, started.held, started.programs, log)
    with closing(started.checkpoints), closing(run.workers):
        scores = evaluation(started.state, step)
    if is_main():
        if out != "-":
            print(table([["metric", f"step {step}"], *([name, f"{x:.4f}"] for name, x in sorted(scores.items()))]))
        if out:
            rows = 0 if run.data.evaluation is None or evaluation.online else len(run.data.evaluation)
            of = {"workdir": str(workdir), "step": step, "params": run.config.eval.params, "rows": rows, "prompts": len(evaluation.sampled)}
            metrics = {name: x if math.isfinite(x) else None for name, x in sorted(scores.items())}
            output.write_json(of | {"metrics": metrics, "config": flat(run.config)}, out)


def export(workdir: Path, folder: Path, overrides: Sequence[str], force: bool = False) -> None:
    """`alignax export`: writes a Hugging Face folder of the newest checkpoint, or of the mean of model folders.

    An ensemble gets a folder for each member. Files of another run or program are replaced only with `force`.
    """
    with refusing():
        distributed.initialize()
        soup = "@" in str(workdir) and not workdir.exists()
        with together():
            experiment = None if soup else saved_experiment(workdir, overrides)
        by, members = (f"mean {workdir}", 0) if experiment is None else (origin(experiment), experiment.config.ensemble.members)
        for name in names_of(members):
            output.claim_on_all(folder / name, by, force)
        saved = averaged_models(workdir, overrides) if experiment is None else saved_models(workdir, experiment.config)
        eos = load_tokenizer(saved.source.path, saved.source.config.vocab_size).eos_token_id
        there, dtype = folder.exists(), saved.config.export.dtype
        for name, params in saved.models:
            hf.export(params, saved.source, folder / name, dtype, eos=eos, origin=by)
    if is_main():
        what = f"the mean {workdir}" if soup else f"step {saved.step} of {workdir}"
        print(f"{what} is in {folder}, in {dtype}{' (an earlier export there was replaced)' if there else ''}")


def generate(model: Path, request: Request, overrides: Sequence[str], force: bool = False) -> None:
    """`alignax generate`: completes prompts with a Hugging Face model or the newest checkpoint of a run; needs no training data."""
    with refusing():
        distributed.initialize()
        with together():
            first = language_model(model, overrides)
            config, source = first.config, first.source
            tokenizer = load_tokenizer(source.path, source.config.vocab_size)
            beside = [combined_model(path, source, tokenizer) for path, _ in request.combination()]
            if (beyond := hf.unread(source)) and is_main():
                print(
                    f"alignax: {hf.GENERATION} asks for {beyond}; alignax does not read this, `alignax --help` lists the supported options",
                    file=sys.stderr,
                )
            stops = Stops(tokenizer, tuple(request.stop)) if request.stop else None
            room = source.config.max_position_embeddings - request.max_new_tokens
            prompts = console.read(request, tokenizer, config.data, max(room, 1))
            longest = max((len(p.ids) for p in prompts or ()), default=1)
            configs = one_vocabulary([hf.with_vocabulary(own.source, tokenizer).config for own in (first, *beside)])
            for own in configs:
                check_room(own, longest, request.max_new_tokens)
            console.begin(request, force)
        mesh = make_mesh(config.mesh)
        speakers = [speaker(own, compute_dtype(config, mesh), request.cache, mesh) for own in configs]
        whole = combined(speakers, [1.0, *(c for _, c in request.combination())]) if beside else speakers[0]

        @functools.cache
        def generator(count: int, longest: int) -> Generator:
            ends, how = hf.end_ids(source, tokenizer), request.sampling()
            return sampler(whole, count, longest, request.max_new_tokens, how, ends=ends, stops=stops, slots=request.slots)

        generator(request.n * len(prompts or [0]), longest)
        params = tuple(own.load(mesh) for own in (first, *beside)) if beside else first.load(mesh)
    key = jax.random.key(request.seed)
    if prompts is not None:
        console.answer(generator(request.n * len(prompts), longest), params, prompts, key, request, tokenizer)
        return
    room, further = whole.positions - request.max_new_tokens, False
    for i, prompt in enumerate(console.typed(request, tokenizer, config.data, max(room, 1))):
        # Powers of 2 keep the number of compiled lengths small.
        longest = min(max(64, 1 << (len(prompt.ids) - 1).bit_length()), room)
        try:
            console.answer(generator(request.n, longest), params, [prompt], jax.random.fold_in(key, i), request, tokenizer, further)
            further = True
        except ValueError as e:  # the prompt is too long; the next may fit
            print(f"alignax: {e}", file=sys.stderr)


class Language(NamedTuple):
    """A language model for `alignax generate`, with its weights still on disk."""

    config: Any  # config of the run; of a folder, the default
    source: hf.Source
    load: Callable[[Mesh], Params]


def language_model(place: Path, overrides: Sequence[str]) -> Language:
    """Opens a language model: a folder, the mean of several folders, or a run's newest checkpoint; its weights are read later."""
    experiment = saved_experiment(place, overrides) if is_workdir(place) else None
    config = folder_config(place, overrides) if experiment is None else experiment.config
    if experiment is not None and experiment.speaker is not None and is_main():
        print(
            f"notice: the run {str(place)!r} sampled from speaker(..) of its experiment; alignax generate samples from its policy alone, "
            "and --combine FOLDER@COEFFICIENT adds the logits of another model",
            file=sys.stderr,
        )
    source = open_model(config.model.path, config.model.init, "model.path")
    source = hf.with_heads(source, config.model.num_labels, trunk_values(config), config.model.language_head)
    if source.config.num_labels:
        raise ValueError(f"{str(place)!r} is a reward model, which gives scores and no text; give a language model")

    def load(mesh: Mesh) -> Params:
        if experiment is None:
            return hf.load_params(source, mesh)
        _, models = newest_models(place, config, source, mesh, config.eval.params)
        ((_, params),) = models
        return params

    return Language(config, source, load)


def combined_model(place: str, source: hf.Source, tokenizer: Any) -> Language:
    """Opens a model of --combine, whose logits are added to those of MODEL; both must have the same tokens."""
    own = language_model(paths.of(place), [])
    check_tokenizer(own.source.path, own.source.config.vocab_size, f"{place!r} of --combine", source, tokenizer, "MODEL")
    return own


def one_vocabulary(configs: Sequence[ModelConfig]) -> list[ModelConfig]:
    """The configs with heads of one size, the smallest: rows beyond it are padding without a token."""
    size = min(config.predicted_tokens or config.vocab_size for config in configs)
    return [config if config.vocab_size == size else dataclasses.replace(config, predicted_tokens=size) for config in configs]


def check_data(file: str, overrides: Sequence[str], out: str, force: bool = False) -> None:
    """`alignax check-data`: reports how a run would read its data; `out`: a file for JSON too, "-" for JSON only, or empty.

    Raises:
      BadInput: for bad input, and after the report for bad rows that would stop a run.
    """
    with refusing():
        experiment = load_experiment(file, overrides)
        config = experiment.config
        if out not in ("", "-"):
            output.claim(paths.of(out), force=force)
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and out != "-"
        tokenizer, vocab_size, ends, labels = tokenizer_alone(config.model.path)
        whole = bool(labels or config.model.num_labels or config.reward.path)
        result = check.check(config.data, tokenizer, vocab_size, ends, colour, experiment.row, whole)
        if out != "-":
            print("\n".join(check.text(result)))
        if out:
            output.write_json(result, out)
        if config.data.bad_rows == "error" and (found := check.stops(result)):
            raise ValueError(f"a run would stop here: {found}. Correct the rows, or leave them out with --config.data.bad_rows=drop")


def tokenizer_alone(path: str) -> tuple[Any, int, tuple[int, ...], int]:
    """Tokenizer, vocabulary size, end tokens and number of labels of a model folder; without config.json, the tokenizer gives the size."""
    if path and not paths.of(path).is_dir():
        path = sources(path, "model.path")[0][0]  # of a mean of models, the first folder
    if not paths.of(path or " ").is_dir():
        raise ValueError(f"model folder {path!r} does not exist; set --config.model.path=FOLDER, one with a tokenizer")
    if (paths.of(path) / "config.json").is_file():
        source = hf.open_folder(path)
        tokenizer = load_tokenizer(paths.of(path), source.config.vocab_size)
        return tokenizer, source.config.vocab_size, hf.end_ids(source, tokenizer), source.config.num_labels
    tokenizer = load_tokenizer(paths.of(path), sys.maxsize)
    return tokenizer, len(tokenizer), (), 0
