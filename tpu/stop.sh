#!/usr/bin/env bash
# Stops training on all workers: by SIGTERM, so that it saves, and after GRACE_SECONDS by SIGKILL. The TPU stays.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

on_all "$(worker stop)"
