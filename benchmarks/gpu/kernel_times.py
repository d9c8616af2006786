"""Each kernel of a step alone, over all layers in turn, and a launch that does nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.environment import Run
from benchmarks.gpu.timing import copies_needed, seconds
from vila_deploy.backends.native.decode_step import Cache, DecodeStep
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import PDL_CAPABILITY
from vila_deploy.kernels.pdl import wait

# Launches in the graph of what does nothing.
EMPTY_LAUNCHES = 64
PRODUCTS = {
    "norm_qkv_kernel": "qkv", "gate_up_kernel": "gate_up", "head_kernel": "head",
    "attention_split_kernel": "attention", "attention_merge_kernel": "attention merge",
    "embed_kernel": "embed",
}  # fmt: skip


@triton.jit
def empty_kernel(out_ptr: tl.tensor, PDL: tl.constexpr) -> None:
    if PDL:
        wait()


def measure_kernels(run: Run, name: str, step: DecodeStep, cache: Cache, context: int) -> None:
    """Add a row for each product and kernel of `step`, the model and precision `name`."""
    cache.position.fill_(context)
    by_name: dict[str, list[Launch]] = {}
    for launch in step.launches:
        by_name.setdefault(product_of(launch), []).append(launch)
    by_name.pop("argmax_kernel")  # it moves the position on
    for product, launches in by_name.items():
        size = sum(_bytes(launch) for launch in launches)
        # Less than the L2 holds is still there at the next replay.
        held = copies_needed(size, run.device) > 2
        launch_s = seconds(launches, run.device)
        run.add(
            "kernel", f"{name} {product}", microseconds=launch_s * 1e6, launches=len(launches),
            in_l2=held,
        )  # fmt: skip
    _measure_empty(run, name, step.logits)


def product_of(launch: Launch) -> str:
    """Return the product that a launch computes, else its kernel; o and down share a kernel."""
    if launch.name == "add_residual_kernel":
        columns, rows = launch.args["columns"], launch.args["rows"]
        assert isinstance(columns, int)
        assert isinstance(rows, int)
        return "down" if columns > rows else "o"
    return PRODUCTS.get(launch.name, launch.name)


def _bytes(launch: Launch) -> int:
    tensors = [arg for arg in launch.args.values() if isinstance(arg, Tensor)]
    return max(tensor.numel() * tensor.element_size() for tensor in tensors)


def _measure_empty(run: Run, name: str, out: Tensor) -> None:
    """Time one more launch inside a graph that does nothing, also if it is begun early."""
    for launch in empty_launches(run, out.device):
        shown = "empty launch, pdl" if launch.constants["PDL"] else "empty launch"
        launch_s = seconds([launch], run.device, repeats=EMPTY_LAUNCHES)
        run.add("kernel", f"{name} {shown}", microseconds=launch_s * 1e6, launches=EMPTY_LAUNCHES)


def empty_launches(run: Run, device: str | torch.device) -> list[Launch]:
    """Return what does nothing, in the forms that the device has."""
    out = torch.empty(1, dtype=torch.float32, device=device)
    empty = Launch(empty_kernel, (1,), {"out_ptr": out}, {"PDL": False}, 1)
    return [empty, empty.with_pdl()] if run.capability >= PDL_CAPABILITY else [empty]
