#!/usr/bin/env bash
# Creates the TPU and waits until it is ready. Waiting may be interrupted: tpu/setup.sh goes on with it.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

create
wait_ready
