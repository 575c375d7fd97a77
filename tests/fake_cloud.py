"""A fake gcloud on the PATH; the TPU of each slice is two directories on this machine that stand for its two workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TPU = Path(__file__).parents[1] / "tpu"
SETTINGS = dict(
    TPU_NAME="my-tpu", ZONE="us-central1-a", PROJECT="a-project", TPU_TYPE="v5litepod-16", POLL_SECONDS="0", RESTART_SECONDS="0"
)

# Records its arguments. `describe` plays the states in states.json, the last for ever, of one TPU ("tpu-vm my-tpu-1") or of any; ssh and
# scp act on the two workers of the TPU that they name.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
root, words = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with open(root / "calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
words = [word for word in words if word != "alpha"]
kind, verb, name = words[2:5]
for start, code in json.loads((root / "failures.json").read_text()).items():
    if " ".join(words).startswith("compute tpus " + start):
        print(f"ERROR: (gcloud.{kind}.{verb}) told to fail", file=sys.stderr)
        sys.exit(code)
names = json.loads((root / "names.json").read_text())  # of the TPUs
if verb == "describe":
    states = json.loads((root / "states.json").read_text())
    key = f"{kind} {name}" if f"{kind} {name}" in states else kind
    state, states[key] = states[key][0], states[key][1:] or states[key]
    (root / "states.json").write_text(json.dumps(states))
    if state == "ABSENT" or kind == "tpu-vm" and name not in names:
        print(f"ERROR: (gcloud.{kind}.describe) NOT_FOUND: Resource '{name}' was not found.", file=sys.stderr)
        sys.exit(1)
    print("WARNING: a word of advice", file=sys.stderr)
    print(state)
options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
chosen = [n for n in range(2) if options.get("worker") in ("all", str(n))]
if verb == "scp":
    name, place = words[5].split(":")
    for n in chosen:
        copied = pathlib.Path(shutil.copy(words[4], root / f"worker{2 * names.index(name) + n}" / place))
        with open(root / "copied", "a") as file:
            file.write(f"{copied.relative_to(root)} {copied.stat().st_mode & 0o777:o}\\n")
if verb == "ssh":  # as gcloud does it: all at once, the code of the first that failed
    running = []
    for n in chosen:
        home = root / f"worker{2 * names.index(name) + n}"
        environment = {key: os.environ[key] for key in ("FAKE", "PATH")} | {"HOME": str(home), "HOSTNAME": f"t1v-n-0-w-{n}"}
        running.append(subprocess.Popen(["bash", "-c", options["command"]], cwd=home, env=environment))
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))
"""

# The python3 of a worker: `-m uv venv` leaves a fake `alignax`, the other calls are only recorded.
PYTHON3 = """
echo "python3 $*" >>"$HOME/installed"
if [[ $3 == venv ]]; then
    mkdir -p .venv/bin
    cp "$FAKE/bin/alignax" .venv/bin/alignax
fi
"""

# Training: writes its arguments and environment, then does what the last argument says, or works until SIGTERM.
ALIGNAX = """
printf '%s\\0' "$@" >"$HOME/arguments"
env -0 >"$HOME/environment"
case "${@: -1}" in
    finish) exit 0 ;;
    refuse) exit 2 ;;
    crash) exit 5 ;;
    deaf) trap 'echo "heard SIGTERM, carry on"' TERM ;;
    *) trap 'echo "saved on SIGTERM"; exit 143' TERM ;;
esac
echo "training"
while :; do sleep 0.05; done
"""

OTHERS = {
    "gcsfuse": 'echo "gcsfuse $*" >>"$HOME/installed"\n',
    "sudo": 'echo "sudo $*" >>"$HOME/installed"\n[[ $1 != tee ]] || cat >/dev/null\n',
    "findmnt": 'cat "$FAKE/mounted" 2>/dev/null\n',
}


class Cloud:
    """A project with a copy of tpu/, a fake gcloud, and what is on the two workers of each slice."""

    def __init__(self, root, slices=1):
        self.root, self.project = root, root / "checkout"
        self.workers = [root / f"worker{n}" for n in range(2 * slices)]  # those of slice 1 are 2 and 3
        (root / "bin").mkdir()
        for name, text in {"gcloud": GCLOUD, "python3": PYTHON3, "alignax": ALIGNAX, **OTHERS}.items():
            file = root / "bin" / name
            file.write_text(f"#!{sys.executable}\n{text}" if name == "gcloud" else f"#!/usr/bin/env bash\n{text}")
            file.chmod(0o755)
        for worker in self.workers:
            worker.mkdir()
        self.set(states={"tpu-vm": ["READY"], "queued-resources": ["ACTIVE"]}, failures={})
        self.set(names=["my-tpu"] if slices == 1 else [f"my-tpu-{n}" for n in range(slices)])
        self.settings = SETTINGS if slices == 1 else SETTINGS | {"QUEUED": "1", "SLICES": str(slices)}
        shutil.copytree(TPU, self.project / "tpu")
        (self.project / "alignax").mkdir()
        for name in ("alignax/kept.py", "alignax/deleted.py", "ignored.txt", "a file's name"):
            (self.project / name).write_text(name)
        (self.project / ".gitignore").write_text("ignored.txt\n")
        for command in (["init", "-q"], ["add", "alignax", "tpu"]):
            subprocess.run(["git", *command], cwd=self.project, check=True)
        (self.project / "alignax/deleted.py").unlink()

    def set(self, **values):
        for name, value in values.items():
            (self.root / f"{name}.json").write_text(json.dumps(value))

    def run(self, script, *arguments, stdin="", **settings):
        """The exit code and the errors of a script; settings that are None are unset."""
        environment = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
        environment |= {"FAKE": str(self.root), "PATH": f"{self.root}/bin:{os.environ['PATH']}"} | self.settings | settings
        self.finished = subprocess.run(
            [self.project / "tpu" / f"{script}.sh", *arguments],
            env={name: value for name, value in environment.items() if value is not None},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return self.finished.returncode, self.finished.stderr

    def succeed(self, script, *arguments, **settings):
        code, errors = self.run(script, *arguments, **settings)
        assert code == 0, errors
        return errors

    def calls(self, short=True):
        """The gcloud commands so far, and forgets them; short: without the common words."""
        file = self.root / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        return [" ".join([word for word in call if word != "alpha"][2:4]) for call in calls] if short else calls

    def running(self, worker):
        lock = self.workers[worker] / "alignax-run/lock"
        return lock.exists() and subprocess.run(["flock", "--nonblock", lock, "true"]).returncode != 0

    def kill(self):
        """Ends what runs on the workers."""
        for n in range(len(self.workers)):
            if self.running(n):
                os.killpg(self.pid(n), signal.SIGKILL)

    def log(self, worker):
        return (self.workers[worker] / "alignax-run/log").read_text()

    def pid(self, worker):
        return int((self.workers[worker] / "alignax-run/pid").read_text())


def eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
