#!/usr/bin/env bash
# Prints the end of a worker's log and follows it while training runs. WORKER is the number of the worker (default 0), or `all`.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

WORKER=${WORKER:-0}
LINES_BACK=${LINES_BACK:-100}
match WORKER '([0-9]+|all)' "use the number of a worker, or all"
match LINES_BACK '[0-9]+' "use a whole number of lines"
on_workers "$WORKER" "$(worker logs "$LINES_BACK")"
