"""A case of a bench: which run is measured, and its measurement in processes of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from alignax.bench import methods
from alignax.config import BadInput, Experiment, load_experiment, steps_of_turn

CACHE = "JAX_COMPILATION_CACHE_DIR"
WARM = 2  # turns before the timed ones: the first compiles
FIRST = ("start_s", "first_step_s", "first_step_cpu_s")  # figures that the cache of compiled programs changes


class Case(NamedTuple):
    """A run that is measured."""

    name: str
    method: str  # a built-in case; empty: the run of `file`
    file: str
    overrides: list[str]  # FIELD=VALUE
    turns: int  # timed ones
    sampling: bool  # whether its sampler alone is timed
    folder: str  # of the files of a built-in case
    single: bool = False  # whether on one device, also where there are more
    first: bool = False  # whether its first turn alone is timed

    def experiment(self) -> Experiment:
        """The experiment, with the steps of all its turns, which its schedule depends on.

        Raises:
          ValueError: for an unknown field, and for a file that runs several stages.
        """
        if not self.file:
            experiment = methods.experiment(self.method, self.overrides, Path(self.folder))
        else:
            experiment = load_experiment(self.file, self.overrides)
        if experiment.main is not None and not experiment.config.model.path:
            raise ValueError(f"{self.file} writes its own model or runs several stages; give --config.model.path and --config.data.train")
        experiment.config.steps = (WARM + self.turns) * steps_of_turn(experiment.config)
        return experiment._replace(main=None)


def measured(case: Case) -> dict[str, Any]:
    """The measurements of a case: of a process without compiled programs, then the first step of one that finds them in jax's cache."""
    with tempfile.TemporaryDirectory() as cache:
        found = in_process(case, cache)
        again = in_process(case._replace(first=True), cache) if any(Path(cache).iterdir()) else {}
    return {"name": case.name} | found | {f"cached_{name}": again.get(name) for name in FIRST}


def in_process(case: Case, cache: str) -> dict[str, Any]:
    """The measurements of a new process, with a folder for compiled programs."""
    own = {CACHE: cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return last_json([sys.executable, "-m", "alignax.bench", json.dumps(case._asdict())], os.environ | own, f"{case.name} failed")


def last_json(command: list[str], environment: dict[str, str] | None = None, what: str = "") -> dict[str, Any]:
    """The last line of a command's output that begins with {, parsed.

    Raises:
      BadInput: if the command fails, or prints no such line.
    """
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((line for line in reversed(out.stdout.splitlines()) if line.startswith("{")), "")
    if out.returncode or not line:
        said = [line for line in out.stderr.splitlines() if line.strip()][-1:] or [f"exit code {out.returncode}"]
        raise BadInput(said[0].removeprefix("alignax: error: ") if "alignax: error:" in said[0] else f"{what}: {said[0][-600:]}")
    return json.loads(line)
