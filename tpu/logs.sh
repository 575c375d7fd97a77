#!/usr/bin/env bash
# Prints the end of a worker's log and follows it while training runs. WORKER is the number of the worker (default 0), or `all`; SLICE is
# that of the slice (default 0), or `all`.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

SLICE=${SLICE:-0}
WORKER=${WORKER:-0}
LINES_BACK=${LINES_BACK:-100}
match SLICE "($number|all)" "use the number of a slice, or all"
match WORKER "($number|all)" "use the number of a worker, or all"
match LINES_BACK "$number" "use a whole number of lines"
if [[ $SLICE != all ]]; then
    ((SLICE < SLICES)) || fail "SLICE is '$SLICE', and SLICES is '$SLICES'; use a number below $SLICES, or set SLICES to the value that the TPU was created with"
    slices=("$SLICE")
fi

show() { # each line begins with the number of the worker, after that of its slice if there are several
    local before=""
    [[ $SLICES == 1 ]] || before=$1.
    ssh_to "$1" "$WORKER" "$(worker logs "$LINES_BACK" "$before")"
}
each show
