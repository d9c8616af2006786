"""`python -m vila_deploy.cli.bench_worker ENGINE`: one row as JSON, from a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vila_deploy.cli.common import command_errors


@command_errors
def main() -> None:
    from vila_deploy.bench.measure import measure

    print(json.dumps(measure(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
