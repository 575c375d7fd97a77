#!/usr/bin/env bash
# Prints the end of the log and follows it while training runs: of worker 0, or as WORKER says (a number, or `all`).
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

WORKER=${WORKER:-0}
LINES_BACK=${LINES_BACK:-100}
match WORKER '([0-9]+|all)' "use the number of a worker, or all"
match LINES_BACK '[0-9]+' "use a whole number of lines"
on_workers "$WORKER" "$(worker logs "$LINES_BACK")"
