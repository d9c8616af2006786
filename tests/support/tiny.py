"""Very small random checkpoints in the three-folder VILA1.5 layout, made in milliseconds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny_tables import (
    NIBBLE_ORDER,
    PREPROCESSORS,
    PROJECTORS,
    TOWERS,
)
from tests.support.tiny_tokenizer import write_tokenizer


@dataclass(frozen=True)
class Tiny:
    """Sizes and variants of a made checkpoint; `*_config` entries override the written JSON keys.

    A value of None in those mappings removes the key. `tower` is siglip, clip or internvit; the
    projector takes the features of `scales` scales. `quantized` writes llm/ as AutoAWQ-GEMM;
    `added_tokens` come behind the tokenizer's others.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 256
    vocab: int = 384
    max_length: int = 512
    vision_hidden: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    vision_intermediate: int = 128
    patch: int = 14
    image: int = 42
    qwen2: bool = False
    tower: str = "siglip"
    scales: int = 1
    projector: str = "mlp_downsample"
    added_tokens: tuple[str, ...] = ()
    tied: bool = False
    unused_tower: bool = True
    shards: int = 1
    dtype: torch.dtype = torch.float16
    quantized: bool = False
    group_size: int = 64
    checksums: bool = False
    seed: int = 0
    root_config: Mapping[str, Any] = field(default_factory=dict)
    llm_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor_config: Mapping[str, Any] = field(default_factory=dict)
    projector_config: Mapping[str, Any] = field(default_factory=dict)


def make_checkpoint(root: Path, **overrides: Any) -> Path:
    """Writes a checkpoint at `root` (created) and returns it; `overrides` are fields of Tiny."""
    tiny = Tiny(**overrides)
    generator = torch.Generator().manual_seed(tiny.seed)
    llm = llm_tensors(tiny, generator)
    if tiny.quantized:
        llm = quantize_llm(llm, tiny.group_size)
    for part, tensors, shards in (
        ("llm", llm, tiny.shards),
        ("vision_tower", tower_tensors(tiny, generator), 1),
        ("mm_projector", projector_tensors(tiny, generator), 1),
    ):
        (root / part).mkdir(parents=True)
        write_weights(root / part, tensors, shards)
    for name, values, changes in config_files(tiny):
        merged = {k: v for k, v in {**values, **changes}.items() if v is not None}
        (root / name).write_text(json.dumps(merged, indent=2), "utf-8")
    write_tokenizer(root / "llm", tiny.vocab, tiny.max_length, tiny.added_tokens)
    if tiny.checksums:
        write_checksums(root)
    return root


def flatten(root: Path, tower: str) -> Path:
    """Turns a checkpoint of three folders into the first generation's one, which names `tower`."""
    prefixes = {
        "llm": ("", ""),
        "vision_tower": ("", "model.vision_tower.vision_tower."),
        "mm_projector": ("layers.", "model.mm_projector."),
    }
    tensors: dict[str, Tensor] = {}
    for part, (old, new) in prefixes.items():
        for file in (root / part).glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                tensors[new + name.removeprefix(old)] = tensor
    config = json.loads((root / "llm" / "config.json").read_text("utf-8"))
    config |= json.loads((root / "config.json").read_text("utf-8"))
    config["architectures"] = ["LlavaLlamaForCausalLM"]
    config["mm_vision_tower"] = tower
    projector = json.loads((root / "mm_projector" / "config.json").read_text("utf-8"))
    config["mm_projector_type"] = projector["mm_projector_type"]
    for file in (root / "llm").glob("*.json"):
        file.rename(root / file.name)
    (root / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    for part in prefixes:
        shutil.rmtree(root / part)
    write_weights(root, tensors, shards=2)
    return root


def llm_tensors(tiny: Tiny, generator: torch.Generator) -> dict[str, Tensor]:
    head_dim = tiny.hidden // tiny.heads
    tensors = {"model.embed_tokens.weight": _matrix(tiny.vocab, tiny.hidden, generator)}
    for index in range(tiny.layers):
        prefix = f"model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", tiny.heads * head_dim, tiny.hidden),
            ("self_attn.k_proj", tiny.kv_heads * head_dim, tiny.hidden),
            ("self_attn.v_proj", tiny.kv_heads * head_dim, tiny.hidden),
            ("self_attn.o_proj", tiny.hidden, tiny.heads * head_dim),
            ("mlp.gate_proj", tiny.intermediate, tiny.hidden),
            ("mlp.up_proj", tiny.intermediate, tiny.hidden),
            ("mlp.down_proj", tiny.hidden, tiny.intermediate),
        ):
            tensors[f"{prefix}.{name}.weight"] = _matrix(rows, columns, generator)
            if tiny.qwen2 and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}.{name}.bias"] = torch.randn(rows, generator=generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = _near(1.0, tiny.hidden, generator)
    tensors["model.norm.weight"] = _near(1.0, tiny.hidden, generator)
    if not tiny.tied:
        tensors["lm_head.weight"] = _matrix(tiny.vocab, tiny.hidden, generator)
    return {name: tensor.to(tiny.dtype) for name, tensor in tensors.items()}


def tower_tensors(tiny: Tiny, generator: torch.Generator) -> dict[str, Tensor]:
    width, inner = tiny.vision_hidden, tiny.vision_intermediate
    tensors: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = _matrix(rows, columns, generator)
        tensors[f"{name}.bias"] = _near(0.0, rows, generator)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = _near(1.0, width, generator)
        tensors[f"{name}.bias"] = _near(0.0, width, generator)

    if tiny.tower == "internvit":
        return internvit_tensors(tiny, generator)
    clip = tiny.tower == "clip"
    embeddings = "vision_model.embeddings"
    linear(f"{embeddings}.patch_embedding", width, 3 * tiny.patch**2)
    patches = tensors[f"{embeddings}.patch_embedding.weight"]
    tensors[f"{embeddings}.patch_embedding.weight"] = patches.unflatten(
        1, (3, tiny.patch, tiny.patch)
    )
    positions = (tiny.image // tiny.patch) ** 2 + clip
    tensors[f"{embeddings}.position_embedding.weight"] = _matrix(positions, width, generator)
    if clip:
        del tensors[f"{embeddings}.patch_embedding.bias"]
        tensors[f"{embeddings}.class_embedding"] = _near(0.0, width, generator)
        norm("vision_model.pre_layrnorm")
    for index in range(tiny.vision_layers):
        prefix = f"vision_model.encoder.layers.{index}"
        norm(f"{prefix}.layer_norm1")
        norm(f"{prefix}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}.self_attn.{name}", width, width)
        linear(f"{prefix}.mlp.fc1", inner, width)
        linear(f"{prefix}.mlp.fc2", width, inner)
    if tiny.unused_tower:
        norm("vision_model.post_layernorm")
    if tiny.unused_tower and not clip:
        head = "vision_model.head"
        tensors[f"{head}.probe"] = _near(0.0, width, generator).view(1, 1, width)
        tensors[f"{head}.attention.in_proj_weight"] = _matrix(3 * width, width, generator)
        tensors[f"{head}.attention.in_proj_bias"] = _near(0.0, 3 * width, generator)
        linear(f"{head}.attention.out_proj", width, width)
        norm(f"{head}.layernorm")
        linear(f"{head}.mlp.fc1", inner, width)
        linear(f"{head}.mlp.fc2", width, inner)
    return {name: tensor.to(tiny.dtype) for name, tensor in tensors.items()}


def internvit_tensors(tiny: Tiny, generator: torch.Generator) -> dict[str, Tensor]:
    """With normed queries and keys, no bias on them, and layer scales away from 1."""
    width, inner, patch = tiny.vision_hidden, tiny.vision_intermediate, tiny.patch
    positions = (tiny.image // patch) ** 2 + 1
    tensors = {
        "embeddings.class_embedding": _near(0.0, width, generator).view(1, 1, width),
        "embeddings.position_embedding": _matrix(positions, width, generator)[None],
        "embeddings.patch_embedding.weight": _matrix(width, 3 * patch**2, generator).unflatten(
            1, (3, patch, patch)
        ),
        "embeddings.patch_embedding.bias": _near(0.0, width, generator),
    }
    for index in range(tiny.vision_layers):
        prefix = f"encoder.layers.{index}"
        for name in ("norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight"):
            tensors[f"{prefix}.{name}"] = _near(1.0, width, generator)
        tensors[f"{prefix}.ls1"] = _near(0.3, width, generator)
        tensors[f"{prefix}.ls2"] = _near(0.3, width, generator)
        tensors[f"{prefix}.attn.qkv.weight"] = _matrix(3 * width, width, generator)
        for name, rows, columns in (
            ("attn.proj", width, width), ("mlp.fc1", inner, width), ("mlp.fc2", width, inner),
        ):  # fmt: skip
            tensors[f"{prefix}.{name}.weight"] = _matrix(rows, columns, generator)
            tensors[f"{prefix}.{name}.bias"] = _near(0.0, rows, generator)
    return {name: tensor.to(tiny.dtype) for name, tensor in tensors.items()}


def projector_tensors(tiny: Tiny, generator: torch.Generator) -> dict[str, Tensor]:
    channels = tiny.vision_hidden * tiny.scales
    sizes = {f"{n}c": n * channels for n in (3, 4, 9)}
    sizes |= {"c": channels, "h": tiny.hidden}
    tensors: dict[str, Tensor] = {}
    for name, *dims in PROJECTORS[tiny.projector]:
        rows, *columns = (sizes[dim] for dim in dims)
        weight = _matrix(rows, *columns, generator) if columns else _near(1.0, rows, generator)
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.bias"] = _near(0.0, rows, generator)
    return {name: tensor.to(tiny.dtype) for name, tensor in tensors.items()}


def quantize_llm(tensors: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """Rounds every decoder linear to 4 bits and packs it as AutoAWQ-GEMM; for tests only."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            packed[name] = tensor
            continue
        groups = tensor.float().unflatten(1, (-1, group_size))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-5).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        q = (groups / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
        prefix = name.removesuffix(".weight")
        packed[f"{prefix}.qweight"] = pack_words(q.clamp(0, 15).flatten(1).T)
        packed[f"{prefix}.qzeros"] = pack_words(zero.T)
        packed[f"{prefix}.scales"] = scale.T.contiguous()
    return packed


def pack_words(values: Tensor) -> Tensor:
    """[rows, out] of 0..15 → int32 [rows, out/8] in AutoAWQ's nibble order."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(NIBBLE_ORDER):
        words |= values[:, column::8].long() << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """One model.safetensors, or `shards` files with an index."""
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        own = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def write_checksums(root: Path) -> None:
    """SHA256SUMS over every *.safetensors, as `sha256sum` writes it."""
    files = sorted(root.rglob("*.safetensors"))
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(root).as_posix()}\n"
        for file in files
    ]
    (root / "SHA256SUMS").write_text("".join(lines), "utf-8")


def llm_config(tiny: Tiny) -> dict[str, Any]:
    llm = {
        "architectures": ["Qwen2ForCausalLM" if tiny.qwen2 else "LlamaForCausalLM"],
        "model_type": "qwen2" if tiny.qwen2 else "llama",
        "hidden_size": tiny.hidden,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "intermediate_size": tiny.intermediate,
        "vocab_size": tiny.vocab,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": tiny.max_length,
        "model_max_length": tiny.max_length,
        "tie_word_embeddings": tiny.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(tiny.dtype).removeprefix("torch."),
    }
    if tiny.quantized:
        llm["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": tiny.group_size,
            "zero_point": True,
            "version": "gemm",
        }
    return llm


def config_files(tiny: Tiny) -> list[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    """(path, content, changes) of every JSON file that is no tokenizer's."""
    root = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "hidden_size": tiny.hidden,
        "mm_hidden_size": tiny.vision_hidden * tiny.scales,
        "image_aspect_ratio": "resize",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "s2": False,
        "resume_path": "./vlm",
    }
    vision = {
        "hidden_size": tiny.vision_hidden,
        "num_hidden_layers": tiny.vision_layers,
        "num_attention_heads": tiny.vision_heads,
        "intermediate_size": tiny.vision_intermediate,
        "patch_size": tiny.patch,
        "image_size": tiny.image,
        "num_channels": 3,
        **TOWERS[tiny.tower],
    }
    preprocessor = PREPROCESSORS[tiny.tower](tiny.image)
    if tiny.tower != "siglip":
        root["mm_vision_select_feature"] = "patch"
    projector = {"model_type": "v2l_projector", "mm_projector_type": tiny.projector}
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return [
        ("config.json", root, tiny.root_config),
        ("llm/config.json", llm_config(tiny), tiny.llm_config),
        ("llm/generation_config.json", generation, {}),
        ("vision_tower/config.json", vision, tiny.vision_config),
        ("vision_tower/preprocessor_config.json", preprocessor, tiny.preprocessor_config),
        ("mm_projector/config.json", projector, tiny.projector_config),
    ]


def _matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Unit gain, so that activations and logits keep a spread that a test can see."""
    return torch.randn(rows, columns, generator=generator) / columns**0.5


def _near(value: float, count: int, generator: torch.Generator) -> Tensor:
    return value + 0.05 * torch.randn(count, generator=generator)
