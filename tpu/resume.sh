#!/usr/bin/env bash
# Makes training run again, whatever happened to the TPU; takes the arguments that train.sh got. `alignax train` continues from its
# workdir. While training runs, or if it has finished, this script does nothing, so it can be called every few minutes.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($#)) || fail "no arguments; give the arguments that tpu/train.sh got"
check_experiment "$@"
choose_version # a missing TPU_TYPE must be found before the old TPU is deleted

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
    STOPPED) run gcloud compute tpus tpu-vm start "$TPU_NAME" "${place[@]}" ;;
    READY)
        status=0
        on_workers all "[ -e alignax/tpu/worker.sh ] || exit 3; $(worker status)" || status=$?
        case $status in
            0) exit ;;
            3) on_workers all "[ ! -e alignax/tpu/worker.sh ] || { $(worker stop); }" ;; # training that still runs on other workers
            *) exit "$status" ;;
        esac
        ;;
esac
"$tpu/setup.sh"
"$tpu/train.sh" "$@"
