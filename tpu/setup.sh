#!/usr/bin/env bash
# Waits for the TPU, copies this checkout to all workers (files that git tracks, and new ones that it does not ignore), and installs it.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

checkout=$(dirname "$tpu")
git -C "$checkout" rev-parse --git-dir >/dev/null 2>&1 || fail "$checkout is not a git checkout; clone alignax and run it from there"
wait_ready

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run git -C "$checkout" ls-files -z --cached --others --exclude-standard >"$scratch/known"
while IFS= read -r -d '' file; do
    if [[ -e $checkout/$file ]]; then printf '%s\0' "$file"; fi # git also lists tracked files that were deleted
done <"$scratch/known" >"$scratch/files"
run tar -czf "$scratch/alignax.tar.gz" -C "$checkout" --null -T "$scratch/files"

each scp_to "$scratch/alignax.tar.gz" ""

# The package is removed first, so that no deleted module stays behind; runs/ and the environment stay.
settings=$(quote "BUCKET=$BUCKET" "MOUNT=$MOUNT" "PYTHON_VERSION=$PYTHON_VERSION")
on_all "if [ -e alignax/tpu/worker.sh ]; then bash alignax/tpu/worker.sh idle || exit; fi
rm -rf alignax/alignax && mkdir -p alignax && tar -xzf alignax.tar.gz -C alignax && cd alignax && env $settings bash tpu/worker.sh setup"
