"""TensorRT-LLM checkpoints: config.json, quant_cfg.json and a safetensors file for each GPU.

Of `tp` · `pp` ranks, rank p · tp + t holds share t of the layers of stage p. Tensor parallelism
splits q, k and v apart and then joins each rank's shares, gives ranks that are more than the
key/value heads a copy of the one they need, and pads the vocabulary to whole shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vila_deploy import __version__
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.formats import trtllm
from vila_deploy.utils.errors import VilaDeployError

CONFIG, QUANT_CONFIG = "config.json", "quant_cfg.json"
VOCABULARY_MULTIPLE = 64  # of a checkpoint with 4-bit linears
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DECODERS = {"llama": "llama", "qwen2": "qwen"}
# safetensors' names, and bytes of an element.
DTYPES = {torch.float16: ("F16", 2), torch.float32: ("F32", 4), torch.int8: ("I8", 1)}
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Parallel:
    """How many GPUs share each layer (`tp`), and how many stages the layers are cut into (`pp`)."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def share(self, rank: int) -> int:
        return rank % self.tp


ONE_GPU = Parallel()


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def check_llm(config: LlmConfig, group_size: int | None, parallel: Parallel = ONE_GPU) -> None:
    """Raises VilaDeployError, before any work, for what TensorRT-LLM can't hold or split so.

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
    """config.json as Model Optimizer writes it, with what TensorRT-LLM adds for Qwen2."""
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
    if family == "qwen2":
        values["qwen_type"] = "qwen2"
    return values


def layer_quantization(group_size: int | None) -> dict[str, Any] | None:
    """quant_cfg.json as Model Optimizer writes it: where not all linears are quantized alike."""
    if group_size is not None:
        return None
    return {"quant_algo": None, "kv_cache_quant_algo": None, "quantized_layers": {}}


def padded_vocabulary(config: LlmConfig, group_size: int | None, parallel: Parallel) -> int:
    """The vocabulary that TensorRT-LLM sees: ids from here on are rows of the prompt table."""
    if group_size is None:
        return config.vocab_size
    return whole(config.vocab_size, math.lcm(VOCABULARY_MULTIPLE, parallel.tp))


def whole(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def _shares(config: LlmConfig, parallel: Parallel) -> dict[str, tuple[int, int]]:
    """(out, in) of a rank's share of each linear, by TensorRT-LLM's name within a layer."""
    sizes, tp = config.linears, parallel.tp
    joined = sum(qkv_rows(config, parallel))
    shares = {trtllm.JOINED.name: (joined, config.hidden_size)}
    for name, place in trtllm.LINEARS.items():
        rows, columns = sizes[name]
        split = place.split == "rows"
        shares[place.name] = (rows // tp, columns) if split else (rows, columns // tp)
    return shares


def qkv_rows(config: LlmConfig, parallel: Parallel) -> tuple[int, int, int]:
    """A rank's rows of q, k and v; it has at least one key/value head."""
    heads = config.num_heads // parallel.tp
    kv_heads = max(1, config.num_kv_heads // parallel.tp)
    return tuple(count * config.head_dim for count in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def rank_tensors(
    config: LlmConfig, group_size: int | None, parallel: Parallel, rank: int
) -> Shapes:
    """Name → dtype and shape of everything in a rank's file."""
    half, hidden, stage = torch.float16, config.hidden_size, parallel.stage(rank)
    rows = whole(padded_vocabulary(config, group_size, parallel), parallel.tp)
    table = (half, (rows // parallel.tp, hidden))
    tensors: Shapes = {}
    if stage == 0:
        tensors[f"{trtllm.EMBEDDING.name}.weight"] = table
    for layer in range(config.num_layers // parallel.pp):
        prefix = f"transformer.layers.{layer}"
        for norm in trtllm.NORMS.values():
            tensors[f"{prefix}.{norm.name}.weight"] = (half, (hidden,))
        for name, (rows, columns) in _shares(config, parallel).items():
            full = f"{prefix}.{name}"
            if group_size is None:
                tensors[f"{full}.weight"] = (half, (rows, columns))
            else:
                groups = (torch.float32, (rows, columns // group_size))
                tensors[f"{full}.weight"] = (torch.int8, (rows // trtllm.PER_BYTE, columns))
                tensors[f"{full}.weights_scaling_factor"] = groups
                tensors[f"{full}.prequant_scaling_factor"] = (half, (columns,))
            if name == trtllm.JOINED.name and config.family.qkv_bias:
                tensors[f"{full}.bias"] = (half, (rows,))
    if stage == parallel.pp - 1:
        tensors[f"{trtllm.FINAL_NORM.name}.weight"] = (half, (hidden,))
        tensors[f"{trtllm.HEAD.name}.weight"] = table
    return tensors
