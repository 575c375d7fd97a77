#!/usr/bin/env bash
# Starts `alignax train` with the given arguments on all workers and returns; losing the connection does not stop it.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($#)) || fail "no arguments; give those of \`alignax train\`, as in: tpu/train.sh --config experiments/dpo_hh.py"
check_experiment "$@"

# Asked of all before any starts: one worker that is busy must not leave the others waiting for it.
on_workers all "$(worker idle)"
on_workers all "$(worker start "$@")" || {
    status=$?
    say "error: training did not start on every worker; stopping it on the others"
    on_workers all "$(worker stop)" || true
    exit "$status"
}
say "started; follow it with tpu/logs.sh"
