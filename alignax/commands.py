"""What the commands do. Bad input is told apart from failures: it is found in `prepare`, before any compute."""

import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from alignax import distributed, plan
from alignax.checkpoint import Checkpoints
from alignax.config import BadInput, Experiment, default_config, load_experiment, set_field
from alignax.data import check
from alignax.distributed import is_main, together
from alignax.evaluate import Evaluation
from alignax.fit import fit, make_programs, merged, start
from alignax.generate import Generator, Stops, console, shape_for
from alignax.generate.console import Request
from alignax.generate.generator import check_room
from alignax.mesh import make_mesh
from alignax.metrics import Log, table
from alignax.models import hf
from alignax.prepare import Run, check_workdir, compute_dtype, load_tokenizer, make_lora, open_model, prepare
from alignax.types import Params


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
    if dry:
        with refusing():
            if experiment.main is not None and not experiment.config.model.path:
                raise ValueError(f"{file} runs several stages, each with a config of its own; --dry-run shows a single run")
            print(plan.describe(checked(experiment)))
    elif experiment.main is not None:
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


def saved_experiment(workdir: Path, overrides: Sequence[str]) -> Experiment:
    """The experiment of a past run, to be looked at on the devices at hand rather than on those that it ran on."""
    file = workdir / "config.py"
    if not file.is_file():
        raise ValueError(f"{str(workdir)!r} is not the workdir of a run: it has no config.py")
    here = [f"workdir={workdir}", "reference.cache=", "mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1"]
    return load_experiment(file, [*here, *overrides])


def newest(checkpoints: Checkpoints) -> int:
    """The newest step of a run that must have one."""
    step = checkpoints.latest()
    if step is None:
        raise ValueError(f"{str(checkpoints.path)!r} holds no complete checkpoint yet")
    return step


def evaluate(workdir: Path, overrides: Sequence[str]) -> None:
    """`alignax eval`: the newest checkpoint on the evaluation data, as a table; nothing is written."""
    with refusing():
        distributed.initialize()
        with together():
            run = prepare(saved_experiment(workdir, overrides))
        started = start(run, write=False)
        step = newest(started.checkpoints)
    log = Log(workdir, steps=step, start=step, every=1, tensorboard=False, writes=False)
    evaluation = Evaluation(run, make_programs(run)[1], started.frozen, log)
    scores = evaluation(started.state, step)
    started.checkpoints.close()
    if is_main():
        print(table([["metric", f"step {step}"], *([name, f"{x:.4f}"] for name, x in sorted(scores.items()))]))


def export(workdir: Path, folder: Path, overrides: Sequence[str]) -> None:
    """`alignax export`: the newest checkpoint as a Hugging Face folder. The run's data need not be there."""
    with refusing():
        distributed.initialize()
        with together():
            config = saved_experiment(workdir, overrides).config
            source = hf.open_folder(config.model.path)
            eos = load_tokenizer(source.path, source.config.vocab_size).eos_token_id
        params, step = newest_params(workdir, config, source, make_mesh(config.mesh), config.export.params)
        there = folder.exists()
        hf.export(params, source, folder, config.export.dtype, eos=eos)
    if is_main():
        print(
            f"step {step} of {workdir} is in {folder}, in {config.export.dtype}{' (an earlier export there was replaced)' if there else ''}"
        )


def newest_params(workdir: Path, config: Any, source: hf.Source, mesh: Mesh, name: str) -> tuple[Params, int]:
    """The parameters of a run's newest checkpoint, adapters merged into their base, and its step; `name`: "policy" or an average."""
    with closing(Checkpoints(workdir)) as checkpoints:
        step, lora = newest(checkpoints), make_lora(config, source)
        trained = hf.abstract_adapters(source.config, lora, mesh) if lora else hf.abstract_params(source.config, mesh)
        params = checkpoints.restore_params(step, trained, name)
    return (merged(source, lora, params, mesh) if lora else params), step


def generate(model: Path, request: Request, overrides: Sequence[str]) -> None:
    """`alignax generate`: completions of prompts, by a Hugging Face folder or by the newest checkpoint of a run, data not needed."""
    with refusing():
        distributed.initialize()
        with together():
            saved = (model / "config.py").is_file()
            config = saved_experiment(model, overrides).config if saved else folder_config(model, overrides)
            source = open_model(config.model.path, config.model.init, "model.path")
            tokenizer = load_tokenizer(source.path, source.config.vocab_size)
            stops = Stops(tokenizer, tuple(request.stop)) if request.stop else None
            prompts = console.read(request, tokenizer)
            longest = max((len(p.ids) for p in prompts or ()), default=1)
            check_room(source.config, longest, request.max_new_tokens)
            console.begin(request)
        mesh = make_mesh(config.mesh)

        @functools.cache
        def generator(count: int, longest: int) -> Generator:
            shape = shape_for(count, longest, request.max_new_tokens, mesh=mesh, slots=request.slots)
            ids = {tokenizer.eos_token_id, *hf.stop_ids(source)}
            dtype = compute_dtype(config, mesh)
            how = request.sampling()
            return Generator(source.config, shape, how, stop_ids=[*ids], stops=stops, dtype=dtype, cache_dtype=request.cache, mesh=mesh)

        generator(request.n * len(prompts or [0]), longest)
        params = newest_params(model, config, source, mesh, config.eval.params)[0] if saved else hf.load_params(source, mesh)
    key = jax.random.key(request.seed)
    if prompts is not None:
        console.answer(generator(request.n * len(prompts), longest), params, prompts, key, request, tokenizer)
        return
    for i, prompt in enumerate(console.typed(tokenizer)):
        room = source.config.max_position_embeddings - request.max_new_tokens
        # In powers of 2, so that few lengths are compiled.
        longest = min(max(64, 1 << (len(prompt.ids) - 1).bit_length()), room)
        try:
            console.answer(generator(request.n, longest), params, [prompt], jax.random.fold_in(key, i), request, tokenizer)
        except ValueError as e:  # a prompt that is too long: the next may be shorter
            print(f"alignax: {e}", file=sys.stderr)


def folder_config(folder: Path, overrides: Sequence[str]) -> Any:
    """The default config, of a model folder."""
    config = default_config()
    for override in [f"model.path={folder}", *overrides]:
        set_field(config, override)
    return config


def check_data(file: str, overrides: Sequence[str], out: str) -> None:
    """`alignax check-data`: what a run would make of its data; `out` is a file for JSON, "-" for JSON alone, or empty.

    Raises:
      BadInput: also after the report, for bad rows that a run would stop at.
    """
    with refusing():
        config = load_experiment(file, overrides).config
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and out != "-"
        result = check.check(config.data, *tokenizer_alone(config.model.path), colour=colour)
        if out != "-":
            print("\n".join(check.text(result)))
        if out:
            lines = json.dumps(result, indent=2, ensure_ascii=False)
            print(lines) if out == "-" else Path(out).write_text(lines + "\n", encoding="utf-8")
        if config.data.bad_rows == "error" and (found := check.stops(result)):
            raise ValueError(f"a run would stop here: {found}. Correct the rows, or leave them out with --config.data.bad_rows=drop")


def tokenizer_alone(path: str) -> tuple[Any, int]:
    """The tokenizer of a folder that may lack a model, and the rows of the embedding, where a config.json says so."""
    if not Path(path or " ").is_dir():
        raise ValueError(f"model folder {path!r} does not exist; set --config.model.path=FOLDER, one with a tokenizer")
    if (Path(path) / "config.json").is_file():
        size = hf.open_folder(path).config.vocab_size
        return load_tokenizer(Path(path), size), size
    tokenizer = load_tokenizer(Path(path), sys.maxsize)
    return tokenizer, len(tokenizer)
