"""Compile by NVIDIA's trtexec instead: its commands for a folder, and taking its engines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from vila_deploy.backends.tensorrt import files
from vila_deploy.backends.tensorrt.compilers import Compiler
from vila_deploy.backends.tensorrt.cuda_engine import CudaEngine
from vila_deploy.utils.errors import VilaDeployError

HEADER = """\
# The engines that vila-build-engine compiles, by trtexec of the board's TensorRT: to see more of
# what fails (--verbose), or to try its options. Run it in this folder; vila-build-engine then takes
# each *.plan that lies here, and compiles the others.
"""
KINDS = ("min", "opt", "max")


def script(profiles: Mapping[str, Sequence[Mapping[str, Sequence[Sequence[int]]]]]) -> str:
    """Return a shell script that compiles each module's graph.

    Args:
        profiles: see graphs.profiles.
    """
    commands = [HEADER]
    for module, own in profiles.items():
        arguments = [
            "trtexec",
            f"--onnx={module}/{files.GRAPH}",
            f"--saveEngine={plan_file(module)}",
            "--stronglyTyped",
            f"--timingCacheFile={files.TIMING_CACHE}",
            "--skipInference",
        ]
        for number, profile in enumerate(own):
            if len(own) > 1:
                arguments.append(f"--profile={number}")
            for index, kind in enumerate(KINDS):
                sizes = (
                    f"{name}:{'x'.join(map(str, ranges[index]))}"
                    for name, ranges in profile.items()
                )
                arguments.append(f"--{kind}Shapes={','.join(sizes)}")
        commands.append(" \\\n    ".join(map(shlex.quote, arguments)))
    return "\n".join(commands) + "\n"


def plan_file(module: str) -> str:
    """Return the name in the engine folder under which trtexec's engine of a module is taken."""
    return f"{module}.plan"


def take_plan(
    compiler: Compiler, folder: Path, module: str, profiles: int, tensors: Sequence[str]
) -> bool:
    """Move trtexec's engine of `module` to its place; return whether there is one.

    Args:
        profiles: how many the engine must have.
        tensors: names of inputs that it must have.

    Raises:
        VilaDeployError: TensorRT can't load it, or it is of another graph or other shapes.
    """
    plan = folder / plan_file(module)
    if not plan.is_file():
        return False
    engine = CudaEngine(compiler.load(), plan)
    found, names = engine.engine.num_optimization_profiles, set(engine.names)
    engine.close()
    if found != profiles or not names >= set(tensors):
        raise VilaDeployError(
            f"has {found} profiles and {len(names)} tensors, {module} needs {profiles} and "
            f"{', '.join(list(tensors)[:3])}, …",
            where=plan,
            fix=f"make it as {files.TRTEXEC} says, or remove it",
        )
    plan.replace(folder / module / files.PLAN)
    return True
