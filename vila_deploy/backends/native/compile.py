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
    from vila_deploy.backends.native.memory import prompt_lengths
    from vila_deploy.backends.native.weights import empty_llm
    from vila_deploy.kernels.tile_config import widest_gemm

    # Layers are alike: the first differs from the others only in what stands before it.
    config = replace(config, num_layers=min(config.num_layers, 2))
    llm = empty_llm(config, max_seq_len, lm_head=module_precision.lm_head)
    step_config = StepConfig(config, max_seq_len, capability, "meta", launch_mode)
    cache = Cache(config, max_seq_len, "meta", module_precision.kv_cache)
    step = DecodeStep(step_config, llm, cache)
    # The longest prompts on both sides of the switch to cuBLAS.
    lengths = prompt_lengths(max_seq_len)
    narrow = [tokens for tokens in lengths if tokens <= widest_gemm(capability)]
    return [
        *step.launches,
        step.sampled[-1],
        *_few_tokens_launches(step_config, cache),
        *_prompt_launches(step_config, llm, cache, sorted({narrow[-1], lengths[-1]})),
    ]


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
    from vila_deploy.backends.native.memory import prompt_lengths
    from vila_deploy.backends.native.weights import empty_llm

    launches = engine_launches(config, max_seq_len, capability, module_precision, launch_mode)
    config = replace(config, num_layers=1)
    llm = empty_llm(config, max_seq_len, lm_head=module_precision.lm_head)
    cache = Cache(config, max_seq_len, "meta", module_precision.kv_cache)
    step_config = StepConfig(config, max_seq_len, capability, "meta", launch_mode)
    launches += DecodeStep(step_config, llm, cache).after_prompt()
    if several:
        launches += _rows_launches(replace(config, num_layers=2), step_config, module_precision)
    return launches + _prompt_launches(step_config, llm, cache, prompt_lengths(max_seq_len))


def _rows_launches(
    config: LlmConfig, step_config: StepConfig, module_precision: ModulePrecision
) -> list[Launch]:
    """Return what steps over one and over more sequences launch, and what follows their prompts."""
    from vila_deploy.backends.native.memory import row_counts
    from vila_deploy.backends.native.rows_step import RowsStep
    from vila_deploy.backends.native.slot_caches import SlotCaches
    from vila_deploy.backends.native.weights import empty_llm
    from vila_deploy.kernels.tile_config import TOKENS

    max_seq_len = step_config.max_seq_len
    llm = empty_llm(config, max_seq_len, lm_head=module_precision.lm_head)
    caches = SlotCaches(config, max_seq_len, 2, "meta", module_precision.kv_cache)
    steps = [
        RowsStep(replace(step_config, llm=config), llm, caches, rows) for rows in row_counts(TOKENS)
    ]
    return [*(launch for step in steps for launch in step.sampled), *steps[0].after_prompt()]


def _prompt_launches(
    step_config: StepConfig, llm: PackedLlm, cache: Cache, lengths: Sequence[int]
) -> list[Launch]:
    """Return what prompts that are padded to these lengths launch."""
    from vila_deploy.backends.native.prompt_pass import PromptBuffers, PromptPass
    from vila_deploy.kernels.launch import Launch

    buffers = PromptBuffers(step_config, llm, lengths[-1])
    passes = [PromptPass(step_config, llm, cache, buffers, tokens) for tokens in lengths]
    return [call for one in passes for call in one.calls if isinstance(call, Launch)]


def _few_tokens_launches(step_config: StepConfig, cache: Cache) -> list[Launch]:
    """Return attention of a step over several tokens of one sequence."""
    from vila_deploy.kernels.attention import SplitScratch, attention
    from vila_deploy.kernels.tile_config import TOKENS, attention_splits

    config, capability = step_config.llm, step_config.capability
    few, heads, dim = min(TOKENS, step_config.max_seq_len), config.num_heads, config.head_dim
    q = torch.empty((few, heads, dim), dtype=torch.float16, device="meta")
    keys, values, scales = cache.layer(0)
    out = torch.empty((few, heads * dim), dtype=torch.float16, device="meta")
    splits = attention_splits(capability, config.num_kv_heads, step_config.max_seq_len)
    scratch = SplitScratch(few, heads, dim, splits, "meta")
    return [*attention(q, keys, values, cache.position, out, scratch, capability, scales)]


if __name__ == "__main__":
    main()
