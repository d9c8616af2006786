"""vila-bench whose measurements take a minute, for tests that send it signals.

A measurement writes its process id into the file that SLOW_BENCH_PID names.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from vila_deploy.bench import measure_row
from vila_deploy.cli import bench, bench_table_worker


def wait(*_: Any) -> dict[str, Any]:
    path = Path(os.environ["SLOW_BENCH_PID"])
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
    time.sleep(600)
    return {}


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure_row.measure_row = wait
        bench_table_worker.main()
    else:
        bench_table_worker.MODULE = "tests.support.slow_bench"
        bench.main()
