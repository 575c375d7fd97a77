#!/usr/bin/env bash
# Runs a command on this machine, and again when it dies, as in: tpu/supervise.sh alignax train --config experiments/dpo_hh.py
# It gives up after RESTARTS restarts in a row without a newer checkpoint in the workdir that --config.workdir names; without that
# argument every restart counts. It does not run the command again after exit code 0, after 2 (bad input), after 126 and 127 (no such
# command), and after a signal of its own, which it passes on as SIGTERM. Its exit code is the command's last one.
set -euo pipefail

RESTARTS=${RESTARTS:-10}
RESTART_SECONDS=${RESTART_SECONDS:-5}
said() { printf '=== %s: %s\n' "$(date -u +%FT%TZ)" "$*"; }

(($#)) || { echo "error: no command; give one, as in: tpu/supervise.sh alignax train --config experiments/dpo_hh.py" >&2; exit 2; }
for count in RESTARTS RESTART_SECONDS; do
    [[ ${!count} =~ ^(0|[1-9][0-9]*)$ ]] || { echo "error: $count is '${!count}'; use a whole number" >&2; exit 2; }
done
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$checkout/.venv/bin:$PATH

workdir="" previous=""
for word in "$@"; do
    case $previous$word in
        --config.workdir=*) workdir=${word#--config.workdir=} ;;
        --config.workdir\ *) workdir=$word ;;
    esac
    previous=""
    if [[ $word == --config.workdir ]]; then previous="--config.workdir "; fi
done

# Prints the checkpoints of the workdir, and of the runs inside it (a laboratory's), one a line.
checkpoints() {
    if [[ $workdir == *://* ]]; then
        python - "$workdir" <<'LIST' || true # a store that does not answer is no progress
import sys
from etils import epath
found = {path for depth in range(3) for path in epath.Path(sys.argv[1]).glob("*/" * depth + "checkpoints/*")}
print(*sorted(str(path) for path in found if path.name.isdigit()), sep="\n")
LIST
    elif [[ -d $workdir ]]; then
        find -L "$workdir" -maxdepth 4 -type d -regex '.*/checkpoints/[0-9]+' 2>/dev/null | sort || true
    fi
}

signalled=0 child=0
# shellcheck disable=SC2329 # the trap calls it
end() {
    signalled=1
    if ((child)); then kill -TERM "$child" 2>/dev/null || true; fi
}
trap end TERM INT HUP

restarts=0 seen=$(checkpoints)
while :; do
    words=$(printf ' %q' "$@")
    said "${words# }"
    code=143
    if ((!signalled)); then
        "$@" &
        child=$!
        if ((signalled)); then kill -TERM "$child" || true; fi
        code=0
        wait "$child" || code=$?
        while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` early
            code=0
            wait "$child" || code=$?
        done
        child=0
    fi
    case $code in 0 | 2 | 126 | 127) break ;; esac
    ((!signalled)) || break
    now=$(checkpoints)
    if [[ $now != "$seen" ]]; then restarts=0 seen=$now; fi
    if ((restarts >= RESTARTS)); then
        said "no newer checkpoint after $restarts restarts; giving up"
        break
    fi
    seconds=$((RESTART_SECONDS << (restarts < 6 ? restarts : 6)))
    ((++restarts))
    if ((seconds > 60 && RESTART_SECONDS <= 60)); then seconds=60; fi
    said "ended with exit code $code; starting again in $seconds s (restart $restarts of $RESTARTS without a newer checkpoint)"
    sleep "$seconds" 9>&- & # 9 is the lock of tpu/worker.sh
    child=$!
    wait "$child" || true
    child=0
done
said "ended with exit code $code"
exit "$code"
