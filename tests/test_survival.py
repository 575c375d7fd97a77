"""Several processes of which one dies, hangs or fails: all end within a minute, each with one line that says who and why."""

import resource
import signal
import socket
import sys
import time

import pytest
import runs

from alignax.link import GOES_ON

HOST = socket.gethostname()
NOTHING = {"eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0, "data.eval": ""}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world")) | NOTHING | {"steps": 100_000, "log.every": 100_000}


def group(fields, count, devices=1, **environment):
    return runs.begin_group([runs.arguments(fields, "sft_hh")] * count, devices, (), **environment)


def learning(workdir, steps=4):
    """Whether a run has taken so many steps."""
    return lambda: (workdir / "metrics.jsonl").exists() and len(runs.losses(workdir)) >= steps


def ends(processes, within):
    """The exit codes and the last lines of processes, which all end within so many seconds."""
    end, found = time.monotonic() + within, []
    try:
        for process in processes:
            out = process.communicate(timeout=max(end - time.monotonic(), 0.1))[0]
            assert "Traceback" not in out and "stack trace" not in out and "make room" not in out, out
            found.append((process.returncode, out.rstrip("\n").rpartition("\n")[2]))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, who, how",
    [
        (2, 1, signal.SIGKILL),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (2, 0, signal.SIGKILL),
                (4, 2, signal.SIGKILL),
                (4, 0, signal.SIGKILL),
                (2, 1, signal.SIGSTOP),
                (2, 0, signal.SIGSTOP),
            )
        ),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_others_with_its_name(count, who, how, fields, tmp_path):
    workdir = tmp_path / "run"
    processes = group(fields | {"workdir": workdir}, count, ALIGNAX_LOST_SECONDS="10")
    assert runs.stop_when(processes[who], learning(workdir), how)
    others = [process for i, process in enumerate(processes) if i != who]
    why = (
        "was killed, or its machine is gone"
        if how == signal.SIGKILL
        else "has given no sign of life for 10 s: it hangs, or its machine is gone"
    )
    line = f"alignax: stopped: process {who} on {HOST} {why}; {GOES_ON}"
    try:
        assert ends(others, 10 if how == signal.SIGKILL else 25) == [(1, line)] * (count - 1)
        processes[who].send_signal(signal.SIGCONT)
        out = processes[who].communicate(timeout=10)[0]  # a process that was stopped wakes up, and hears of it
        assert how == signal.SIGKILL or out.endswith(f"\n{line}\n"), out
    finally:
        processes[who].kill()
        processes[who].wait()


@pytest.mark.slow
@pytest.mark.parametrize("who", runs.long_but((0, 1), 1))
def test_a_signal_while_one_of_two_processes_prepares_ends_both_at_once(who, fields, tmp_path):
    """The other one waits where processes agree, or computes."""
    processes = group(fields | {"workdir": tmp_path / "run"}, 2)
    assert runs.stop_when(processes[who], (tmp_path / "run" / "config.py").exists, signal.SIGTERM)
    line = "stopped by SIGTERM while the run was prepared; the same command prepares it again."
    found = ends(processes, 10)
    assert found[who] == (143, line)
    assert found[1 - who] == (143, f"alignax: stopped: process {who} on {HOST} ended: {line}")


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_all_with_its_words(fields, tmp_path):
    """The limit on the size of files stands for the disk; the other process waits for a checkpoint that is never whole."""
    workdir = tmp_path / "run"
    processes = group(fields | {"workdir": workdir, "checkpoint.every": 8}, 2)
    assert runs.stop_when(processes[1], learning(workdir, 1), signal.SIGCONT)
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (4096, 4096))
    first, second = [process.communicate(timeout=60)[0] for process in processes]
    said = f"error: a checkpoint could not be written to {str(workdir / 'checkpoints')!r}"
    assert f"alignax: {said}" in second and second.endswith("earlier checkpoints are complete: make room, and run the same command again\n")
    assert first.rstrip("\n").rpartition("\n")[2].startswith(f"alignax: stopped: process 1 on {HOST} ended: {said}")
    assert [process.returncode for process in processes] == [2, 2]


SLOW = """
import os, sys, time
from alignax import cli
from alignax.run.checkpoint import Checkpoints
meet = Checkpoints._meet
def slow(self, **given):
    if "Save" not in given["key"] and os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(3)
    return meet(self, **given)
Checkpoints._meet = slow
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_slow_store_is_waited_for_and_a_stop_is_saved_whole(fields, tmp_path, monkeypatch):
    """The parts of one process are written later than after the silence that makes a process lost."""
    workdir = tmp_path / "run"
    monkeypatch.setattr(runs, "command", lambda args: [sys.executable, "-c", SLOW, *args])
    processes = group(fields | {"workdir": workdir}, 2, ALIGNAX_LOST_SECONDS="2.5")
    assert runs.stop_when(processes[1], learning(workdir, 7), signal.SIGTERM)
    (code, line), other = ends(processes, 60)
    assert code == other[0] == 143 and "stopped by SIGTERM after step " in line
    step = int(line.split("after step ")[1].split(";")[0])
    assert step <= len(runs.losses(workdir)) and (workdir / "checkpoints" / str(step) / "params").is_dir()
    assert not [*workdir.glob("checkpoints/*tmp*")]
