"""Compile every kernel of an engine for its target, in a process of its own.

A process that set TRITON_INTERPRET can't compile; and Triton's memory goes with the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import LaunchMode
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.module_command import module_command

if TYPE_CHECKING:
    from vila_deploy.backends.native.decode_step import Cache, StepConfig
    from vila_deploy.backends.native.weights import PackedLlm
    from vila_deploy.kernels.launch import Launch

WORKER = "vila_deploy.backends.native.compile"
ONE_BY_ONE = LaunchMode()


def compile_engine(
    config: LlmConfig,
    max_seq_len: int,
    capabilities: Sequence[ComputeCapability],
    module_precision: ModulePrecision = ALL_FP16,
    launch_modes: Sequence[LaunchMode] = (ONE_BY_ONE,),
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the compiler's figures of each distinct kernel for each compute capability.

    Args:
        launch_modes: those that the engine may run in.
        only: names of kernels; empty means all of them.

    Raises:
        VilaDeployError: a kernel does not compile; the message is the compiler's last line.
    """
    family = next(name for name, row in LLM_FAMILIES.items() if row == config.family)
    quantization = config.quantization
    request = {
        "capabilities": list(capabilities),
        "max_seq_len": max_seq_len,
        "components": module_precision.to_json(),
        "only": list(only),
        "launch_modes": [vars(mode) for mode in launch_modes],
        "config": {**vars(config), "family": family}
        | {"quantization": quantization and vars(quantization)},
    }
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        module_command(WORKER),
        input=json.dumps(request), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise cannot_compile(capabilities, done.stderr)
    report: list[dict[str, Any]] = json.loads(done.stdout)
    return report


def cannot_compile(capabilities: Sequence[ComputeCapability], said: str) -> VilaDeployError:
    """Return the error for what the compiler said."""
    lines = said.strip().splitlines() or ["no message"]
    names = ", ".join(map(str, capabilities))
    return VilaDeployError(
        f"Triton can't compile for compute capability {names} ({lines[-1]})",
        fix="install the versions of torch and triton that this version was tested with",
    )


def main() -> None:
    """Read a request from stdin and print the report."""
    from vila_deploy.kernels.aot import compile_all

    request = json.load(sys.stdin)
    values = request["config"]
    quantization = values["quantization"]
    values |= {
        "family": LLM_FAMILIES[values["family"]],
        "quantization": quantization and QuantizationConfig(**quantization),
    }
    config, report = LlmConfig(**values), []
    module_precision = ModulePrecision(**request["components"])
    launch_modes = [LaunchMode(**values) for values in request["launch_modes"]]
    for capability in (ComputeCapability(*numbers) for numbers in request["capabilities"]):
        launches = [
            launch
            for mode in launch_modes
            for launch in engine_launches(
                config, request["max_seq_len"], capability, module_precision, mode
            )
        ]
        if request["only"]:
            launches = [launch for launch in launches if launch.name in request["only"]]
        report += [compiled.to_json() for compiled in compile_all(launches, capability)]
    print(json.dumps(report))


def engine_launches(
    config: LlmConfig,
    max_seq_len: int,
    capability: ComputeCapability,
    module_precision: ModulePrecision = ALL_FP16,
    launch_mode: LaunchMode = ONE_BY_ONE,
) -> list[Launch]:
    """Return what a session of this model launches, over tensors without values."""
    from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
    from vila_deploy.backends.native.weights import empty_llm
    from vila_deploy.kernels.dequantize import dequantize
    from vila_deploy.kernels.gemm import gemm
    from vila_deploy.kernels.tile_config import widest_gemm

    # Layers are alike: the first differs from the others only in what stands before it.
    config = replace(config, num_layers=min(config.num_layers, 2))
    llm = empty_llm(config, max_seq_len, lm_head=module_precision.lm_head)
    step_config = StepConfig(config, max_seq_len, capability, "meta", launch_mode)
    cache = Cache(config, max_seq_len, "meta", module_precision.kv_cache)
    step = DecodeStep(step_config, llm, cache)
    launches = [*step.launches, step.sampled[-1]]
    tokens, weight = min(max_seq_len, widest_gemm(capability)), llm.layers[0].down
    launches += _prompt_launches(step_config, llm, cache, tokens)
    x, y = (torch.empty((tokens, n), dtype=torch.float16, device="meta")
            for n in (weight.in_features, weight.out_features))  # fmt: skip
    launches.append(gemm(x, weight, None, y, capability))
    if weight.bits < 16:
        dense = torch.empty((weight.out_features, weight.in_features), dtype=torch.float16,
                            device="meta")  # fmt: skip
        launches.append(dequantize(weight, dense))
    return launches


def session_launches(
    config: LlmConfig,
    max_seq_len: int,
    capability: ComputeCapability,
    module_precision: ModulePrecision,
    launch_mode: LaunchMode,
    *,
    several: bool = False,
) -> list[Launch]:
    """Return `engine_launches`, and every form that prompts of some length launch besides.

    Args:
        several: add those of steps over several sequences.
    """
    from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
    from vila_deploy.backends.native.weights import empty_llm
    from vila_deploy.kernels.linear import product
    from vila_deploy.kernels.tile_config import TOKENS, prompt_widths

    launches = engine_launches(config, max_seq_len, capability, module_precision, launch_mode)
    config = replace(config, num_layers=1)
    llm = empty_llm(config, max_seq_len, lm_head=module_precision.lm_head)
    cache = Cache(config, max_seq_len, "meta", module_precision.kv_cache)
    step_config = StepConfig(config, max_seq_len, capability, "meta", launch_mode)
    launches += DecodeStep(step_config, llm, cache).after_prompt()
    if several:
        launches += _rows_launches(replace(config, num_layers=2), step_config, module_precision)
    launches += _prompt_launches(step_config, llm, cache, min(TOKENS, max_seq_len))
    layer, f16, f32 = llm.layers[0], torch.float16, torch.float32
    products = (
        (layer.qkv, layer.qkv_bias, f16), (layer.o, None, f32), (layer.gate_up, None, f16),
        (layer.down, None, f32),
    )  # fmt: skip
    for tokens in prompt_widths(capability, max_seq_len):
        for weight, bias, dtype in products:
            x = torch.empty((tokens, weight.in_features), dtype=f16, device="meta")
            y = torch.empty((tokens, weight.out_features), dtype=dtype, device="meta")
            launches.append(product(x, weight, bias, y, capability))
    return launches


def _rows_launches(
    config: LlmConfig, step_config: StepConfig, module_precision: ModulePrecision
) -> list[Launch]:
    """Return what steps over one and over more sequences launch, and what follows their prompts."""
    from vila_deploy.backends.native.rows_step import RowsStep
    from vila_deploy.backends.native.slot_caches import SlotCaches
    from vila_deploy.backends.native.weights import empty_llm

    max_seq_len = step_config.max_seq_len
    llm = empty_llm(config, max_seq_len, lm_head=module_precision.lm_head)
    caches = SlotCaches(config, max_seq_len, 2, "meta", module_precision.kv_cache)
    # Kernels of 2, 4 and 8 rows are the same.
    alone, together = (RowsStep(replace(step_config, llm=config), llm, caches, n) for n in (1, 2))
    return [*alone.sampled, *together.sampled, *alone.after_prompt()]


def _prompt_launches(
    step_config: StepConfig, llm: PackedLlm, cache: Cache, tokens: int
) -> list[Launch]:
    """Return the rotation of a whole prompt, and attention of a few tokens at once."""
    from vila_deploy.kernels.attention import SplitScratch, attention
    from vila_deploy.kernels.rope_kv import rope_kv
    from vila_deploy.kernels.tile_config import TOKENS, attention_splits

    config, capability = step_config.llm, step_config.capability
    heads, dim = config.num_heads, config.head_dim
    width = (heads + 2 * config.num_kv_heads) * dim
    qkv = torch.empty((tokens, width), dtype=torch.float16, device="meta")
    q = torch.empty((tokens, heads, dim), dtype=torch.float16, device="meta")
    keys, values, scales = cache.layer(0)
    rope = rope_kv(qkv, llm.cos, llm.sin, cache.position, q, keys, values, scales)
    few = min(TOKENS, tokens)
    out = torch.empty((few, heads * dim), dtype=torch.float16, device="meta")
    splits = attention_splits(capability, config.num_kv_heads, step_config.max_seq_len)
    scratch = SplitScratch(few, heads, dim, splits, "meta")
    few_tokens = attention(q[:few], keys, values, cache.position, out, scratch, capability, scales)
    return [rope, *few_tokens]


if __name__ == "__main__":
    main()
