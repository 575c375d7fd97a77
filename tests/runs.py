"""Runs of the `alignax` command on a tiny model, in processes of their own."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conftest
import pytest
import tiny

REPO = Path(__file__).resolve().parents[1]
SMALL = {
    "batch_size": 8, "steps": 24, "data.max_length": 48, "data.max_prompt_length": 24, "eval.every": 12, "eval.sample_prompts": 4,
    "eval.max_new_tokens": 4, "checkpoint.every": 3, "optimizer.learning_rate": 1e-3, "log.tensorboard": False, "export.final": False,
    "mesh.data": -1, "mesh.fsdp": 1, "reference.cache": "off",
}  # fmt: skip


def world(folder: Path) -> dict[str, object]:
    """A tiny model and pairs; returns the overrides that point at them."""
    pairs = tiny.pairs(folder / "pairs.jsonl")
    model = tiny.folder(folder / "model")
    return SMALL | {"model.path": str(model), "data.train": str(pairs), "data.eval": str(pairs)}


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """In the context a file that grows beyond so many bytes fails in its middle, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def arguments(fields: dict[str, object], experiment: str = "dpo_hh") -> list[str]:
    """The arguments of the command line: `train` and its options."""
    return [
        "train",
        "--config",
        str(REPO / "experiments" / f"{experiment}.py"),
        *(f"--config.{k}={v}" for k, v in fields.items()),
    ]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a process with so many simulated devices; runs of a test session share the compiled programs of one device.

    Programs of several devices are not shared: a CPU program from jax's cache of compiled programs has lost the order of its collectives,
    so its devices may wait for ever in different ones (seen with jax 0.10.2: all-reduce, all-gather and permute at once).
    """
    cache = os.environ.get("PYTEST_COMPILE_CACHE", "")
    flags = f"--xla_force_host_platform_device_count={devices} {conftest.QUICK} {conftest.PATIENT}"
    own = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if cache and devices == 1:
        own |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "true"}
    return os.environ | own | more


def command(args: list[str]) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "alignax", *args]


def begin(args: list[str], env: dict[str, str] | None = None, cwd: Path = REPO) -> subprocess.Popen:
    """Starts the command."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command(args), env=env or environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=cwd)


def begin_two(args: list[list[str]], cwds: tuple[Path, Path] = (REPO, REPO)) -> list[subprocess.Popen]:
    """Starts two processes of four devices each that find one another, each in a folder of its own."""
    return begin_group(args, 4, cwds)


def begin_group(args: list[list[str]], devices: int, cwds: Sequence[Path] = (), **more: str) -> list[subprocess.Popen]:
    """Starts processes of so many devices each that find one another, each with its own arguments; `more` is in their environment."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        own = {"JAX_COORDINATOR_ADDRESS": f"localhost:{s.getsockname()[1]}", "JAX_NUM_PROCESSES": str(len(args)), "PYTHONPATH": str(REPO)}
    place = lambda i: environment(devices, **own, JAX_PROCESS_ID=str(i), **more)
    return [begin(words, place(i), cwds[i] if cwds else REPO) for i, words in enumerate(args)]


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 240) -> str:
    """Waits for the command and checks its exit code; returns what it printed."""
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, out
    return out


def stop_when(process: subprocess.Popen, condition, how: signal.Signals, timeout: float = 240) -> bool:
    """Sends the signal as soon as the condition holds; False if the process ended before."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            process.send_signal(how)
            return True
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.002)
    return False


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """Step -> training metrics, speed left out."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {r["step"]: {k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows if "loss" in r}


def evaluations(workdir: Path) -> list[dict[str, float]]:
    """The evaluation rows."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/loss" in row]


def final_params(workdir: Path, *options: str) -> dict[str, bytes]:
    """The tensors of the run's newest checkpoint, by way of `alignax export`."""
    out = workdir.with_name(workdir.name + "_export")
    finish(begin(["export", str(workdir), str(out), *options]))
    from safetensors.numpy import load_file

    return load_file(out / "model.safetensors")


def long_but(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of a slow parametrised test; `make test-slow` runs those kept, and the long tests the others."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.long) for case in cases]


def by_turn(cases: Iterable[Any], everyday: Sequence[Any], slow: Sequence[Any]) -> list[Any]:
    """The cases of a parametrised test: those of `make test`, those of the slow tests, and all others, which are long."""
    marks = lambda case: () if case in everyday else pytest.mark.slow if case in slow else (pytest.mark.slow, pytest.mark.long)
    return [pytest.param(case, marks=marks(case)) for case in cases]


def slow_but(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of a parametrised test; `make test` runs those kept, and the slow tests the others."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
