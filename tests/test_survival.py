"""Several processes of which one dies, hangs or fails: all end within a minute, each with one line that says who and why."""

import os
import random
import resource
import signal
import socket
import sys
import time

import numpy as np
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


def whole_or_killed(args, count, kills, rng, workdir):
    """Runs a command in so many processes and starts it again after each kill, as a supervisor does; the kinds of kills that hit."""
    hit = []
    saving = lambda: any(workdir.glob("checkpoints/*tmp*"))
    while True:
        processes = runs.begin_group([args] * count, 1, (), ALIGNAX_START_SECONDS="60")
        who, how = rng.randrange(count), rng.choice(["set-up", "step", "save"])
        if len(hit) < kills:
            end = time.monotonic() + rng.uniform(1, 8)
            target = (len(runs.losses(workdir)) if (workdir / "metrics.jsonl").exists() else 0) + rng.randint(1, 3)
            when = {"set-up": lambda end=end: time.monotonic() > end, "step": learning(workdir, target), "save": saving}[how]
            if runs.stop_when(processes[who], when, signal.SIGKILL):
                hit.append(how)
        found = ends(processes, 240)
        if not any(code for code, _ in found):
            return hit
        codes = [code for code, _ in found]  # 2: the process was killed before the processes had met
        assert codes.pop(who) == -9 and set(codes) in ({1}, {2}), found


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_killed_many_times_is_the_run_that_never_was(fields, tmp_path):
    """ALIGNAX_TEST_KILLS sets how often; the steps since the newest checkpoint are taken again, bit for bit."""
    kills, own = int(os.environ.get("ALIGNAX_TEST_KILLS", "3")), fields | {"steps": 48, "checkpoint.every": 2}
    words = {name: runs.arguments(own | {"workdir": tmp_path / name}, "sft_hh") for name in ("whole", "killed")}
    assert whole_or_killed(words["whole"], 2, 0, random.Random(0), tmp_path / "whole") == []
    hit = whole_or_killed(words["killed"], 2, kills, random.Random(kills), tmp_path / "killed")
    print(f"{kills} kills: {hit}")
    assert len(hit) == kills
    assert runs.losses(tmp_path / "whole") == runs.losses(tmp_path / "killed")
    found, wanted = (runs.final_params(tmp_path / name) for name in ("killed", "whole"))
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


# Of moments that are divided by at least eps: else rounding changes the signs of updates whose gradient is almost 0.
STEADY = {"steps": 12, "optimizer.schedule": "constant", "optimizer.eps": 1e-3}


@pytest.fixture(scope="module")
def alone(fields, tmp_path_factory):
    """A run of one process: its losses and its final parameters."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(runs.begin(runs.arguments(fields | STEADY | {"workdir": workdir}, "sft_hh")))
    return runs.losses(workdir), runs.final_params(workdir)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (4, 2)])
def test_a_run_goes_on_in_another_number_of_processes(counts, alone, fields, tmp_path):
    workdir = tmp_path / "run"
    for count, steps in zip(counts, (6, 12), strict=True):
        args = runs.arguments(fields | STEADY | {"workdir": workdir, "steps": steps}, "sft_hh")
        for process in runs.begin_group([args] * count, 1) if count > 1 else [runs.begin(args)]:
            runs.finish(process)
    losses, params = runs.losses(workdir), runs.final_params(workdir)
    assert losses.keys() == alone[0].keys()
    assert [losses[step]["loss"] for step in losses] == pytest.approx([row["loss"] for row in alone[0].values()], rel=1e-6)
    for name in params:
        np.testing.assert_allclose(params[name], alone[1][name], atol=1e-6)  # type: ignore
