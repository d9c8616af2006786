#!/usr/bin/env bash
# The first quarter of an hour on a GPU: `OUT=FOLDER benchmarks/gpu/first_run.sh 1`, read the rows,
# mend, then `… 2`. Needs no pip and no network: torch, triton, transformers and numpy must be there.
#   OUT       folder that outlives the machine: rows.jsonl, log.txt, machine.txt, cache.tar.xz
#   LIMIT_S   seconds of the call, 480 and 210 by default; SLOWER, times slower than an H200
#   FIRST     for call 2: the folder OUT of call 1, whose rows and cache it goes on from
set -euo pipefail
cd "$(dirname "$0")/../.."
call=${1:-}
if [[ $call != 1 && $call != 2 ]]; then
  echo "usage: OUT=FOLDER $0 1|2" >&2
  exit 2
fi
if [[ -z ${OUT:-} ]]; then
  echo "error: OUT is not set: rows would stay on this machine; set it to a folder that is kept" >&2
  exit 2
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT

# A copy may come without its links, and without its history.
for room in kernels engines; do
  [[ -e vila_deploy/$room/__init__.py ]] || { rm -f "vila_deploy/$room"; ln -s "../$room" "vila_deploy/$room"; }
done
if [[ -z ${VILA_DEPLOY_COMMIT:-} ]] && ! git rev-parse --short=12 HEAD >/dev/null 2>&1; then
  echo "warning: no history here and VILA_DEPLOY_COMMIT is not set: rows will name no commit" >&2
fi
# Everything is found in this folder, by processes that don't search the current one too.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/vila-deploy-triton/cache}
mkdir -p "$TRITON_CACHE_DIR"

# Kernels compiled elsewhere for this commit, or by call 1.
for cache in benchmarks/gpu/baselines/cache.tar.xz "${FIRST:-/nowhere}/cache.tar.xz"; do
  if [[ -f $cache ]]; then
    tar -xJf "$cache" -C "$TRITON_CACHE_DIR" --strip-components=1 || echo "warning: $cache is broken" >&2
  fi
done
# Call 2 knows what call 1 found wrong, and which launch mode was the fastest.
if [[ $call == 2 && -f ${FIRST:-}/rows.jsonl && ! $FIRST -ef $OUT ]]; then
  cat "$FIRST/rows.jsonl" >>"$OUT/rows.jsonl"
fi
exec "${PYTHON:-python3}" -m benchmarks.gpu --call "$call" ${SMALL:+--small} \
  ${SLOWER:+--slower "$SLOWER"} ${LIMIT_S:+--limit-s "$LIMIT_S"}
