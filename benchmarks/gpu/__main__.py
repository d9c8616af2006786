"""`python -m benchmarks.gpu`: check, then time; one JSON line a figure, one process a stage."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu.plan import CALLS, LIMITS_S, Plan

# Seconds of a run that is no planned call.
LIMIT_S = 560.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--call", choices=sorted(CALLS), help="a call that first_run.sh makes")
    parser.add_argument("--only", help="these stages, e.g. steps,tinygemm")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the GPU")
    parser.add_argument(
        "--out", type=Path, help="rows are appended; rows.jsonl in the folder OUT by default"
    )
    parser.add_argument("--limit-s", type=float, help="of the whole run")
    parser.add_argument(
        "--slower", type=float, default=1.0, help="than an H200: stages have more time"
    )
    arguments = parser.parse_args()
    folder = os.environ.get("OUT")
    if arguments.out is None and not folder:
        parser.error("give --out FILE, or set OUT to a folder that outlives the machine")
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    out = (arguments.out or Path(folder or ".", "rows.jsonl")).resolve()
    limit_s = arguments.limit_s or LIMITS_S.get(arguments.call, LIMIT_S)
    try:
        plan = Plan.of(
            arguments.call, arguments.only and arguments.only.split(","), limit_s, arguments.slower
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.rehearse:
        from benchmarks.gpu.rehearse import rehearse

        return rehearse(plan, out)
    from benchmarks.gpu.run_stages import run_stages

    return run_stages(plan, out, small=arguments.small)


if __name__ == "__main__":
    sys.exit(main())
