"""Build an engine folder out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vila_deploy.engine.manifest import Manifest


def build_engine(
    checkpoint: str | Path,
    out: str | Path,
    target: str,
    *,
    backend: str | None = None,
    precision: str | None = None,
    vision: str = "auto",
    lm_head: str = "auto",
    kv_cache: str = "fp16",
    eval: str | Path | None = None,
    max_batch_size: int = 1,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    prompt_template: str | None = None,
    tp: int = 1,
    pp: int = 1,
    jetpack: str | None = None,
    kernel_launch: str | None = None,
    activations: str | None = None,
    gpu_layers: int | None = None,
    memory: float | None = None,
    kl_bound: float | None = None,
) -> Manifest:
    """Write the engine folder `out` for `target`, "auto" for this computer; return its manifest.

    The options are those of `vila-build-engine`, see docs/cli.md; None of `gpu_layers` is its
    `auto`. Steps that only the device can take are left pending in the manifest;
    `build_engine(out, out, target)` finishes them there.

    Raises:
        VilaDeployError: an option, the checkpoint or the disk is wrong, or the model doesn't fit.
    """
    from vila_deploy.builder.build import build_engine as build
    from vila_deploy.builder.resolve import BuildOptions
    from vila_deploy.engine.local_target import target_name
    from vila_deploy.engine.precision import LLM_PRECISIONS, ModulePrecision, accepted_dtypes
    from vila_deploy.formats.module_dtypes import ACTIVATIONS
    from vila_deploy.kernels.launch_mode import KERNEL_LAUNCHES
    from vila_deploy.utils.errors import check_choice

    check_choice("--precision", precision, (None, *LLM_PRECISIONS))
    check_choice("--vision", vision, accepted_dtypes("vision"))
    check_choice("--lm-head", lm_head, accepted_dtypes("lm_head"))
    check_choice("--activations", activations, (None, *ACTIVATIONS))
    check_choice("--kv-cache", kv_cache, accepted_dtypes("kv_cache"))
    check_choice("--kernel-launch", kernel_launch, (None, *KERNEL_LAUNCHES))
    _check_numbers(
        max_batch_size=max_batch_size, max_input_len=max_input_len, max_seq_len=max_seq_len,
        tp=tp, pp=pp, gpu_layers=gpu_layers, memory=memory,
    )  # fmt: skip
    modules = ModulePrecision(vision, lm_head, kv_cache)
    eval_data = None if eval is None else Path(eval)
    memory_bytes = None if memory is None else int(memory * 1e9)
    options = BuildOptions(
        target_name(target)[0], backend, precision, max_batch_size, max_input_len, max_seq_len,
        prompt_template, tp, pp, jetpack, modules, eval_data, kernel_launch, activations,
        gpu_layers, memory_bytes, kl_bound,
    )  # fmt: skip
    return build(Path(checkpoint), Path(out), options)


# The least value of an option, where that isn't 1.
LEAST = {"max_seq_len": 2, "gpu_layers": 0, "memory": 1e-9}


def _check_numbers(**options: float | None) -> None:
    """Raise VilaDeployError for an option that is below its least value."""
    from vila_deploy.utils.errors import check_at_least

    for name, value in options.items():
        check_at_least(f"--{name.replace('_', '-')}", value, LEAST.get(name, 1))
