"""What the commands do. Bad input is told apart from failures: it is found in `prepare`, before any compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alignax import distributed, plan
from alignax.config import Experiment, load_experiment
from alignax.evaluate import Evaluation
from alignax.fit import Started, fit, make_programs, start
from alignax.metrics import Log, table
from alignax.models import hf
from alignax.prepare import prepare


class BadInput(ValueError):
    """Input that was refused."""


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
        experiment = load_experiment(file, overrides)
    if dry:
        with refusing():
            print(plan.describe(prepare(experiment)))
    elif experiment.main is not None:
        experiment.main(experiment)
    else:
        run(experiment)


def run(experiment: Experiment) -> dict[str, dict[str, float]]:
    """The single run that an experiment describes, or what is left of it; returns its evaluation metrics before and after."""
    with refusing():
        started = start(prepare(experiment))
    return fit(started)


def saved_run(workdir: Path, overrides: Sequence[str]) -> tuple[Started, int]:
    """A run of the past, at its newest checkpoint."""
    file = workdir / "config.py"
    if not file.is_file():
        raise ValueError(f"{str(workdir)!r} is not the workdir of a run: it has no config.py")
    experiment = load_experiment(file, [f"workdir={workdir}", *overrides])
    started = start(prepare(experiment), write=False)
    if not started.step:
        raise ValueError(f"{str(workdir)!r} holds no complete checkpoint yet")
    return started, started.step


def evaluate(workdir: Path, overrides: Sequence[str]) -> None:
    """`alignax eval`: the newest checkpoint on the evaluation data; adds its rows to nothing, prints a table."""
    with refusing():
        distributed.initialize()
        started, step = saved_run(workdir, overrides)
    log = Log(workdir, steps=step, start=step, every=1, tensorboard=False, writes=False)
    evaluation = Evaluation(started.run, make_programs(started.run)[1], started.experience, started.reference, log)
    scores = evaluation(started.state, step)
    started.checkpoints.close()
    print(table([["metric", f"step {step}"], *([name, f"{x:.4f}"] for name, x in sorted(scores.items()))]))


def export(workdir: Path, folder: Path, overrides: Sequence[str]) -> None:
    """`alignax export`: the newest checkpoint as a Hugging Face folder."""
    with refusing():
        distributed.initialize()
        started, step = saved_run(workdir, overrides)
        hf.export(started.state.params, started.run.source, folder, started.run.config.export.dtype)
    started.checkpoints.close()
    print(f"step {step} of {workdir} is in {folder}")
