"""`python -m benchmarks.gpu.build_baselines NAME`: compile what get_baselines.py brought."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.gpu import baseline_llamacpp, baseline_tinychat
from benchmarks.gpu.baseline import Missing

NAMES = ("tinychat", "llamacpp")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.build_baselines", description=__doc__
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--sm", type=int, help="llamacpp: for this GPU instead of the one here")
    arguments = parser.parse_args()
    try:
        if arguments.name == "llamacpp":
            print(baseline_llamacpp.build(arguments.sm))
        else:
            print(baseline_tinychat.build())
    except (Missing, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
