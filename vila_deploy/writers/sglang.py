"""Write the one-folder layout that SGLang's classes for NVILA read, as AWQ GEMM.

Source: load_weights in python/sglang/srt/models/{nvila,nvila_lite}.py of sgl-project/sglang,
layers/quantization/awq.py and multimodal/processors/nvila.py there. All tensors lie in one set of
shards: `llm.` before the names of llm/, `vision_tower.` and `mm_projector.` before those of the
other parts. A name without a parameter in the classes ends the server, so what nothing uses is left
out. Their LLM is always Qwen2, their tower SigLIP without the pooling head, and one projector type
belongs to each class. Config class, processor and chat template, which SGLang does not have, lie
beside them.
"""

from __future__ import annotations

import re
import shutil
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.folder_layout import BY_PART, PARTS
from vila_deploy.checkpoint.variants import ONE_FOLDERS, PROJECTOR_TYPES
from vila_deploy.formats.base import Packing, QuantizedLinear, QuantScheme
from vila_deploy.formats.registry import Format
from vila_deploy.processing.chat_template import IMAGE_MARKER, PROMPT_TEMPLATES, choose_template
from vila_deploy.processing.jinja_template import VIDEO_MARKER, jinja_template_with_images
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json, read_json_object
from vila_deploy.writers.folder import (
    ShardWriter,
    Writer,
    copy_llm_files,
    packed,
    quantized_config,
)

NOT_LOADED = re.compile(r"vision_model\.(head\.|embeddings\.position_ids)")
CODE_PACKAGE = "vila_deploy.writers.sglang_code"
CONFIG_MODULE, PROCESSOR_MODULE, PROCESSOR = (
    "configuration_vila",
    "processing_vila",
    "NVILAProcessor",
)
# In this order transformers adds those that a tokenizer does not have.
EXTRA_TOKENS = {"image_token": IMAGE_MARKER, "video_token": VIDEO_MARKER}
CONFIG_CLASSES = {"nvila": "NVILAConfig", "nvila_lite": "NVILALiteConfig"}
PROCESSOR_FILE = "processor_config.json"
PUBLISHED = (PROCESSOR_FILE, "chat_template.json", "chat_template.jinja")
VILA_LAYOUT_KEYS = ("resume_path", "_name_or_path", *(f"{part}_cfg" for part in PARTS))
FIX = "serve it from another format with a tool that knows this model; docs/formats.md lists them"


def architecture(config: VilaConfig) -> str:
    """Return the key of ONE_FOLDERS whose class computes this model.

    Raises:
        VilaDeployError: none does; says which property the classes don't have.
    """
    if config.llm.family.name != "qwen2":
        raise _unfit(f"a {config.llm.family.name} LLM", "Qwen2 only")
    if config.vision.family.name != "siglip":
        raise _unfit(f"a {config.vision.family.name} tower", "SigLIP only")
    if (config.select_layer, config.select_feature) != (-2, "cls_patch"):
        found = f"features {config.select_feature} of layer {config.select_layer}"
        raise _unfit(found, "cls_patch of layer -2 only")
    names = [name for name, kind in PROJECTOR_TYPES.items() if kind == config.projector]
    types = {kind for row in ONE_FOLDERS.values() for kind in row.projectors}
    if not types.intersection(names):
        raise _unfit(f"projector {' or '.join(names)}", f"{', '.join(sorted(types))} only")
    if config.video.pools:
        raise _unfit("TSPVideoEncoder, whose frames share tokens", "frames as images only")
    if (config.image.mode, config.image.size) != ("resize", config.tiling.tile):
        raise _unfit(f"images that are {config.image.mode}ped", "images resized to a tile only")
    if config.token_order != "row":
        raise _unfit("image tokens column by column", "row by row only")
    for name, row in ONE_FOLDERS.items():
        mode, scales = row.fixed["image_aspect_ratio"], row.fixed.get("s2_scales")
        joined = ",".join(map(str, config.tiling.scales)) if scales else None
        if (
            set(row.projectors) & set(names)
            and row.channels == config.feature_channels
            and (config.tiling.mode, joined) == (mode, scales)
        ):
            return name
    raise _unfit(
        f"{config.tiling.mode} tiles of {config.feature_channels} channels for this projector",
        "; ".join(
            f"{row.fixed['image_aspect_ratio']} of {row.channels} for {row.projector}"
            for row in ONE_FOLDERS.values()
        ),
    )


class SglangWriter(Writer):
    """One folder: shards, config.json, the tokenizer, preprocessor_config.json."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, row: Format, scheme: QuantScheme):
        super().__init__(checkpoint, folder, row, scheme)
        self._shards = ShardWriter(folder)
        readers = {"vision_tower": checkpoint.vision, "mm_projector": checkpoint.projector}
        for part, reader in readers.items():
            for name in reader.names():
                if not NOT_LOADED.match(name):
                    self._shards.add(f"{part}.{name}", reader.tensor(name))

    @classmethod
    def check(cls, packing: Packing, config: VilaConfig, scheme: QuantScheme) -> None:
        super().check(packing, config, scheme)
        architecture(config)

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        for full, tensor in packed(f"llm.{name}", value, self._packing).items():
            self._shards.add(full, tensor)

    def finish(self) -> None:
        self._shards.finish()
        copy_llm_files(self._checkpoint, self._folder)
        preprocessor = self._checkpoint.layout.preprocessor.values
        for name, values in (
            ("config.json", self._config()),
            ("preprocessor_config.json", preprocessor),
        ):
            (self._folder / name).write_text(canonical_json(values), "utf-8")
        if self._has_code:
            self._copy_code()
        else:
            self._write_code()
        write_checksums(self._folder, self._shards.digests)

    def _write_code(self) -> None:
        """Write config class, processor, its settings and the chat template."""
        for module in (CONFIG_MODULE, PROCESSOR_MODULE):
            code = resources.files(CODE_PACKAGE).joinpath(f"{module}.py").read_text("utf-8")
            (self._folder / f"{module}.py").write_text(code, "utf-8")
        config, tokenizer = self._checkpoint.config, self._tokenizer
        processor = {
            "processor_class": PROCESSOR,
            "auto_map": {"AutoProcessor": f"{PROCESSOR_MODULE}.{PROCESSOR}"},
            "settings": processor_settings(config, tokenizer),
        }
        (self._folder / PROCESSOR_FILE).write_text(canonical_json(processor), "utf-8")
        template = PROMPT_TEMPLATES[choose_template(config, tokenizer)]
        written = jinja_template_with_images(template)
        (self._folder / "chat_template.jinja").write_text(written, "utf-8")
        file = self._folder / "tokenizer_config.json"
        values = read_json_object(file) if file.exists() else {}
        values["extra_special_tokens"] = EXTRA_TOKENS
        file.write_text(canonical_json(values), "utf-8")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._checkpoint.layout.folder("llm"))

    @property
    def _has_code(self) -> bool:
        """Whether the checkpoint is in this layout already, with code of its own."""
        layout = self._checkpoint.layout
        return layout.prefixes is BY_PART and "auto_map" in layout.fields.values

    def _copy_code(self) -> None:
        for file in sorted(self._checkpoint.layout.root.iterdir()):
            if file.is_file() and (file.suffix == ".py" or file.name in PUBLISHED):
                shutil.copyfile(file, self._folder / file.name)

    def _config(self) -> dict[str, Any]:
        layout, config = self._checkpoint.layout, self._checkpoint.config
        name = architecture(config)
        quantization = self._packing.quantization_config(self._scheme)
        quantization["modules_to_not_convert"] = ["lm_head", "vision_tower", "mm_projector"]
        text = quantized_config(self._checkpoint, quantization)
        del text["quantization_config"]
        root = {k: v for k, v in layout.fields.values.items() if k not in VILA_LAYOUT_KEYS}
        if config.prompt_template is not None:
            root["prompt_template"] = config.prompt_template
        model_type = ONE_FOLDERS[name].model_type
        if not self._has_code:
            root["auto_map"] = {
                "AutoConfig": f"{CONFIG_MODULE}.{CONFIG_CLASSES[model_type]}",
                "AutoProcessor": f"{PROCESSOR_MODULE}.{PROCESSOR}",
            }
        projector = layout.projector.values["mm_projector_type"]
        return {
            **root,
            "architectures": [name],
            "model_type": model_type,
            "mm_projector_type": projector,
            "mm_hidden_size": config.feature_channels,
            "hidden_size": config.llm.hidden_size,
            "text_config": text,
            "vision_config": {**layout.vision.values, "vision_use_head": False},
            "quantization_config": quantization,
            "tie_word_embeddings": config.llm.tie_word_embeddings,
            "dtype": "float16",
            "torch_dtype": "float16",
            **self._token_ids(),
        }

    def _token_ids(self) -> dict[str, int]:
        """Return the ids that the image and video tokens have once transformers has added them."""
        tokenizer = self._tokenizer
        ids, following = {}, tokenizer.vocab_size
        for name, token in EXTRA_TOKENS.items():
            known = tokenizer.token_id(token)
            ids[f"{name}_id"] = following if known is None else known
            following += known is None
        return ids


def processor_settings(config: VilaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the processor needs to know of the model, as JSON."""
    tiling, image = config.tiling, config.image
    end = config.recipe.image_end
    return {
        "mode": tiling.mode,
        "tile": tiling.tile,
        "min_tiles": tiling.min_tiles,
        "max_tiles": tiling.max_tiles,
        "scales": list(tiling.scales),
        "rescale": image.rescale,
        "mean": list(image.mean),
        "std": list(image.std),
        "tokens_per_block": config.tokens_per_block,
        "first_ids": tokenizer.bos_ids,
        "image_end_ids": tokenizer.bos_ids + tokenizer.encode(end),
    }


def _unfit(found: str, classes: str) -> VilaDeployError:
    return VilaDeployError(f"SGLang's classes have {classes}, found {found}", fix=FIX)
