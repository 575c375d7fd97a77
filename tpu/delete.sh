#!/usr/bin/env bash
# Deletes the TPU and the disks of its workers. Asks first, unless YES=1.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [[ $YES == 0 && $DRY_RUN == 0 ]]; then
    answer=""
    read -rp "Delete TPU '$TPU_NAME' in $ZONE and everything on its disks? [y/N] " answer || true
    [[ $answer == [yY] || $answer == yes ]] || {
        say "error: not confirmed, so nothing was deleted; answer y, or set YES=1"
        exit 1
    }
fi
delete
