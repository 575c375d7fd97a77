#!/usr/bin/env bash
# The commands that run on a TPU worker; the other scripts call them there. Their files lie outside the checkout, in ~/alignax-run, which
# only their owner can read: log; lock, held while training runs; pid, the process of the supervisor; exit, the exit code of the last
# training; environment, the variables for the next one, until it starts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=$HOME/alignax-run
mkdir -p "$files"
chmod 700 "$files"

running() { ! flock --nonblock "$files/lock" true; }

# Exit codes: 1 for a refusal, 3 for "not running", 4 for "cannot run". Never 255: gcloud takes it for a lost connection, and runs the
# command again.
refuse_while_running() {
    if running; then
        echo "$HOSTNAME: training already runs here (process $(cat "$files/pid")); end it with tpu/stop.sh first" >&2
        exit 1
    fi
}

idle() {
    refuse_while_running
    rm -f "$files/environment" # of a start that failed
}

setup() {
    set -x # print every command
    if [[ -n ${BUCKET:-} ]]; then mount_bucket; fi
    if [[ -e /sys/kernel/mm/transparent_hugepage/enabled ]]; then # the TPU starts and stops faster with it
        echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
    fi
    python3 -m uv --version || python3 -m pip install --user --quiet uv # the Python of the TPU's image is too old for alignax
    [[ -x .venv/bin/python ]] || python3 -m uv venv --quiet --python "$PYTHON_VERSION" .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
}

mount_bucket() {
    local mounted
    mounted=$(findmnt --noheadings --output SOURCE "$MOUNT" || true)
    if [[ $mounted == "$BUCKET" ]]; then return; fi
    if [[ -n $mounted ]]; then
        echo "error: $MOUNT already holds '$mounted', not the bucket '$BUCKET'; set another MOUNT" >&2
        exit 1
    fi
    command -v gcsfuse || install_gcsfuse
    sudo mkdir -p "$MOUNT"
    sudo chown "$(id -u)" "$MOUNT"
    # A checkpoint is finished by renaming its folder, and each worker must see at once what the others wrote.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        "$BUCKET" "$MOUNT"
}

install_gcsfuse() {
    local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get -o DPkg::Lock::Timeout=600 update # a new machine may still be updating itself
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse
}

start() {
    refuse_while_running
    rm -f "$files/pid" "$files/exit"
    if [[ -e $files/environment ]]; then
        # shellcheck source=/dev/null
        source "$files/environment"
        rm -f "$files/environment"
    fi
    nohup setsid bash tpu/worker.sh supervise "$@" >>"$files/log" 2>&1 </dev/null &
    for _ in {1..100}; do
        if [[ -e $files/pid ]]; then
            echo "$HOSTNAME: training started, process $(cat "$files/pid")"
            return
        fi
        sleep 0.1
    done
    tail "$files/log" >&2
    exit 1
}

# Runs the command in a session of its own, and writes down its exit code.
supervise() {
    exec 9>"$files/lock"
    flock --nonblock 9
    trap 'echo "$?" >"$files/exit"' EXIT
    echo $$ >"$files/pid"
    # shellcheck source-path=SCRIPTDIR source=supervise.sh
    source tpu/supervise.sh "$@"
}

stop() {
    if ! running; then
        rm -f "$files/environment"
        echo "$HOSTNAME: training does not run"
        return
    fi
    local pid seconds
    pid=$(cat "$files/pid")
    kill -TERM "$pid" || true
    for ((seconds = 0; seconds < GRACE_SECONDS; seconds++)); do
        sleep 1
        if ! running; then
            echo "$HOSTNAME: training stopped"
            return
        fi
    done
    echo "$HOSTNAME: training did not stop in $GRACE_SECONDS s; killing it"
    kill -KILL -- "-$pid" # the whole session: a process that waits for a lost worker does not react to SIGTERM
}

status() {
    local code
    code=$(cat "$files/exit" 2>/dev/null || true)
    if running; then
        echo "$HOSTNAME: training runs"
    elif [[ $code == 0 ]]; then
        echo "$HOSTNAME: training has finished"
    elif [[ $code == 2 ]]; then
        echo "error: $HOSTNAME: training was refused (exit code 2; tpu/logs.sh shows why), and starting it again does not mend that;" \
            "correct it, and start it with tpu/train.sh" >&2
        exit 4
    else
        echo "$HOSTNAME: training does not run"
        exit 3
    fi
}

logs() {
    local follow=()
    if running; then follow=(-F --pid="$(cat "$files/pid")"); fi
    tail -n "$1" ${follow[@]+"${follow[@]}"} "$files/log" | sed -u "s/^/${2:-}${HOSTNAME##*-w-}: /" # a worker's host name ends in -w-NUMBER
}

"$@"
