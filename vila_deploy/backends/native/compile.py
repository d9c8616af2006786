"""Every kernel of an engine compiled for its target, in a process of its own.

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
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.module_command import module_command

if TYPE_CHECKING:
    from vila_deploy.backends.native.decode_step import Cache, Sizes
    from vila_deploy.backends.native.weights import PackedLlm
    from vila_deploy.kernels.launch import Launch
    from vila_deploy.kernels.pdl import Boundaries

WORKER = "vila_deploy.backends.native.compile"


def compile_engine(
    config: LlmConfig,
    max_seq_len: int,
    capabilities: Sequence[str],
    module_precision: ModulePrecision = ALL_FP16,
    only: Sequence[str] = (),
    boundaries: Boundaries | None = None,
) -> list[dict[str, Any]]:
    """What the compiler says of each distinct kernel for each compute capability, e.g. "9.0".

    Args:
        only: names of kernels; empty means all of them.
        boundaries: None is what a Session runs.

    Raises:
        VilaDeployError: a kernel does not compile; the message is the compiler's last line.
    """
    family = next(name for name, row in LLM_FAMILIES.items() if row == config.family)
    quantization = config.quantization
    request = {
        "sms": [int(each.replace(".", "")) for each in capabilities],
        "max_seq_len": max_seq_len,
        "components": module_precision.to_json(),
        "only": list(only),
        "boundaries": {} if boundaries is None else vars(boundaries),
        "config": {**vars(config), "family": family}
        | {"quantization": quantization and vars(quantization)},
    }
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        module_command(WORKER),
        input=json.dumps(request), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise VilaDeployError(
            f"Triton can't compile for compute capability {', '.join(capabilities)} ({lines[-1]})",
            fix="install the versions of torch and triton that this version was tested with",
        )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Reads a request from stdin, prints the report."""
    from vila_deploy.kernels.aot import compile_all
    from vila_deploy.kernels.pdl import Boundaries

    request = json.load(sys.stdin)
    values = request["config"]
    quantization = values["quantization"]
    values |= {
        "family": LLM_FAMILIES[values["family"]],
        "quantization": quantization and QuantizationConfig(**quantization),
    }
    config, report = LlmConfig(**values), []
    for sm in request["sms"]:
        module_precision = ModulePrecision(**request["components"])
        boundaries = Boundaries(**request["boundaries"])
        launches = engine_launches(config, request["max_seq_len"], sm, module_precision, boundaries)
        if request["only"]:
            launches = [launch for launch in launches if launch.name in request["only"]]
        report += [compiled.to_json() for compiled in compile_all(launches, sm)]
    print(json.dumps(report))


def engine_launches(
    config: LlmConfig,
    slots: int,
    sm: int,
    module_precision: ModulePrecision = ALL_FP16,
    boundaries: Boundaries | None = None,
) -> list[Launch]:
    """What a Session of this model launches, over tensors without values."""
    from vila_deploy.backends.native.decode_step import Cache, DecodeStep, Sizes
    from vila_deploy.backends.native.weights import empty_llm
    from vila_deploy.kernels.dequantize import dequantize
    from vila_deploy.kernels.gemm import gemm
    from vila_deploy.kernels.pdl import Boundaries
    from vila_deploy.kernels.tile_config import widest_gemm

    # Layers are alike: the first differs from the others only in what stands before it.
    config = replace(config, num_layers=min(config.num_layers, 2))
    llm, sizes = (
        empty_llm(config, slots, lm_head=module_precision.lm_head),
        Sizes(config, slots, sm, "meta", boundaries or Boundaries()),
    )
    cache = Cache(config, slots, "meta", module_precision.kv_cache)
    step = DecodeStep(sizes, llm, cache)
    launches = [*step.launches, step.sampled[-1]]
    tokens, weight = min(slots, widest_gemm(sm)), llm.layers[0].down
    launches += _prompt(sizes, llm, cache, tokens)
    x, y = (torch.empty((tokens, n), dtype=torch.float16, device="meta")
            for n in (weight.in_features, weight.out_features))  # fmt: skip
    launches.append(gemm(x, weight, None, y, sm))
    if weight.bits < 16:
        dense = torch.empty((weight.out_features, weight.in_features), dtype=torch.float16,
                            device="meta")  # fmt: skip
        launches.append(dequantize(weight, dense))
    return launches


def _prompt(sizes: Sizes, llm: PackedLlm, cache: Cache, tokens: int) -> list[Launch]:
    """The rotation of a whole prompt, and attention of a few tokens at once."""
    from vila_deploy.kernels.attention import Parts, attention
    from vila_deploy.kernels.rope_kv import rope_kv
    from vila_deploy.kernels.tile_config import TOKENS, attention_splits

    config = sizes.config
    heads, dim = config.num_heads, config.head_dim
    width = (heads + 2 * config.num_kv_heads) * dim
    qkv = torch.empty((tokens, width), dtype=torch.float16, device="meta")
    q = torch.empty((tokens, heads, dim), dtype=torch.float16, device="meta")
    keys, values, scales = cache.layer(0)
    turn = rope_kv(qkv, llm.cos, llm.sin, cache.position, q, keys, values, scales)
    few = min(TOKENS, tokens)
    out = torch.empty((few, heads * dim), dtype=torch.float16, device="meta")
    splits = attention_splits(sizes.sm, config.num_kv_heads, sizes.slots)
    parts = Parts(few, heads, dim, splits, "meta")
    return [turn, *attention(q[:few], keys, values, cache.position, out, parts, sizes.sm, scales)]


if __name__ == "__main__":
    main()
