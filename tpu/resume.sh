#!/usr/bin/env bash
# Makes training run again, whatever happened to the TPU; takes the arguments that train.sh got, or those that run.sh got (alignax ..).
# The command continues from its workdir. While it runs, or if it has finished, this script does nothing, so it can be called every few
# minutes.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($#)) || fail "no arguments; give the arguments that tpu/train.sh got"
start=$tpu/train.sh
if [[ $1 == alignax || $1 == python ]]; then start=$tpu/run.sh; fi
check_experiment "$@"
choose_version # what is missing must be found before the old TPU is deleted
choose_tier
choose_environment

now=$(state)
[[ $DRY_RUN == 0 ]] || now=ABSENT # print the longest path: create, set up, train
while [[ $now == DELETING || $now == SUSPENDING || $now == STOPPING ]]; do
    say "TPU '$TPU_NAME' is $now; checking again in $POLL_SECONDS s"
    sleep "$POLL_SECONDS"
    now=$(state)
done

say "TPU '$TPU_NAME' is $now"
case $now in
    ABSENT) create ;;
    FAILED | PREEMPTED | SUSPENDED | TERMINATED)
        delete
        create
        ;;
    STOPPED) for slice in "${slices[@]}"; do run gcloud compute tpus tpu-vm start "$(node "$slice")" "${place[@]}"; done ;;
    READY)
        status=0
        on_all "[ -e alignax/tpu/worker.sh ] || exit 3; $(worker status)" || status=$?
        case $status in
            0) exit ;;
            3) on_all "[ ! -e alignax/tpu/worker.sh ] || { $(worker stop); }" ;; # training that still runs on other workers
            *) exit "$status" ;;
        esac
        ;;
esac
"$tpu/setup.sh"
"$start" "$@"
