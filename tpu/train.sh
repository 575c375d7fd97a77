#!/usr/bin/env bash
# Starts `alignax train` with the given arguments on all workers and returns; training continues if the connection breaks.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($#)) || fail "no arguments; give the arguments of \`alignax train\`, as in: tpu/train.sh --config experiments/dpo_hh.py"
check_experiment "$@"

# All workers are asked before any of them starts: otherwise the others would wait for one that is busy.
on_workers all "$(worker idle)"
on_workers all "$(worker start "$@")" || {
    status=$?
    say "error: training did not start on every worker; stopping it on the others"
    on_workers all "$(worker stop)" || true
    exit "$status"
}
say "training started; see its log with tpu/logs.sh"
