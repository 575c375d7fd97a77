#!/usr/bin/env bash
# Runs a command on all workers. One argument is a line of shell, run in their home folder while this script waits, as in
#   tpu/run.sh 'df -h /mnt/alignax'
# alignax or python with arguments is started in ~/alignax, and started again if it dies (tpu/supervise.sh); it goes on if the
# connection breaks, tpu/logs.sh shows its log, and tpu/stop.sh ends it:
#   tpu/run.sh alignax overopt --config experiments/my_laboratory.py
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($#)) || fail "got no arguments; give one command in quotes, as in: tpu/run.sh 'df -h $MOUNT', or alignax with its arguments"
if (($# == 1)); then
    on_all "$1"
    exit
fi
[[ $1 == alignax || $1 == python ]] || fail "got $# arguments, the first of them '$1'; give one command in quotes, as in: tpu/run.sh 'df -h $MOUNT'"
check_experiment "$@"
choose_environment

# All workers are asked before any of them starts: otherwise the others would wait for one that is busy.
on_all "$(worker idle)"
send_environment
on_all "$(worker start "$@")" || {
    status=$?
    say "error: '$1 $2' did not start on every worker; stopping it on the others"
    on_all "$(worker stop)" || true
    exit "$status"
}
say "'$1 $2' started; see its log with tpu/logs.sh"
