"""Signals while a run is prepared: the exit code and the line of a stop in training, nothing half-written, and a restart that works."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import runs

from alignax import cli, interrupts, output
from alignax.models import hf
from alignax.run import prepare, reference_cache, start
from alignax.run.stop import Stop, preparing

MOMENTS = {  # a function that has just run when the signal comes
    "data": (prepare, "load"),
    "weights": (hf, "load_params"),
    "programs": (start, "check_step"),
    "cache": (reference_cache, "computed"),
    "a file": (output, "_sync"),
    "workdir": (start, "open_workdir"),
    "checkpoints": (start, "Checkpoints"),
}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    more = {"steps": 1, "eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0, "data.eval": "", "reference.cache": folder / "cache"}
    return runs.world(folder) | more


def stopped(words, moment, number, monkeypatch):
    """The exit code of a command that gets a signal once the function has run; the function works as before then."""
    owner, name = MOMENTS[moment]
    real = getattr(owner, name)

    def signalled(*args, **more):
        out = real(*args, **more)
        os.kill(os.getpid(), number)
        return out

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(owner, name, signalled)
        cli.main(words)
    return ended.value.code


def line(name):
    return f"stopped by {name} while the run was prepared; the same command prepares it again.\n"


@pytest.mark.parametrize(
    "moment, number",
    [
        ("data", signal.SIGTERM),
        ("weights", signal.SIGINT),
        ("cache", signal.SIGTERM),
        ("a file", signal.SIGHUP),
        ("workdir", signal.SIGTERM),
    ]
    + [pytest.param(moment, signal.SIGTERM, marks=pytest.mark.slow) for moment in ("programs", "checkpoints")],
)
def test_a_signal_while_a_run_is_prepared_ends_it_in_one_line(moment, number, fields, tmp_path, monkeypatch, capsys):
    words = runs.arguments(fields | {"workdir": tmp_path / "run", "reference.cache": tmp_path / "cache"})
    before = [signal.signal(n, signal.SIG_DFL) for n in interrupts.SIGNALS]
    try:
        assert stopped(words, moment, number, monkeypatch) == 128 + number
    finally:
        for n, handler in zip(interrupts.SIGNALS, before, strict=True):
            signal.signal(n, handler)
    assert capsys.readouterr().err.endswith(line(interrupts.SIGNALS[number]))
    assert not [path for path in tmp_path.rglob("*") if output.unfinished(path)] and not [*tmp_path.glob("run/checkpoints/*")]
    written = {"workdir", "checkpoints"}
    assert (tmp_path / "run").exists() == (moment in written)
    if moment in written:  # nothing is learnt yet, so the experiment may still change
        assert cli.main([*words, "--config.optimizer.learning_rate=0.002"]) == 0 and [*tmp_path.glob("run/checkpoints/1")]


def test_ignored_signals_stay_ignored_and_earlier_handlers_come_back():
    before = {n: signal.getsignal(n) for n in interrupts.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preparing():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


@pytest.mark.slow
def test_a_process_that_is_told_to_end_while_it_fills_the_cache(fields, tmp_path):
    """The signal comes from outside, at a moment that no function chooses."""
    words = runs.arguments(fields | {"workdir": tmp_path / "run", "reference.cache": tmp_path / "cache"})
    process = runs.begin(words)
    assert runs.stop_when(process, lambda: any(tmp_path.glob("cache/*")), signal.SIGTERM)
    assert runs.finish(process, code=143).endswith(line("SIGTERM"))
    assert "step 1/1" in runs.finish(runs.begin(words))


@pytest.mark.long
@pytest.mark.slow
def test_one_of_two_processes_does_not_wait_for_the_other_to_end(fields, tmp_path):
    words = runs.arguments(fields | {"workdir": tmp_path / "run", "reference.cache": tmp_path / "cache"})
    first, second = runs.begin_two([words] * 2)
    try:
        assert runs.stop_when(second, lambda: any(tmp_path.glob("cache/*")), signal.SIGTERM)
        assert runs.finish(second, code=143, timeout=30).endswith(line("SIGTERM"))
    finally:
        first.kill()
        first.communicate()


COMPILES = """
import sys
import jax, jax.numpy as jnp
from alignax import cli
from alignax.run.stop import Stop, preparing

def long(x):
    for i in range(1500):
        x = jnp.sin(x @ x) + i * jnp.cos(x)
    return x

def command(args):
    program = jax.jit(long).lower(jnp.ones((8, 8)))
    print("lowered", flush=True)
    with {"train": Stop, "prepare": preparing}[args[0]]():
        program.compile()
    return 0

cli.command = command
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, numbers, code, said",
    [
        ("train", (signal.SIGTERM, signal.SIGINT), 130, r"^SIGTERM came while .* compiled.* saves; a Ctrl-C .*\nalignax: interrupted\n$"),
        ("train", (signal.SIGINT, signal.SIGINT), 130, r"^Ctrl-C came while .* compiled.*; a second Ctrl-C .*\nalignax: interrupted\n$"),
        ("prepare", (signal.SIGTERM,), 143, "^stopped by SIGTERM while the run was prepared; the same command prepares it again.\n$"),
    ],
)
def test_a_signal_does_not_wait_for_a_compilation(mode, numbers, code, said):
    """The program takes a minute or more to compile, which the regular end of Python waits for."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", COMPILES, mode], env=runs.environment(), stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "lowered\n"
        for number in numbers:
            time.sleep(1)
            process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert process.returncode == code and re.search(said, err), err
    finally:
        process.kill()
        process.communicate()


def test_what_a_stop_waits_for_is_said_once(capsys):
    """A function of jax whose name has `compile` in it stands for a compilation."""
    place = f"{os.sep}site-packages{os.sep}jax{os.sep}compiler.py"
    backend = {"kill": lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]}
    exec(compile("def backend_compile():\n    kill()", place, "exec"), backend)
    before = {n: signal.getsignal(n) for n in interrupts.SIGNALS}
    with Stop() as stop:
        backend["backend_compile"]()
        assert stop.signal == signal.SIGTERM
    assert capsys.readouterr().err.count("SIGTERM came while a program is compiled") == 1
    with Stop() as stop:
        backend["kill"]()
        assert stop.signal == signal.SIGTERM
    assert not capsys.readouterr().err and {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize(
    "ends, left", [(lambda: 143, [143]), (lambda: sys.exit(130), [130]), (lambda: 0, []), (lambda: 2, []), (lambda: sys.exit(1), [])]
)
def test_the_command_ends_its_own_process_after_a_signal_alone(ends, left, monkeypatch):
    """A caller that gives the words keeps its process, whatever comes."""
    codes = []
    monkeypatch.setattr(cli, "command", lambda args: ends())
    monkeypatch.setattr(interrupts.os, "_exit", codes.append)
    for words in (["x"], None):
        codes.clear()
        with contextlib.suppress(SystemExit):
            cli.main(words)
        assert codes == ([] if words else left)
