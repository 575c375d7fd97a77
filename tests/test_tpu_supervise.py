"""tpu/supervise.sh, which runs a command again when it dies."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import runs as runs_of_alignax
from fake_cloud import TPU, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts of the workers are for Linux")

# Counts its runs, keeps its arguments, and then does what is written in the file `behaviour` for this run, or for the last.
COMMAND = """#!/usr/bin/env bash
echo >>runs
printf '%s\\0' "$@" >arguments
n=$(wc -l <runs)
source <(sed -n "${n}p" behaviour | grep . || tail -n 1 behaviour)
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/alignax"
    command.write_text(COMMAND)
    command.chmod(0o755)
    (tmp_path / "tpu").mkdir()  # a checkout without an environment, whose alignax would come first
    shutil.copy2(TPU / "supervise.sh", tmp_path / "tpu")
    return tmp_path


def start(place, *behaviour, arguments=("train", "--config.workdir=work dir"), **settings):
    (place / "behaviour").write_text("\n".join(behaviour) + "\n")
    environment = {"PATH": f"{place}/bin:{os.environ['PATH']}", "RESTART_SECONDS": "0"} | settings
    heard = ["env", "--default-signal=HUP"]  # under nohup, bash could not trap it
    command = [*heard, place / "tpu/supervise.sh", "alignax", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)


def finish(process):
    text, _ = process.communicate(timeout=60)
    return process.returncode, text


def runs(place):
    return len((place / "runs").read_text()) if (place / "runs").exists() else 0


@pytest.mark.parametrize("death", ["kill -KILL $$", "kill -ABRT $$", "kill -TERM $$", "exit 1"])
def test_what_dies_runs_again_with_the_very_arguments(place, death):
    arguments = ["train", 'it\'s "$HOME" `id` \\', "*", "", "two\nlines", "ü&;|#~"]
    code, text = finish(start(place, death, death, "exit 0", arguments=arguments))
    assert code == 0 and runs(place) == 3
    assert (place / "arguments").read_text().split("\0")[:-1] == arguments
    number = {"kill -KILL $$": 137, "kill -ABRT $$": 134, "kill -TERM $$": 143, "exit 1": 1}[death]
    assert f"ended with exit code {number}; starting again in 0 s (restart 2 of 10 without a newer checkpoint)" in text
    assert text.endswith(": ended with exit code 0\n")


@pytest.mark.parametrize("code", [0, 2, 126, 127])
def test_success_and_what_a_restart_does_not_mend_end_it(place, code):
    ended, text = finish(start(place, f"exit {code}"))
    assert ended == code and runs(place) == 1 and "again" not in text


def test_a_command_that_does_not_exist_ends_it(place):
    (place / "bin/alignax").unlink()
    assert finish(start(place, "exit 0", PATH="/usr/bin:/bin"))[0] == 127


def test_it_gives_up_without_a_newer_checkpoint(place):
    made = "mkdir -p 'work dir/checkpoints/7'; exit 1"
    code, text = finish(start(place, "exit 1", "exit 1", made, "exit 5", RESTARTS="3"))
    assert code == 5 and runs(place) == 6  # three restarts after the run that made a checkpoint
    assert "no newer checkpoint after 3 restarts; giving up" in text and text.endswith("ended with exit code 5\n")


def test_no_restart_if_none_is_allowed(place):
    assert finish(start(place, "exit 1", RESTARTS="0"))[0] == 1 and runs(place) == 1


@pytest.mark.parametrize("where", ["work dir/checkpoints", "work dir/rpo/checkpoints", "work dir/fits/rpo/checkpoints"])
@pytest.mark.parametrize("arguments", [["--config.workdir=work dir"], ["--config.workdir", "work dir"]])
def test_a_newer_checkpoint_is_progress(place, where, arguments):
    step = f"rm -rf '{where}'; mkdir -p '{where}'/$n; [ $n = 8 ] || exit 1"
    assert finish(start(place, step, arguments=["train", *arguments], RESTARTS="1"))[0] == 0 and runs(place) == 8


@pytest.mark.parametrize(
    "made", ["work dir/checkpoints/$n.orbax-checkpoint-tmp", "work dir/$n", "other/checkpoints/$n", "work dir/a/b/c/d/e/checkpoints/$n"]
)
def test_another_folder_is_no_progress(place, made):
    assert finish(start(place, f'mkdir -p "{made}"; exit 1', RESTARTS="2"))[0] == 1 and runs(place) == 3


def test_without_a_workdir_every_restart_counts(place):
    step = "mkdir -p checkpoints/$n; exit 1"
    assert finish(start(place, step, arguments=["train"], RESTARTS="2"))[0] == 1 and runs(place) == 3


def test_checkpoints_in_a_bucket_are_listed_by_the_path_library(place):
    python = place / "bin/python"  # stands for etils.epath, with a store in the folder `bucket`
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >asked\ncat >program\nls bucket\n')
    python.chmod(0o755)
    step = "mkdir -p bucket/$n; [ $n = 5 ] || exit 1"
    code, _ = finish(start(place, step, arguments=["train", "--config.workdir=gs://bucket/a run"], RESTARTS="1"))
    assert code == 0 and runs(place) == 5 and (place / "asked").read_text() == "-\ngs://bucket/a run\n"
    program = place / "program"  # and the program finds checkpoints, here those of a local folder
    for folder in ("checkpoints/12", "checkpoints/13.tmp", "rpo/checkpoints/7", "fits/rpo/checkpoints/8"):
        (place / "store" / folder).mkdir(parents=True)
    listed = subprocess.run([sys.executable, program, place / "store"], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [str(place / "store" / folder) for folder in ("checkpoints/12", "fits/rpo/checkpoints/8", "rpo/checkpoints/7")]


def test_a_store_that_does_not_answer_is_no_progress(place):
    python = place / "bin/python"
    python.write_text("#!/usr/bin/env bash\nexit 1\n")
    python.chmod(0o755)
    code, _ = finish(start(place, "exit 1", arguments=["train", "--config.workdir=gs://bucket/run"], RESTARTS="2"))
    assert code == 1 and runs(place) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_ends_it(place, number):
    process = start(place, "trap 'sleep 0.3; echo saved; exit 143' TERM; echo >up; while :; do sleep 0.05; done")
    eventually(lambda: (place / "up").exists())
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)  # a second one does not end it sooner
    code, text = finish(process)
    assert code == 143 and runs(place) == 1 and text.count("saved\n") == 1 and text.endswith("ended with exit code 143\n")


def test_a_signal_ends_the_wait_for_a_restart(place):
    process = start(place, "exit 1", RESTART_SECONDS="50")
    eventually(lambda: runs(place) == 1)
    line = process.stdout.readline() + process.stdout.readline()
    assert "starting again in 50 s (restart 1 of 10" in line
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 143 and runs(place) == 1 and text.endswith("ended with exit code 143\n")


def test_waits_double_up_to_a_minute(place):
    (place / "bin/sleep").write_text('#!/usr/bin/env bash\necho "$1" >>slept\n')
    (place / "bin/sleep").chmod(0o755)
    finish(start(place, "exit 1", RESTART_SECONDS="5"))
    assert (place / "slept").read_text().split() == "5 10 20 40 60 60 60 60 60 60".split()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {}, "error: no command; give one, as in: tpu/supervise.sh alignax train --config experiments/dpo_hh.py\n"),
        (["true"], {"RESTARTS": "many"}, "error: RESTARTS is 'many'; use a whole number\n"),
        (["true"], {"RESTART_SECONDS": "5s"}, "error: RESTART_SECONDS is '5s'; use a whole number\n"),
    ],
)
def test_bad_input_is_one_line(arguments, settings, message):
    done = subprocess.run([TPU / "supervise.sh", *arguments], env=os.environ | settings, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_of_a_real_run_outlive_a_kill(tmp_path):
    """kill -9 of one process ends the other one; their supervisors start both again, and the run goes on from its checkpoint."""
    fields = runs_of_alignax.world(tmp_path) | {"workdir": str(tmp_path / "run"), "steps": 30, "checkpoint.every": 3, "eval.samples": 0}
    with socket.socket() as s:
        s.bind(("localhost", 0))
        peers = {"JAX_COORDINATOR_ADDRESS": f"localhost:{s.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    logs, both = [tmp_path / f"log{i}" for i in range(2)], []
    try:
        for i, log in enumerate(logs):
            environment = runs_of_alignax.environment(1, JAX_PROCESS_ID=str(i), PYTHONPATH=str(TPU.parent), RESTART_SECONDS="5", **peers)
            command = [TPU / "supervise.sh", *runs_of_alignax.command(runs_of_alignax.arguments(fields))]
            with log.open("w") as out:
                both.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True))
        eventually(lambda: list((tmp_path / "run/checkpoints").glob("[1-9]")), seconds=200)
        (child,) = subprocess.run(["ps", "-o", "pid=", "--ppid", str(both[1].pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(child), signal.SIGKILL)
        codes = [process.wait(300) for process in both]
    finally:
        for process in both:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    texts = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(texts)
    assert "ended with exit code 137; starting again in 5 s" in texts[1] and "; starting again in 5 s" in texts[0]
    assert re.search(r"going on after step [1-9]", texts[0]) and (tmp_path / "run/checkpoints/30").exists()
