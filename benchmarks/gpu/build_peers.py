"""`python -m benchmarks.gpu.build_peers NAME`: compiles what get_peers.py brought as source."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.gpu.environment import make_importable

NAMES = ("tinychat", "llamacpp")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.build_peers", description=__doc__
    )
    parser.add_argument("name", choices=NAMES)
    name = parser.parse_args().name
    make_importable()
    # Only now: a bare checkout finds the package's parts no earlier.
    from benchmarks.gpu import peers_llamacpp, peers_tinychat
    from benchmarks.gpu.peers_base import Missing

    try:
        print({"tinychat": peers_tinychat, "llamacpp": peers_llamacpp}[name].build())
    except (Missing, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
