# shellcheck shell=bash
# Sourced by every script here: the settings, `run`, and the gcloud commands that several of them share.
set -euo pipefail
exec 3>&2 # `run` prints here, even where the errors of its command are redirected

# shellcheck disable=SC2034 # the other scripts read it
tpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DRY_RUN=${DRY_RUN:-0} # 1: print every command, run none
QUEUED=${QUEUED:-0}   # 1: ask for the TPU as a queued resource
SPOT=${SPOT:-0}       # 1: cheaper, and may be preempted
YES=${YES:-0}         # 1: delete.sh does not ask
BUCKET=${BUCKET:-}    # a Cloud Storage bucket that setup.sh mounts at MOUNT
MOUNT=${MOUNT:-/mnt/alignax}
PYTHON_VERSION=${PYTHON_VERSION:-3.11}
POLL_SECONDS=${POLL_SECONDS:-30}    # between two checks of the TPU's state
GRACE_SECONDS=${GRACE_SECONDS:-120} # between SIGTERM and SIGKILL when training is stopped
CREATE_FLAGS=${CREATE_FLAGS:-} # further flags for `gcloud ... create`, split at spaces
SSH_FLAGS=${SSH_FLAGS:-}       # further flags for `gcloud ... ssh` and `scp`, split at spaces

say() { printf '%s\n' "$*" >&2; }

# Ends the script with code 2: for bad input, or a machine that lacks something. A command that fails ends it with its own exit code.
fail() {
    say "error: $*"
    exit 2
}

# The words with quotes, so that a shell reads the same words again: here to print them, on a worker to run them.
quote() {
    local word mark="'" escaped="'\\''" words=""
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//$mark/$escaped}'"
        words+="${words:+ }$word"
    done
    printf '%s' "$words"
}

# Prints a command, and runs it unless DRY_RUN=1.
run() {
    printf '+ %s\n' "$(quote "$@")" >&3
    if [[ $DRY_RUN == 0 ]]; then "$@"; fi
}

need() { [[ -n ${!1:-} ]] || fail "$1 is not set; $2"; }
match() { [[ ${!1} =~ ^$2$ ]] || fail "$1 is '${!1}'; $3"; }

for flag in DRY_RUN QUEUED SPOT YES; do match "$flag" '[01]' "use 0 or 1"; done
for count in POLL_SECONDS GRACE_SECONDS; do match "$count" '[0-9]+' "use a whole number of seconds"; done
need TPU_NAME "choose a name, as in: export TPU_NAME=my-tpu"
need ZONE "name the zone, as in: export ZONE=us-central1-a"
need PROJECT "name the Google Cloud project, as in: export PROJECT=my-project"
match TPU_NAME '[a-z]([-a-z0-9]*[a-z0-9])?' "use lower-case letters, digits and hyphens, beginning with a letter"
BUCKET=${BUCKET#gs://}
[[ -z $BUCKET ]] || match BUCKET '[a-z0-9][-_.a-z0-9]+' "use the name of a Cloud Storage bucket, without a path in it"
match MOUNT '/.+' "use an absolute path, the same on all workers"
[[ $DRY_RUN == 1 ]] || command -v gcloud >/dev/null || fail "gcloud is not on the PATH; install the Google Cloud CLI"
place=(--zone="$ZONE" --project="$PROJECT")

# Refuses arguments of `alignax train` with an experiment file that setup.sh would have to copy from this checkout, but that is not in it.
# Absolute paths, and files that git ignores (in a workdir, for example), are files of the workers, and are not checked.
check_experiment() {
    local file checkout
    checkout=$(dirname "$tpu")
    while (($#)); do
        case $1 in
            --config=*) file=${1#--config=} ;;
            --config) file=${2:-} ;;
            *) file="" ;;
        esac
        shift
        [[ -n $file && $file != /* && ! -f $checkout/$file ]] || continue
        git -C "$checkout" check-ignore --quiet -- "$file" 2>/dev/null ||
            fail "experiment file '$file' does not exist in $checkout, and the workers get a copy of that folder; correct the path"
    done
}

# Sets `version`, the software of the TPU VM, from RUNTIME_VERSION or the type of the TPU.
choose_version() {
    need TPU_TYPE "name the accelerator, as in: export TPU_TYPE=v5litepod-16"
    version=${RUNTIME_VERSION:-}
    [[ -z $version ]] || return 0
    case $TPU_TYPE in
        v2-* | v3-* | v4-*) version="tpu-ubuntu2204-base" ;;
        v5litepod-*) version="v2-alpha-tpuv5-lite" ;;
        v5p-*) version="v2-alpha-tpuv5" ;;
        v6e-*) version="v2-alpha-tpuv6e" ;;
        v5e-*) fail "TPU_TYPE is '$TPU_TYPE'; Cloud TPU calls it v5litepod-${TPU_TYPE#v5e-}" ;;
        *) fail "RUNTIME_VERSION is not set, and there is no default for TPU_TYPE '$TPU_TYPE';" \
            "set it to one of the versions that this command lists: gcloud compute tpus tpu-vm versions list --zone=$ZONE" ;;
    esac
}

create() {
    choose_version
    local command extra
    if [[ $QUEUED == 1 ]]; then
        command=(queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --runtime-version="$version")
    else
        command=(tpu-vm create "$TPU_NAME" --version="$version")
    fi
    command+=(--accelerator-type="$TPU_TYPE" "${place[@]}")
    if [[ $SPOT == 1 ]]; then command+=(--spot); fi
    read -ra extra <<<"$CREATE_FLAGS"
    run gcloud compute tpus "${command[@]}" ${extra[@]+"${extra[@]}"}
}

delete() {
    if [[ $QUEUED == 1 ]]; then
        run gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" --force --quiet
    else
        run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${place[@]}" --quiet
    fi
}

# describe KIND FIELD: prints that field of the TPU or of its queued resource; ABSENT if there is no such TPU or resource.
describe() {
    local errors status=0
    errors=$(mktemp)
    run gcloud compute tpus "$1" describe "$TPU_NAME" "${place[@]}" --format="value($2)" 2>"$errors" || status=$?
    if [[ $status != 0 ]] && grep -q NOT_FOUND "$errors"; then
        status=0
        echo ABSENT
    else
        cat "$errors" >&2
    fi
    rm -f "$errors"
    return "$status"
}

# Prints the state of the TPU in Cloud TPU's words. The queued resource is asked first, since it exists before its TPU does.
state() {
    local queued
    if [[ $QUEUED == 1 ]]; then
        queued=$(describe queued-resources state.state) || return
        if [[ $queued != ACTIVE && $DRY_RUN == 0 ]]; then
            echo "$queued"
            return
        fi
    fi
    describe tpu-vm state
}

wait_ready() {
    local now
    while now=$(state) || exit; do
        [[ $DRY_RUN == 0 ]] || return 0
        case $now in
            READY) return ;;
            ABSENT) fail "there is no TPU '$TPU_NAME' in $ZONE; create it with tpu/create.sh, or set QUEUED to the value that it was created with" ;;
            DELETING | FAILED | HIDDEN | HIDING | PREEMPTED | STOPPED | STOPPING | SUSPENDED | SUSPENDING | TERMINATED)
                say "error: TPU '$TPU_NAME' is $now; tpu/resume.sh replaces it, tpu/delete.sh removes it"
                exit 1
                ;;
        esac
        say "TPU '$TPU_NAME' is $now; checking again in $POLL_SECONDS s"
        sleep "$POLL_SECONDS"
    done
}

# on_workers WHICH COMMAND: runs COMMAND, a line of shell, on the worker with the number WHICH, or on `all`.
on_workers() {
    local extra
    read -ra extra <<<"$SSH_FLAGS"
    run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" ${extra[@]+"${extra[@]}"} --worker="$1" --command="$2"
}

# Prints the line of shell that runs tpu/worker.sh in a worker's checkout.
worker() { printf 'cd alignax && GRACE_SECONDS=%s bash tpu/worker.sh %s' "$GRACE_SECONDS" "$(quote "$@")"; }
