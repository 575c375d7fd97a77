"""The scripts under tpu/ against a fake gcloud: several slices, ways to pay, commands other than `train`, and their environment."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from fake_cloud import SETTINGS, Cloud, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers' half needs Linux: flock and setsid")

PLACE = ["--zone=us-central1-a", "--project=a-project"]
SECRET = 'hf_it\'s a "$ecret" `id` \\\nof two lines '


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.kill()


@pytest.fixture
def pair(tmp_path):
    """A cloud of two slices with two workers each, set up, its record of commands empty."""
    cloud = Cloud(tmp_path, slices=2)
    cloud.succeed("setup")
    cloud.calls()
    yield cloud
    cloud.kill()


@pytest.fixture
def ready(cloud):
    cloud.succeed("setup")
    cloud.calls()
    return cloud


def named(calls, kind):
    """The sorted names of the TPUs that calls of a kind are for."""
    return sorted(word.partition(":")[0] for call in calls if call[2:4] == kind.split() for word in call[4:6] if word.startswith("my-tpu"))


def environment(worker):
    return dict(pair.split("=", 1) for pair in (worker / "environment").read_text().split("\0")[:-1])


# --- several slices


def test_slices_are_one_queued_resource(pair):
    pair.set(states={"queued-resources": ["ACTIVE"], "tpu-vm": ["READY"], "tpu-vm my-tpu-1": ["CREATING", "READY"]})
    errors = pair.succeed("create")
    create, *rest = pair.calls(short=False)
    assert create == [
        *"compute tpus queued-resources create my-tpu --node-count=2 --node-prefix=my-tpu --runtime-version=v2-alpha-tpuv5-lite".split(),
        "--accelerator-type=v5litepod-16",
        *PLACE,
    ]
    assert [call[4] for call in rest] == ["my-tpu", "my-tpu-0", "my-tpu-1"] * 2 and "TPU 'my-tpu' is CREATING" in errors
    pair.succeed("delete", YES="1")
    assert pair.calls(short=False) == [["compute", "tpus", *f"queued-resources delete my-tpu {' '.join(PLACE)} --force --quiet".split()]]


def test_setup_reaches_the_workers_of_all_slices(tmp_path):
    cloud = Cloud(tmp_path, slices=2)
    cloud.succeed("setup")
    calls = cloud.calls(short=False)
    assert named(calls, "tpu-vm scp") == named(calls, "tpu-vm ssh") == ["my-tpu-0", "my-tpu-1"]
    for worker in cloud.workers:
        assert (worker / "alignax/alignax/kept.py").exists() and "--editable .[tpu,gcs]" in (worker / "installed").read_text()


def test_train_logs_and_stop_on_all_slices(pair):
    pair.succeed("train", "experiments/a b.py", "--x=it's")
    for n, worker in enumerate(pair.workers):
        eventually(lambda n=n: "training" in pair.log(n).splitlines())
        assert (worker / "arguments").read_text().split("\0")[:-1] == ["train", "experiments/a b.py", "--x=it's"]
        with (worker / "alignax-run/log").open("a") as log:
            log.write(f"here is {worker.name}\n")
    pair.succeed("stop")
    assert [(worker / "alignax-run/exit").read_text() for worker in pair.workers] == ["143\n"] * 4
    for chosen, shown in (({"SLICE": "1", "WORKER": "0"}, ["1.0: here is worker2"]), ({}, ["0.0: here is worker0"])):
        pair.succeed("logs", **chosen)
        assert [line for line in pair.finished.stdout.splitlines() if "here is" in line] == shown
    pair.succeed("logs", SLICE="all", WORKER="all")
    shown = sorted(line for line in pair.finished.stdout.splitlines() if "here is" in line)
    assert shown == [f"{n // 2}.{n % 2}: here is worker{n}" for n in range(4)]


def test_a_line_of_shell_runs_on_all_slices(pair):
    pair.succeed("run", 'echo "$PWD  it\'s"')
    assert sorted(pair.finished.stdout.splitlines()) == sorted(f"{worker}  it's" for worker in pair.workers)
    (pair.workers[3] / "broken").touch()
    assert pair.run("run", "! [ -e broken ] || exit 9")[0] == 9


def test_training_starts_nowhere_while_a_worker_of_one_slice_is_busy(pair):
    assert pair.run("run", "cd alignax && [ $HOME != " + str(pair.workers[3]) + " ] || bash tpu/worker.sh start alignax train a.py")[0] == 0
    code, errors = pair.run("train", "b.py")
    assert code == 1 and "training already runs here" in errors and not any(pair.running(n) for n in range(3))


def test_ctrl_c_ends_the_commands_of_all_slices(pair):
    settings = SETTINGS | pair.settings | {"FAKE": str(pair.root), "PATH": f"{pair.root}/bin:{os.environ['PATH']}"}
    command = [pair.project / "tpu/run.sh", 'echo $$ >"$HOME/shell"; exec sleep 60']
    script = subprocess.Popen(command, env=settings, start_new_session=True, stderr=subprocess.DEVNULL)
    shells = [worker / "shell" for worker in pair.workers]
    eventually(lambda: all(shell.exists() and shell.read_text().strip() for shell in shells))
    os.killpg(script.pid, signal.SIGINT)  # as the terminal does it; what runs for a slice has a process group of its own
    assert script.wait(20) == 130
    for shell in shells:
        eventually(lambda shell=shell: not os.path.exists(f"/proc/{shell.read_text().strip()}"))


@pytest.mark.parametrize("script", ["create", "setup", "train", "logs", "stop", "run", "delete", "resume"])
def test_a_dry_run_names_every_slice(tmp_path, script):
    cloud = Cloud(tmp_path, slices=3)
    errors = cloud.succeed(script, *(["a.py"] if script in ("train", "run", "resume") else []), DRY_RUN="1", SLICE="all")
    assert not cloud.calls()
    wanted = ["my-tpu"] if script == "delete" else ["my-tpu-0", "my-tpu-1", "my-tpu-2"]
    assert all(f" {name} " in errors or f" {name}:" in errors for name in wanted)


# --- ways to pay


@pytest.mark.parametrize(
    ("settings", "track", "flags"),
    [
        ({}, [], []),
        ({"SPOT": "1"}, [], ["--spot"]),
        ({"RESERVED": "1"}, [], ["--reserved"]),
        ({"RESERVATION": "ours"}, ["alpha"], ["--reservation=ours"]),
        ({"FLEX_START": "1d12h"}, ["alpha"], ["--provisioning-model=flex-start", "--max-run-duration=1d12h"]),
    ],
)
def test_ways_to_pay(cloud, settings, track, flags):
    cloud.succeed("create", QUEUED="1", CREATE_FLAGS="--tags=a", TPU_TYPE="v6e-16", **settings)
    create, *rest = cloud.calls(short=False)
    assert create[: len(track) + 4] == [*track, *"compute tpus queued-resources create".split()]
    assert create[-len(flags) - 4 :] == ["--accelerator-type=v6e-16", *PLACE, *flags, "--tags=a"]
    assert all(call[0] == "compute" for call in rest)


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("create", {"SPOT": "1", "RESERVED": "1"}, "several of SPOT, RESERVED, RESERVATION and FLEX_START are set; set one of them"),
        ("resume", {"FLEX_START": "12h", "QUEUED": "0"}, "RESERVATION and FLEX_START are for queued resources only; set QUEUED=1"),
        ("create", {"FLEX_START": "1", "QUEUED": "1"}, "FLEX_START is '1'; use the time for which the TPU is wanted, at most 7 days"),
        ("create", {"RESERVATION": "a b", "QUEUED": "1"}, "RESERVATION is 'a b'; use the name of a reservation"),
        ("create", {"RESERVED": "yes"}, "RESERVED is 'yes'; use 0 or 1"),
        ("create", {"SLICES": "2"}, "SLICES is '2', and several slices are had as a queued resource only; set QUEUED=1"),
        ("train", {"SLICES": "two"}, "SLICES is 'two'; use a whole number of slices"),
        ("train", {"RESTART_SECONDS": "08"}, "RESTART_SECONDS is '08'; use a whole number of seconds"),
        ("train", {"RESTARTS": "-1"}, "RESTARTS is '-1'; use a whole number of restarts"),
        ("logs", {"SLICE": "1"}, "SLICE is '1', and SLICES is '1'; use a number below 1"),
        ("logs", {"SLICE": "x; id"}, "SLICE is 'x; id'; use the number of a slice, or all"),
        ("create", {"TPU_TYPE": "tpu7x-16"}, "TPU_TYPE is 'tpu7x-16'; Ironwood is had through GKE only: see tpu/gke/jobset.yaml"),
        ("resume", {"TPU_TYPE": "ironwood"}, "TPU_TYPE is 'ironwood'; Ironwood is had through GKE only"),
        ("train", {"FORWARD": "A-B"}, "FORWARD names 'A-B'; use names of variables, with spaces between them"),
        ("resume", {"FORWARD": "MISSING"}, "FORWARD names MISSING, which is not set; set it, as in: export MISSING=VALUE"),
        ("run", {}, "got 2 arguments, the first of them 'an argument'; give one command in quotes"),
    ],
)
def test_bad_input_is_one_line_before_any_command(cloud, script, settings, message):
    arguments = ["an argument", "another"] if script in ("train", "run", "resume") else []
    code, errors = cloud.run(script, *arguments, **settings)
    assert (code, cloud.calls()) == (2, []) and errors.count("\n") == 1 and errors.startswith(f"error: {message}")


# --- commands other than `train`


HOSTILE = ["overopt", '--config.note=it\'s "$HOME" `id` \\', "*", "", "two\nlines", "ü&;|#~"]


def test_any_alignax_command_runs_as_training_does(ready):
    errors = ready.succeed("run", "alignax", *HOSTILE)
    assert "'alignax overopt' started; see its log with tpu/logs.sh" in errors
    for n, worker in enumerate(ready.workers):
        eventually(lambda n=n: "training" in ready.log(n).splitlines())
        assert (worker / "arguments").read_text().split("\0")[:-1] == HOSTILE
        assert os.getsid(ready.pid(n)) == ready.pid(n)
    assert ready.run("train", "a.py")[0] == 1
    ready.calls()
    ready.succeed("resume", "alignax", *HOSTILE)
    assert ready.calls() == ["tpu-vm describe", "tpu-vm ssh"]  # it runs
    ready.succeed("stop")
    ready.succeed("resume", "alignax", "overopt", "finish")
    eventually(lambda: ready.log(1).endswith("ended with exit code 0\n"))
    assert (ready.workers[1] / "arguments").read_text().split("\0")[:-1] == ["overopt", "finish"]


def test_the_experiment_file_of_any_command_is_looked_for(cloud):
    code, errors = cloud.run("run", "alignax", "overopt", "--config", "experiments/no.py")
    assert code == 2 and "experiment file 'experiments/no.py' does not exist" in errors and not cloud.calls()


# --- the environment


def test_named_variables_reach_the_command_and_are_never_shown(ready):
    given = {
        "HF_TOKEN": SECRET,
        "XLA_FLAGS": "--a=1 --b",
        "LIBTPU_INIT_ARGS": "",
        "MY_KEY": SECRET + "mine",
        "FORWARD": " MY_KEY  HF_HOME ",
    }
    errors = ready.succeed("train", "a.py", HF_HOME="/mnt/hf", JAX_COMPILATION_CACHE_DIR="gs://b/c", OTHER="x", **given)
    for n, worker in enumerate(ready.workers):
        eventually(lambda n=n: "training" in ready.log(n).splitlines())
        has = environment(worker)
        assert {name: has[name] for name in ("HF_TOKEN", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "MY_KEY")} == {
            name: value for name, value in given.items() if name != "FORWARD"
        }
        assert has["HF_HOME"] == "/mnt/hf" and has["JAX_COMPILATION_CACHE_DIR"] == "gs://b/c" and "OTHER" not in has
        assert not (worker / "alignax-run/environment").exists() and (worker / "alignax-run").stat().st_mode & 0o777 == 0o700
    assert [line.split()[1] for line in (ready.root / "copied").read_text().splitlines() if "alignax-run/environment" in line] == [
        "600"
    ] * 2
    calls = ready.calls(short=False)
    assert [call[2:4] for call in calls] == [["tpu-vm", "ssh"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"]]
    for shown in (errors, ready.finished.stdout, str(calls), ready.log(0)):
        assert "hf_it" not in shown and "ecret" not in shown
    assert "forwarding LIBTPU_INIT_ARGS XLA_FLAGS JAX_COMPILATION_CACHE_DIR HF_HOME HF_TOKEN MY_KEY\n" in errors


def test_no_secret_is_an_argument_of_a_process(ready):
    """Every process that the script starts, or that starts on a worker, is looked at while it is there."""
    (ready.root / "bin/gcloud").rename(ready.root / "bin/real")
    spy = ready.root / "bin/gcloud"
    spy.write_text('#!/usr/bin/env bash\ncat /proc/[0-9]*/cmdline >>"$FAKE/processes" 2>/dev/null\nexec "$FAKE/bin/real" "$@"\n')
    spy.chmod(0o755)
    ready.succeed("train", "a.py", HF_TOKEN=SECRET)
    eventually(lambda: "training" in ready.log(0).splitlines())
    seen = (ready.root / "processes").read_bytes() + subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True).stdout
    assert b"tpu-vm" in seen and b"supervise" in seen and b"hf_it" not in seen


def test_variables_of_a_start_that_failed_do_not_stay(ready):
    ready.set(failures={"tpu-vm scp": 37})
    assert ready.run("train", "a.py", HF_TOKEN="old")[0] == 37
    ready.set(failures={})
    for worker in ready.workers:
        (worker / "alignax-run/environment").write_text("export HF_TOKEN=old\n")
    ready.succeed("train", "a.py", XLA_FLAGS=None)
    eventually(lambda: "training" in ready.log(0).splitlines())
    assert "HF_TOKEN" not in environment(ready.workers[0])
    ready.succeed("stop")
    assert not list(ready.root.glob("worker*/alignax-run/environment"))


def test_no_temporary_file_stays_on_this_machine(ready):
    scratch = ready.root / "scratch"
    scratch.mkdir()
    ready.succeed("train", "a.py", HF_TOKEN="x", TMPDIR=str(scratch))
    assert not list(scratch.iterdir())
    shutil.rmtree(scratch)
