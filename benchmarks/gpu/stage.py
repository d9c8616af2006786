"""`python -m benchmarks.gpu.stage NAME`: one stage; it waits for a line before it begins."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from benchmarks.gpu.environment import Run
    from benchmarks.gpu.registry import load_stage
    from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

    function = load_stage(arguments.name)
    if not sys.stdin.readline():
        return 0  # nobody needs it any more
    device, capability = "cpu", INTERPRETER
    if not arguments.rehearse:
        if not torch.cuda.is_available():
            print("error: torch finds no CUDA GPU", file=sys.stderr)
            return 1
        device, capability = "cuda", ComputeCapability(*torch.cuda.get_device_capability())
    run = Run(device, capability, arguments.limit_s, arguments.out, small=arguments.small)
    run.stage = arguments.name
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as a session does
    with torch.inference_mode():
        function(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
