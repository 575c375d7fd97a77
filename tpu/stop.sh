#!/usr/bin/env bash
# Stops training on all workers: SIGTERM, and SIGKILL for what is left after GRACE_SECONDS. The TPU stays.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

on_workers all "$(worker stop)"
