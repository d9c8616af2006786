"""TensorRT-LLM checkpoints: config.json, quant_cfg.json and a safetensors file for each GPU.

Of `tp` · `pp` ranks, rank p · tp + t holds share t of the layers of pipeline stage p. Tensor
parallelism splits q, k and v apart and then joins each rank's shares, gives ranks that are more
than the key/value heads a copy of the one they need, and pads the vocabulary to whole shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.formats import trtllm
from vila_deploy.formats.base import TensorSpec
from vila_deploy.formats.trtllm import W4A16_AWQ
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.version import __version__

CONFIG, QUANT_CONFIG = "config.json", "quant_cfg.json"
VOCABULARY_MULTIPLE = 64  # where linears are in 4 bits
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DECODERS = {"llama": "llama", "qwen2": "qwen"}
# Beside llm/, whose config.json would be in the way of TensorRT-LLM's own.
FOLDER = "trtllm"


@dataclass(frozen=True)
class Parallel:
    """How many GPUs share each layer (`tp`), and how many pipeline stages there are (`pp`)."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def pipeline_stage(self, rank: int) -> int:
        return rank // self.tp

    def share(self, rank: int) -> int:
        return rank % self.tp


ONE_GPU = Parallel()


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def check_llm(config: LlmConfig, group_size: int | None, parallel: Parallel = ONE_GPU) -> None:
    """Raise VilaDeployError, before any work, for what TensorRT-LLM can't hold or split so.

    Args:
        group_size: of 4-bit linears; None for float16.
    """
    tp, heads, kv_heads = parallel.tp, config.num_heads, config.num_kv_heads
    if group_size is not None:
        trtllm.check_group_size(group_size)
    for what, count, option, ways in (
        ("attention heads", heads, "--tp", tp),
        ("MLP channels", config.intermediate_size, "--tp", tp),
        ("layers", config.num_layers, "--pp", parallel.pp),
    ):
        if count % ways:
            raise VilaDeployError(
                f"{ways} GPUs can't share {count} {what} evenly",
                fix=f"choose a {option} that divides {count}",
            )
    if kv_heads % tp and tp % kv_heads:
        raise VilaDeployError(
            f"{tp} GPUs can't share {kv_heads} key/value heads",
            fix=f"choose a --tp that divides {kv_heads}, or a multiple of it",
        )
    if group_size is None:
        return
    for name, (rows, columns) in _shares(config, parallel).items():
        for size, multiple, what in (
            (rows, trtllm.OUTPUT_MULTIPLE, "output"),
            (columns, max(group_size, trtllm.INPUT_MULTIPLE), "input"),
        ):
            if size % multiple:
                share = f" on each of {tp} GPUs" if tp > 1 else ""
                raise VilaDeployError(
                    f"{size} {what} channels{share} are not a multiple of {multiple}, as "
                    "TensorRT-LLM's 4-bit kernels need",
                    where=name,
                    fix="choose fewer GPUs or a smaller --group-size" if tp > 1 else
                    "choose a smaller --group-size or another backend",
                )  # fmt: skip


def checkpoint_config(
    config: LlmConfig, group_size: int | None, parallel: Parallel, rank: int = 0
) -> dict[str, Any]:
    """Return config.json as Model Optimizer writes it, with what TensorRT-LLM adds for Qwen2."""
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": None}
    if group_size is not None:
        quantization |= {
            "quant_algo": "W4A16_AWQ",
            "group_size": group_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": ["lm_head"],
        }
    family = config.family.name
    values = {
        "producer": {"name": "vila-deploy", "version": __version__},
        "architecture": ARCHITECTURES[family],
        "dtype": "float16",
        "logits_dtype": "float16",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "norm_epsilon": config.rms_norm_eps,
        "vocab_size": padded_vocabulary(config, group_size, parallel),
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config.rope_theta,
        "rotary_pct": 1.0,
        "residual_mlp": False,
        "quantization": quantization,
        "mapping": {"world_size": parallel.ranks, "tp_size": parallel.tp, "pp_size": parallel.pp},
        "bias": False,
        "lm_head_bias": False,
        "rmsnorm": True,
        "decoder": DECODERS[family],
        "rank": rank,
    }
    if config.rope_factor != 1.0:
        values["rotary_scaling"] = {"type": "linear", "factor": config.rope_factor}
    if family == "qwen2":
        values["qwen_type"] = "qwen2"
    return values


def layer_quantization(group_size: int | None) -> dict[str, Any] | None:
    """Return quant_cfg.json as Model Optimizer writes it; None where all linears are quantized."""
    if group_size is not None:
        return None
    return {"quant_algo": None, "kv_cache_quant_algo": None, "quantized_layers": {}}


def padded_vocabulary(config: LlmConfig, group_size: int | None, parallel: Parallel) -> int:
    """Return the vocabulary that TensorRT-LLM sees; higher ids are rows of the prompt table."""
    if group_size is None:
        return config.vocab_size
    return round_up(config.vocab_size, math.lcm(VOCABULARY_MULTIPLE, parallel.tp))


def round_up(count: int, multiple: int) -> int:
    """Return `count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def _shares(config: LlmConfig, parallel: Parallel) -> dict[str, tuple[int, int]]:
    """Return (out, in) of a rank's share of each linear, by TensorRT-LLM's name within a layer."""
    sizes, tp = config.linears, parallel.tp
    joined = sum(qkv_rows(config, parallel))
    shares = {trtllm.JOINED_QKV.name: (joined, config.hidden_size)}
    for name, module in trtllm.LINEARS.items():
        rows, columns = sizes[name]
        split = module.split == "rows"
        shares[module.name] = (rows // tp, columns) if split else (rows, columns // tp)
    return shares


def qkv_rows(config: LlmConfig, parallel: Parallel) -> tuple[int, int, int]:
    """Return a rank's rows of q, k and v; it has at least one key/value head."""
    heads = config.num_heads // parallel.tp
    kv_heads = max(1, config.num_kv_heads // parallel.tp)
    return tuple(count * config.head_dim for count in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def rank_tensors(
    config: LlmConfig, group_size: int | None, parallel: Parallel, rank: int
) -> list[TensorSpec]:
    """Return every tensor of a rank's file."""
    hidden, stage = config.hidden_size, parallel.pipeline_stage(rank)
    rows = round_up(padded_vocabulary(config, group_size, parallel), parallel.tp)
    table = (rows // parallel.tp, hidden)
    specs = []
    if stage == 0:
        specs.append(_half(f"{trtllm.EMBEDDING.name}.weight", table))
    for layer in range(config.num_layers // parallel.pp):
        prefix = f"transformer.layers.{layer}"
        for norm in trtllm.NORMS.values():
            specs.append(_half(f"{prefix}.{norm.name}.weight", (hidden,)))
        for name, (rows, columns) in _shares(config, parallel).items():
            full = f"{prefix}.{name}"
            if group_size is None:
                specs.append(_half(f"{full}.weight", (rows, columns)))
            else:
                specs += [
                    TensorSpec(f"{full}.{part}", shape, dtypes)
                    for part, shape, dtypes in W4A16_AWQ.tensor_specs(rows, columns, group_size)
                ]
            if name == trtllm.JOINED_QKV.name and config.family.qkv_bias:
                specs.append(_half(f"{full}.bias", (rows,)))
    if stage == parallel.pp - 1:
        specs.append(_half(f"{trtllm.FINAL_NORM.name}.weight", (hidden,)))
        specs.append(_half(f"{trtllm.HEAD.name}.weight", table))
    return specs


def _half(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, ("F16",))
