#!/usr/bin/env bash
# Starts `alignax train` with the given arguments on all workers and returns; training continues if the connection breaks.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($#)) || fail "no arguments; give the arguments of \`alignax train\`, as in: tpu/train.sh --config experiments/dpo_hh.py"
exec "$tpu/run.sh" alignax train "$@"
