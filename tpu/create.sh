#!/usr/bin/env bash
# Creates the TPU and waits until it is ready. If the waiting is interrupted, tpu/setup.sh continues it.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

create
wait_ready
