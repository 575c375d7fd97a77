"""Several processes of which one dies, hangs or fails: all end within a minute, each with one line that says who and why."""

import os
import resource
import signal
import socket
import subprocess
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
    return runs.begin_group([runs.arguments(fields)] * count, devices, (), **environment)


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
