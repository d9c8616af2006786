"""The model, its tokenizer, and the folder in which both are released."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vila_deploy.model.projector import Projector
from vila_deploy.processing.chat_template import (
    IMAGE_MARKER,
    PROMPT_TEMPLATES,
    render,
    with_markers,
)
from vila_deploy.utils.files import sha256_file

IMAGE_SIZE = 72
VOCABULARY = 576
MAX_LENGTH = 2048
IMAGE_SLOT = -200
PAD, BOS, EOS = 0, 1, 2
TEMPLATE = PROMPT_TEMPLATES["vicuna_v1"]

VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "vision_use_head": False,
}
TOKENS_PER_IMAGE = math.ceil(VISION["image_size"] / VISION["patch_size"] / 2) ** 2
LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    # The usual 0.02 is for widths of thousands; here it would leave attention flat for long.
    "initializer_range": 128**-0.5,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


class TinyVila(nn.Module):
    """SigLIP tower, projector and Llama; the tower's last layer is there but not used."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
        self.mm_projector = Projector(VISION["hidden_size"], LLM["hidden_size"], order="column")
        self.llm = LlamaForCausalLM(LlamaConfig(**LLM))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[images, 3, size, size] → [images, tokens, hidden], from the last layer but one."""
        hidden = self.vision_tower.embeddings(pixels)
        for layer in self.vision_tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return self.mm_projector(hidden)

    def embed(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Token embeddings, with the rows of `features` in place of IMAGE_SLOT, in order."""
        embeds = self.llm.model.embed_tokens(tokens.clamp(min=0))
        return embeds.masked_scatter((tokens == IMAGE_SLOT)[..., None], features)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], prompt: str, max_new_tokens: int = 96) -> str:
        """Greedy answer to one question."""
        ids = tokenize(self.tokenizer, render(TEMPLATE, [], with_markers(prompt, len(images))))
        features = torch.zeros(0, LLM["hidden_size"])
        if images:
            pixels = torch.from_numpy(np.stack([preprocess(image) for image in images]))
            features = self.encode_images(pixels)
        embeds = self.embed(torch.tensor([ids]), features)
        cache, answer = None, []
        for _ in range(max_new_tokens):
            out = self.llm(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token == EOS:
                break
            answer.append(token)
            embeds = self.llm.model.embed_tokens(torch.tensor([[token]]))
        return self.tokenizer.decode(answer).strip()


def preprocess(image: Image.Image) -> np.ndarray:
    """`resize` mode: a square by bicubic interpolation, then -1..1; float32 [3, size, size]."""
    resized = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.float32) / 255
    return ((pixels - 0.5) / 0.5).transpose(2, 0, 1)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE: any text can be encoded, the words of `texts` in few tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [
        AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered prompt, its pieces between images apart, slots for each image."""
    ids = [BOS]
    for i, piece in enumerate(text.split(IMAGE_MARKER)):
        ids += [IMAGE_SLOT] * (TOKENS_PER_IMAGE if i else 0)
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


def save(model: TinyVila, root: Path) -> None:
    """Writes the checkpoint: config.json and llm/, vision_tower/, mm_projector/ in fp16."""
    parts = {
        "llm": model.llm.state_dict(),
        "vision_tower": {
            f"vision_model.{name}": tensor
            for name, tensor in model.vision_tower.state_dict().items()
        },
        "mm_projector": {
            f"layers.{name}": tensor for name, tensor in model.mm_projector.state_dict().items()
        },
    }
    sums = []
    configs = _part_configs()
    for part, tensors in parts.items():
        (root / part).mkdir(parents=True, exist_ok=True)
        _write_json(root / part / "config.json", configs[part])
        file = root / part / "model.safetensors"
        half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(half, file, metadata={"format": "pt"})
        sums.append(f"{sha256_file(file)}  {part}/model.safetensors\n")
    (root / "SHA256SUMS").write_text("".join(sums))
    _write_json(root / "config.json", _root_config(configs))
    _write_json(
        root / "llm" / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False},
    )
    _write_json(root / "vision_tower" / "preprocessor_config.json", _preprocessor_config())
    _save_tokenizer(model.tokenizer, root / "llm")


def load(root: Path) -> TinyVila:
    """The model that `save` wrote, computing in fp32."""
    model = TinyVila(Tokenizer.from_file(str(root / "llm" / "tokenizer.json")))
    for part, module, prefix in (
        ("llm", model.llm, ""),
        ("vision_tower", model.vision_tower, "vision_model."),
        ("mm_projector", model.mm_projector, "layers."),
    ):
        tensors = load_file(root / part / "model.safetensors")
        module.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors.items()})
    return model.eval()


def _part_configs() -> dict[str, dict]:
    return {
        "llm": {
            **LLM,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 10000.0,
            "model_max_length": MAX_LENGTH,
            "tokenizer_model_max_length": MAX_LENGTH,
            "tokenizer_padding_side": "right",
            "torch_dtype": "float16",
        },
        "vision_tower": {
            **VISION,
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "num_channels": 3,
            "torch_dtype": "float16",
        },
        "mm_projector": {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": "mlp_downsample",
            "torch_dtype": "float16",
        },
    }


def _root_config(parts: dict[str, dict]) -> dict:
    return {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        **{f"{part}_cfg": {**cfg, "_name_or_path": f"./{part}"} for part, cfg in parts.items()},
        "hidden_size": LLM["hidden_size"],
        "mm_hidden_size": VISION["hidden_size"],
        "image_aspect_ratio": "resize",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "s2": False,
        "num_video_frames": 8,
        "interpolate_mode": "linear",
        "vision_resolution": -1,
        "model_dtype": "torch.float16",
    }


def _preprocessor_config() -> dict:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", {**settings, **names})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
