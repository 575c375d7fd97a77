# shellcheck shell=bash
# Sourced by every script here: the settings, `run`, and the gcloud commands that several of them share.
set -euo pipefail
exec 3>&2 # `run` prints here, even where the errors of its command are redirected

# shellcheck disable=SC2034 # the other scripts read it
tpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DRY_RUN=${DRY_RUN:-0} # 1: print every command, run none
QUEUED=${QUEUED:-0}   # 1: ask for the TPU as a queued resource
SLICES=${SLICES:-1}   # slices of TPU_TYPE, which train together
SPOT=${SPOT:-0}       # 1: cheaper, and may be preempted
RESERVED=${RESERVED:-0}      # 1: from a reservation of the project
RESERVATION=${RESERVATION:-} # from the reservation of this name
FLEX_START=${FLEX_START:-}   # flex-start, for this duration
YES=${YES:-0}         # 1: delete.sh does not ask
FORWARD=${FORWARD:-}  # names of further variables that a command gets on the workers
RESTARTS=${RESTARTS:-10}              # of a command that dies, without a newer checkpoint in between
RESTART_SECONDS=${RESTART_SECONDS:-5} # before the first of them
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

for flag in DRY_RUN QUEUED SPOT RESERVED YES; do match "$flag" '[01]' "use 0 or 1"; done
number='(0|[1-9][0-9]*)' # bash would take 010 for 8
for count in POLL_SECONDS GRACE_SECONDS RESTART_SECONDS; do match "$count" "$number" "use a whole number of seconds"; done
match SLICES '[1-9][0-9]{0,3}' "use a whole number of slices"
match RESTARTS "$number" "use a whole number of restarts"
need TPU_NAME "choose a name, as in: export TPU_NAME=my-tpu"
need ZONE "name the zone, as in: export ZONE=us-central1-a"
need PROJECT "name the Google Cloud project, as in: export PROJECT=my-project"
match TPU_NAME '[a-z]([-a-z0-9]*[a-z0-9])?' "use lower-case letters, digits and hyphens, beginning with a letter"
BUCKET=${BUCKET#gs://}
[[ -z $BUCKET ]] || match BUCKET '[a-z0-9][-_.a-z0-9]+' "use the name of a Cloud Storage bucket, without a path in it"
match MOUNT '/.+' "use an absolute path, the same on all workers"
[[ $DRY_RUN == 1 ]] || command -v gcloud >/dev/null || fail "gcloud is not on the PATH; install the Google Cloud CLI"
place=(--zone="$ZONE" --project="$PROJECT")
[[ $SLICES == 1 || $QUEUED == 1 ]] || fail "SLICES is '$SLICES', and several slices are had as a queued resource only; set QUEUED=1"
slices=() # numbers of the slices that a command is for; logs.sh chooses among them
for ((slice = 0; slice < SLICES; slice++)); do slices+=("$slice"); done

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
        tpu7x* | v7x* | [Ii]ronwood*) fail "TPU_TYPE is '$TPU_TYPE'; Ironwood is had through GKE only: see tpu/gke/jobset.yaml and tpu/README.md" ;;
        v5e-*) fail "TPU_TYPE is '$TPU_TYPE'; Cloud TPU calls it v5litepod-${TPU_TYPE#v5e-}" ;;
        *) fail "RUNTIME_VERSION is not set, and there is no default for TPU_TYPE '$TPU_TYPE';" \
            "set it to one of the versions that this command lists: gcloud compute tpus tpu-vm versions list --zone=$ZONE" ;;
    esac
}

# Sets `tier`, the flags of the way in which the TPU is paid for, and `track`, the variant of gcloud that knows these flags.
choose_tier() {
    tier=() track=()
    if [[ $SPOT == 1 ]]; then tier+=(--spot); fi
    if [[ $RESERVED == 1 ]]; then tier+=(--reserved); fi
    if [[ -n $RESERVATION ]]; then tier+=(--reservation="$RESERVATION") track=(alpha); fi
    if [[ -n $FLEX_START ]]; then tier+=(--provisioning-model=flex-start) track=(alpha); fi
    ((${#tier[@]} < 2)) || fail "several of SPOT, RESERVED, RESERVATION and FLEX_START are set; set one of them, or none for on demand"
    [[ ${#track[@]} == 0 || $QUEUED == 1 ]] || fail "RESERVATION and FLEX_START are for queued resources only; set QUEUED=1"
    [[ -z $RESERVATION ]] || match RESERVATION '[A-Za-z0-9/_-]+' "use the name of a reservation, or projects/PROJECT/locations/ZONE/reservations/NAME"
    [[ -z $FLEX_START ]] || match FLEX_START '([0-9]+[dhms])+' "use the time for which the TPU is wanted, at most 7 days, as in 12h or 1d6h"
    [[ -z $FLEX_START ]] || tier+=(--max-run-duration="$FLEX_START")
}

create() {
    choose_version
    choose_tier
    local command extra
    if [[ $QUEUED == 1 ]]; then
        command=(queued-resources create "$TPU_NAME")
        if [[ $SLICES == 1 ]]; then command+=(--node-id="$TPU_NAME"); else command+=(--node-count="$SLICES" --node-prefix="$TPU_NAME"); fi
        command+=(--runtime-version="$version")
    else
        command=(tpu-vm create "$TPU_NAME" --version="$version")
    fi
    command+=(--accelerator-type="$TPU_TYPE" "${place[@]}" ${tier[@]+"${tier[@]}"})
    read -ra extra <<<"$CREATE_FLAGS"
    run gcloud ${track[@]+"${track[@]}"} compute tpus "${command[@]}" ${extra[@]+"${extra[@]}"}
}

delete() {
    if [[ $QUEUED == 1 ]]; then # and all its slices
        run gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" --force --quiet
    else
        run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${place[@]}" --quiet
    fi
}

# Prints the name that gcloud gives to the TPU of the slice with this number.
node() { printf '%s' "$TPU_NAME"; [[ $SLICES == 1 ]] || printf -- '-%s' "$1"; }

# describe KIND NAME FIELD: prints that field of the TPU or of the queued resource; ABSENT if there is no such TPU or resource.
describe() {
    local errors status=0
    errors=$(mktemp)
    run gcloud compute tpus "$1" describe "$2" "${place[@]}" --format="value($3)" 2>"$errors" || status=$?
    if [[ $status != 0 ]] && grep -q NOT_FOUND "$errors"; then
        status=0
        echo ABSENT
    else
        cat "$errors" >&2
    fi
    rm -f "$errors"
    return "$status"
}

# Prints the state of the TPU in Cloud TPU's words. The queued resource is asked first, since it exists before its TPU does. Of several
# slices the state is that of the first one that is lost, else of the last one that is not ready.
state() {
    local queued now worst=READY slice
    if [[ $QUEUED == 1 ]]; then
        queued=$(describe queued-resources "$TPU_NAME" state.state) || return
        if [[ $queued != ACTIVE && $DRY_RUN == 0 ]]; then
            echo "$queued"
            return
        fi
    fi
    for slice in "${slices[@]}"; do
        now=$(describe tpu-vm "$(node "$slice")" state) || return
        # Not taken for a lost TPU: resume.sh would delete the queued resource, with all slices that it has under other names.
        [[ $QUEUED == 0 || $now != ABSENT ]] || fail "queued resource '$TPU_NAME' is ACTIVE, but has no TPU '$(node "$slice")';" \
            "set SLICES to the value that it was created with, or remove it with tpu/delete.sh"
        case $now in
            READY) ;;
            ABSENT | FAILED | PREEMPTED | SUSPENDED | TERMINATED)
                echo "$now"
                return
                ;;
            *) worst=$now ;;
        esac
    done
    echo "$worst"
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

# each FUNCTION WORDS..: calls the function with the number of a slice and these words, for all chosen slices at once. Its exit code is
# that of a slice that failed; 3, which is "not running", only if no slice failed otherwise.
each() {
    local slice job jobs=() code status=0
    if ((${#slices[@]} == 1)); then
        "$1" "${slices[0]}" "${@:2}"
        return
    fi
    set -m # a process group for each, so that Ctrl-C can end all that belongs to it
    for slice in "${slices[@]}"; do
        "$1" "$slice" "${@:2}" </dev/null &
        jobs+=($!)
    done
    set +m
    trap 'for job in "${jobs[@]}"; do kill -- "-$job" 2>/dev/null || true; done; exit 130' INT TERM HUP
    for job in "${jobs[@]}"; do
        code=0
        wait "$job" || code=$?
        if ((code != 0 && (status == 0 || status == 3))); then status=$code; fi
    done
    trap - INT TERM HUP
    return "$status"
}

ssh_to() { # the number of a slice, the number of a worker or `all`, and a line of shell
    local extra
    read -ra extra <<<"$SSH_FLAGS"
    run gcloud compute tpus tpu-vm ssh "$(node "$1")" "${place[@]}" ${extra[@]+"${extra[@]}"} --worker="$2" --command="$3"
}

scp_to() { # the number of a slice, a file, and its place on all workers
    local extra
    read -ra extra <<<"$SSH_FLAGS"
    run gcloud compute tpus tpu-vm scp "$2" "$(node "$1"):$3" "${place[@]}" ${extra[@]+"${extra[@]}"} --worker=all
}

# Runs a line of shell on all workers of all slices.
on_all() { each ssh_to all "$1"; }

# Prints the line of shell that runs tpu/worker.sh in a worker's checkout.
worker() {
    printf 'cd alignax && %s bash tpu/worker.sh %s' \
        "GRACE_SECONDS=$GRACE_SECONDS RESTARTS=$RESTARTS RESTART_SECONDS=$RESTART_SECONDS" "$(quote "$@")"
}

# Sets `forwarded`, the names of the variables that a command on the workers gets: these, where they are set, and those that FORWARD names.
choose_environment() {
    local name extra
    forwarded=()
    for name in LIBTPU_INIT_ARGS XLA_FLAGS JAX_COMPILATION_CACHE_DIR HF_HOME HF_TOKEN; do
        [[ -z ${!name+set} ]] || forwarded+=("$name")
    done
    read -ra extra <<<"$FORWARD"
    for name in ${extra[@]+"${extra[@]}"}; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "FORWARD names '$name'; use names of variables, with spaces between them"
        [[ -n ${!name+set} ]] || fail "FORWARD names $name, which is not set; set it, as in: export $name=VALUE"
        [[ " ${forwarded[*]-} " == *" $name "* ]] || forwarded+=("$name")
    done
}

# Copies these variables to all workers, in a file that only its owner can read, since one of them may be a secret. Their values appear
# neither in what is printed nor in the arguments of a process. tpu/worker.sh deletes the file when it starts the command.
send_environment() {
    local name
    ((${#forwarded[@]})) || return 0
    say "forwarding ${forwarded[*]}"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    touch "$scratch/environment"
    chmod 600 "$scratch/environment"
    for name in "${forwarded[@]}"; do printf 'export %s=%s\n' "$name" "$(quote "${!name}")"; done >"$scratch/environment"
    each scp_to "$scratch/environment" alignax-run/environment
}
