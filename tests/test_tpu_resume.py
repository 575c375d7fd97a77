"""tpu/resume.sh against a fake gcloud, for one slice and for two."""

import os
import signal
import sys

import pytest
from fake_cloud import Cloud, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers' half needs Linux: flock and setsid")

ARGUMENTS = ["experiments/a b.py", '--x=it\'s "$HOME" `id` \\', "--name=*", "", "two\nlines", "--y=ü&;|#~"]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.kill()


@pytest.fixture
def ready(cloud):
    """A cloud whose workers are set up, its record of commands empty."""
    cloud.succeed("setup")
    cloud.calls()
    return cloud


@pytest.fixture
def pair(tmp_path):
    """The same, of two slices with two workers each."""
    cloud = Cloud(tmp_path, slices=2)
    cloud.succeed("setup")
    cloud.calls()
    yield cloud
    cloud.kill()


def ended(cloud):
    eventually(lambda: not cloud.running(0) and not cloud.running(1))


def kinds(calls):
    return [call for call in calls if call != "tpu-vm describe" and call != "queued-resources describe"]


SET_UP_AND_TRAIN = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"]  # copy; set up, is it idle, start


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_resume_replaces_a_preempted_tpu(cloud, state):
    cloud.set(states={"tpu-vm": [state, "CREATING", "READY"]})
    cloud.succeed("resume", *ARGUMENTS, SPOT="1")
    assert kinds(cloud.calls()) == ["tpu-vm delete", "tpu-vm create", *SET_UP_AND_TRAIN]
    eventually(lambda: "training" in cloud.log(1).splitlines())
    assert (cloud.workers[1] / "arguments").read_text().split("\0")[:-1] == ["train", *ARGUMENTS]


def test_resume_replaces_a_suspended_queued_resource(cloud):
    cloud.set(states={"queued-resources": ["SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"], "tpu-vm": ["READY"]})
    cloud.succeed("resume", "a.py", QUEUED="1")
    assert kinds(cloud.calls()) == ["queued-resources delete", "queued-resources create", *SET_UP_AND_TRAIN]


def test_resume_sees_a_preempted_tpu_behind_an_active_queued_resource(cloud):
    cloud.set(states={"queued-resources": ["ACTIVE"], "tpu-vm": ["PREEMPTED", "READY"]})
    cloud.succeed("resume", "a.py", QUEUED="1")
    assert kinds(cloud.calls()) == ["queued-resources delete", "queued-resources create", *SET_UP_AND_TRAIN]


@pytest.mark.parametrize(
    ("states", "first"),
    [
        (["ABSENT", "READY"], ["tpu-vm create"]),
        (["DELETING", "ABSENT", "READY"], ["tpu-vm create"]),
        (["STOPPED", "STARTING", "READY"], ["tpu-vm start"]),
        (["CREATING", "READY"], []),
        (["READY"], ["tpu-vm ssh", "tpu-vm ssh"]),  # was set up never: does it run, stop it
    ],
)
def test_resume_from_other_states(cloud, states, first):
    cloud.set(states={"tpu-vm": states})
    cloud.succeed("resume", "a.py")
    assert kinds(cloud.calls()) == first + SET_UP_AND_TRAIN


def test_resume_leaves_a_run_alone_that_runs_or_has_finished(ready):
    ready.succeed("train", "a.py")
    ready.calls()
    ready.succeed("resume", "a.py")
    assert ready.calls() == ["tpu-vm describe", "tpu-vm ssh"] and ready.finished.stdout.count("training runs") == 2
    ready.succeed("stop")
    ready.succeed("train", "finish")
    ended(ready)
    ready.calls()
    ready.succeed("resume", "a.py")
    assert ready.calls() == ["tpu-vm describe", "tpu-vm ssh"] and ready.finished.stdout.count("training has finished") == 2


def test_resume_goes_on_after_a_stop(ready):
    ready.succeed("train", "a.py")
    ready.succeed("stop")
    ready.succeed("resume", "a.py")
    assert ready.running(0) and ready.running(1)


def test_resume_restarts_all_workers_when_one_has_crashed(ready):
    ready.succeed("train", "crash")
    ended(ready)
    assert [(worker / "alignax-run/exit").read_text() for worker in ready.workers] == ["5\n"] * 2
    ready.succeed("train", "a.py")
    old = ready.pid(1)
    os.killpg(ready.pid(0), signal.SIGKILL)
    eventually(lambda: not ready.running(0))
    ready.calls()
    ready.succeed("resume", "a.py", GRACE_SECONDS="5")
    assert kinds(ready.calls()) == ["tpu-vm ssh", "tpu-vm ssh", *SET_UP_AND_TRAIN]
    assert ready.pid(1) != old and ready.log(1).count("saved on SIGTERM") == 1


def test_resume_does_not_start_again_what_was_refused(ready):
    ready.succeed("train", "refuse")
    eventually(lambda: not ready.running(0) and not ready.running(1))
    ready.calls()
    code, errors = ready.run("resume", "refuse")
    assert code == 4 and ready.calls() == ["tpu-vm describe", "tpu-vm ssh"]
    assert "training was refused (exit code 2; tpu/logs.sh shows why), and starting it again does not mend that" in errors


# --- several slices


SET_UP_AND_TRAIN_TWO = ["tpu-vm scp"] * 2 + ["tpu-vm ssh"] * 6


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_resume_replaces_all_slices_when_one_is_lost(tmp_path, state):
    cloud = Cloud(tmp_path, slices=2)
    states = {"queued-resources": ["ACTIVE"], "tpu-vm my-tpu-0": ["CREATING", "READY"], "tpu-vm my-tpu-1": [state, "READY"]}
    cloud.set(states=states)
    cloud.succeed("resume", "a.py", SPOT="1")
    assert kinds(cloud.calls()) == ["queued-resources delete", "queued-resources create", *SET_UP_AND_TRAIN_TWO]
    cloud.kill()


def test_resume_restarts_all_slices_when_a_worker_of_one_has_died(pair):
    pair.succeed("train", "a.py")
    old = [pair.pid(n) for n in range(4)]
    os.killpg(old[3], signal.SIGKILL)
    eventually(lambda: not pair.running(3))
    pair.calls()
    pair.succeed("resume", "a.py", GRACE_SECONDS="5")
    assert kinds(pair.calls()) == ["tpu-vm ssh"] * 4 + SET_UP_AND_TRAIN_TWO
    assert all(pair.running(n) and pair.pid(n) != old[n] for n in range(4))
    pair.calls()
    pair.succeed("resume", "a.py")
    assert kinds(pair.calls()) == ["tpu-vm ssh"] * 2 and pair.finished.stdout.count("training runs") == 4


def test_a_failure_is_told_rather_than_that_nothing_runs(pair):
    (pair.workers[0] / "alignax-run").mkdir(exist_ok=True)
    pair.set(failures={"tpu-vm ssh my-tpu-1": 37})  # while slice 0 says: not running, 3
    code, _ = pair.run("resume", "a.py")
    assert code == 37 and kinds(pair.calls()) == ["tpu-vm ssh"] * 2


@pytest.mark.parametrize(("slices", "missing"), [("1", "my-tpu"), ("3", "my-tpu-2")])
def test_another_number_of_slices_deletes_nothing(pair, slices, missing):
    code, errors = pair.run("resume", "a.py", SLICES=slices)
    assert code == 2 and not kinds(pair.calls())
    told = f"error: queued resource 'my-tpu' is ACTIVE, but has no TPU '{missing}'; set SLICES to the value that it was created with"
    assert told in errors
