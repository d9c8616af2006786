"""`python -m benchmarks.gpu`: check, then time; one JSON line a figure, one process a stage."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu import preflight
from benchmarks.gpu.plan import CALLS, LIMITS_S, Plan
from vila_deploy.utils.errors import VilaDeployError

# Seconds of a run that is no planned call.
LIMIT_S = 560.0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise VilaDeployError(message)


def main() -> int:
    try:
        return _main(_arguments())
    except VilaDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    folder = arguments.out.parent if arguments.out else Path(os.environ.get("OUT") or ".")
    out = (arguments.out or folder / preflight.ROWS).resolve()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    only = arguments.only and arguments.only.split(",")
    limit_s = arguments.limit_s or LIMITS_S.get(arguments.call, LIMIT_S)
    plan = Plan.of(arguments.call, only, limit_s, arguments.slower)
    preflight.check_packages()
    preflight.check_baselines()
    with preflight.open_log(out.parent):
        return _run(plan, out, arguments)


def _arguments() -> argparse.Namespace:
    parser = _Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--call", choices=sorted(CALLS), help="a call that first_run.sh makes")
    parser.add_argument("--first", type=Path, help="for call 2: the folder of call 1's rows")
    parser.add_argument("--only", help="these stages, e.g. steps,tinygemm")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the GPU")
    parser.add_argument(
        "--out", type=Path, help="rows are appended; rows.jsonl in the folder OUT by default"
    )
    parser.add_argument("--limit-s", type=preflight.above_zero, help="of the whole run")
    parser.add_argument(
        "--slower", type=preflight.above_zero, default=1.0,
        help="times slower than an H200: stages have more time",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.out is None and not os.environ.get("OUT"):
        parser.error("give --out FILE, or set OUT to a folder that outlives the machine")
    return arguments


def _run(plan: Plan, out: Path, arguments: argparse.Namespace) -> int:
    if arguments.rehearse:
        from benchmarks.gpu.rehearse import rehearse

        return rehearse(plan, out)
    preflight.check_cache()
    warnings = preflight.take_first_call(arguments.first, out) if arguments.call == "2" else []
    for warning in [*warnings, *preflight.take_kernels(arguments.first, out)]:
        print(f"warning: {warning}", file=sys.stderr)
    from benchmarks.gpu.run_stages import run_stages

    return run_stages(plan, out, small=arguments.small)


if __name__ == "__main__":
    sys.exit(main())
