"""Print as JSON what Triton makes of launches; a process of its own, since not interpreted.

bound: whether each launch of a step says of its arguments what Triton's just-in-time compiler
says of them, given the same call on a GPU.
modes: kernels of launch modes other than the default, compiled.
small: kernels of an engine with head and cache in 8 bits, compiled.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vila_deploy.backends.native.compile import engine_launches
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.kernels.aot import compile_all, compile_launch, source
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import LaunchMode

H100 = ComputeCapability(9, 0)
CAPABILITIES = (ComputeCapability(8, 0), ComputeCapability(8, 7), ComputeCapability(8, 9), H100)
STEP = {"norm_qkv_kernel", "attention_kernel", "add_residual_kernel", "gate_up_kernel"}
SMALL = {"head_kernel", "rope_kv_kernel", "attention_split_kernel"}
CONFIG = replace(preset("VILA1.5-3b", "int4").llm, num_layers=2)


class NoDevice(CudaDriver):
    """Says which GPU there would be."""

    def __init__(self) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H100.sm, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def bound() -> list[dict[str, Any]]:
    """Run launches as on a GPU, up to where Triton would compile."""
    seen: list[tuple[Any, ...]] = []
    JITFunction._do_compile = lambda self, key, *arguments: seen.append(arguments)
    driver.set_active(NoDevice())
    rows = []
    for mode in (
        LaunchMode(),
        LaunchMode(pdl=True, merge_attention=True),
        LaunchMode(fuse_layers=True),
    ):
        for module_precision in (ALL_FP16, ModulePrecision(lm_head="int8", kv_cache="int8")):
            for launch in engine_launches(CONFIG, 512, H100, module_precision, mode):
                launch()
                rows.append(_compared(launch, *seen.pop()))
    return rows


def _compared(
    launch: Launch,
    signature: Any,
    device: int,
    constants: Any,
    options: Any,
    attributes: Any,
    *_: Any,
) -> dict[str, Any]:
    names = launch.kernel.arg_names
    paths = {(names.index(n),) if isinstance(n, str) else n: v for n, v in constants.items()}
    theirs = ASTSource(launch.kernel, signature, constants, attributes)
    ours = source(launch)

    def plain(values: dict[Any, Any]) -> dict[Any, Any]:
        return {path: getattr(value, "value", value) for path, value in values.items()}

    return {
        "kernel": launch.name,
        "signature": signature == launch.signature(),
        "constants": plain(paths) == plain(launch.compiled_constants()),
        "attributes": attributes == launch.attributes(),
        # By its hash the device finds what was compiled ahead.
        "hash": theirs.hash() == ours.hash(),
        "warps": options.num_warps == launch.warps,
        "options": [n for n in ("launch_pdl", "launch_cooperative_grid") if getattr(options, n)],
    }


def modes() -> list[dict[str, Any]]:
    rows = []
    for pdl in (False, True):
        mode = LaunchMode(pdl=pdl, merge_attention=True)
        names = STEP if pdl else {"attention_kernel"}
        launches = engine_launches(CONFIG, 1024, H100, ALL_FP16, mode)
        distinct = {launch.name: launch for launch in launches if launch.name in names}
        rows += [_row(launch, H100, pdl=pdl) for launch in distinct.values()]
    mode = LaunchMode(fuse_layers=True, merge_attention=True)
    for capability in CAPABILITIES:
        launches = engine_launches(CONFIG, 1024, capability, ALL_FP16, mode)
        (fused,) = (launch for launch in launches if launch.name == "fused_layer_kernel")
        rows.append(_row(fused, capability, pdl=False))
    return rows


def _row(launch: Launch, capability: ComputeCapability, *, pdl: bool) -> dict[str, Any]:
    compiled, stages = compile_launch(launch, capability)
    words = ("griddepcontrol.launch_dependents", "griddepcontrol.wait", "ld.acquire.gpu",
             "atom.global.gpu.acq_rel", "prefetch.global.L2")  # fmt: skip
    ptx = stages["ptx"]
    places = {word: ptx.find(word) for word in ("griddepcontrol.wait", "ld.global", "cp.async")}
    return {
        **compiled.to_json(), "constants": None, "pdl": pdl,
        "counts": Counter({word: ptx.count(word) for word in words}), "places": places,
        "last_prefetch": ptx.rfind("prefetch.global.L2"), "programs": launch.grid[0],
    }  # fmt: skip


def small() -> list[dict[str, Any]]:
    precision, rows = ModulePrecision(lm_head="int8", kv_cache="int8"), []
    for capability in CAPABILITIES:
        launches = engine_launches(replace(CONFIG, num_layers=1), 1024, capability, precision)
        rows += compile_all([launch for launch in launches if launch.name in SMALL], capability)
    return [row.to_json() for row in rows]


if __name__ == "__main__":
    # `bound` comes last: behind it nothing compiles any more.
    print(json.dumps({"modes": modes(), "small": small(), "bound": bound()}))
