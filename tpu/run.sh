#!/usr/bin/env bash
# Runs one shell command on all workers, in their home folder, as in: tpu/run.sh 'df -h /mnt/alignax'
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1)) || fail "got $# arguments; give one command in quotes, as in: tpu/run.sh 'df -h $MOUNT'"
on_workers all "$1"
