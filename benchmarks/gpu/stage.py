"""`python -m benchmarks.gpu.stage NAME`: one stage; it waits for a line before it begins.

The line is the end of its time by CLOCK_MONOTONIC, in seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import STAGES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    # One that crashes, or is ended since it hangs, leaves in the log where it was.
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    import torch

    from benchmarks.gpu.environment import Run, reason_of
    from benchmarks.gpu.registry import load_stage
    from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

    function = load_stage(arguments.name)
    line = sys.stdin.readline()
    if not line:
        return 0  # nobody needs it any more
    device, capability = "cpu", INTERPRETER
    if not arguments.rehearse:
        if not torch.cuda.is_available():
            print("error: torch finds no CUDA GPU", file=sys.stderr)
            return 1
        device, capability = "cuda", ComputeCapability(*torch.cuda.get_device_capability())
    limit_s = float(line) - time.monotonic()
    run = Run(device, capability, limit_s, arguments.out, small=arguments.small)
    run.stage = arguments.name
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as a session does
    compiled = compiled_from_now_on()
    try:
        with torch.inference_mode():
            function(run)
    except Exception as error:  # whoever has only the rows shall know why
        run.add("failed", arguments.name, reason=reason_of(error))
        traceback.print_exc()
        return 1
    finally:
        if compiled and STAGES[arguments.name].timed:
            run.add("compiled_late", arguments.name, kernels=compiled)
    return 0


def compiled_from_now_on() -> list[str]:
    """Return a list of what Triton compiles in this process, which grows."""
    import triton

    names: list[str] = []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(metadata["name"])

    triton.knobs.compilation.listener = listen
    return names


if __name__ == "__main__":
    sys.exit(main())
