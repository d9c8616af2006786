#!/usr/bin/env bash
# The first quarter of an hour on a GPU: `OUT=FOLDER benchmarks/gpu/first_run.sh 1`, read the rows,
# mend, then `… 2`. Needs no pip and no network: torch, triton, transformers and numpy must be there.
#   OUT       folder that outlives the machine: rows.jsonl, log.txt, machine.txt, cache.tar.xz
#   LIMIT_S   seconds of the call, 480 and 210 by default; SLOWER, times slower than an H200
#   FIRST     for call 2: the folder OUT of call 1, whose rows and cache it goes on from
#   ONLY      these stages of the call, e.g. what an interrupted one has left; PYTHON, python3 by default
set -euo pipefail
call=${1:-}
if [[ $# != 1 || ($call != 1 && $call != 2) ]]; then
  echo "usage: OUT=FOLDER $0 1|2" >&2
  exit 2
fi
if [[ -z ${OUT:-} ]]; then
  echo "error: OUT is not set: rows would stay on this machine; set it to a folder that is kept" >&2
  exit 2
fi
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: PYTHON=$PYTHON is no Python 3.11 or newer; name one in PYTHON" >&2
  exit 2
fi
# They are named from the caller's folder.
[[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
for name in OUT FIRST TRITON_CACHE_DIR VILA_DEPLOY_BASELINES; do
  [[ -z ${!name:-} || ${!name} == /* ]] || declare "$name=$PWD/${!name}"
done
export OUT TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/vila-deploy-triton/cache}
cd "$(dirname "$0")/../.."

# A copy may come without its links, and without its history.
for room in kernels engines; do
  [[ -e vila_deploy/$room/__init__.py ]] || { rm -f "vila_deploy/$room"; ln -s "../$room" "vila_deploy/$room"; }
done
if [[ -z ${VILA_DEPLOY_COMMIT:-} ]] && ! git rev-parse --short=12 HEAD >/dev/null 2>&1; then
  echo "warning: no history here and VILA_DEPLOY_COMMIT is not set: rows will name no commit" >&2
fi
# Everything is found in this folder, by processes that don't search the current one too.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
exec "$PYTHON" -m benchmarks.gpu --call "$call" ${FIRST:+--first "$FIRST"} ${ONLY:+--only "$ONLY"} \
  ${SMALL:+--small} ${SLOWER:+--slower "$SLOWER"} ${LIMIT_S:+--limit-s "$LIMIT_S"}
