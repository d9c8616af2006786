"""Write the one-folder layout that SGLang's NVILA and VILA classes read, as AWQ GEMM.

Source: load_weights in python/sglang/srt/models/{nvila,nvila_lite,vila}.py of sgl-project/sglang,
and layers/quantization/awq.py there. All tensors lie in one set of shards: `llm.` before the names
of llm/, `vision_tower.` and `mm_projector.` before those of the other parts. A name without a
parameter in the classes ends the server, so what nothing uses is left out. Their LLM is always
Qwen2, their tower SigLIP without the pooling head, and one projector type belongs to each class.
"""

from __future__ import annotations

import re
import shutil
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
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json
from vila_deploy.writers.folder import (
    ShardWriter,
    Writer,
    copy_llm_files,
    packed,
    quantized_config,
)

NOT_LOADED = re.compile(r"vision_model\.(head\.|embeddings\.position_ids)")
# VILA's loader adds a sentinel to the tokenizer before these two.
IMAGE_TOKEN, VIDEO_TOKEN, ADDED_BEFORE = "<image>", "<vila/video>", 1
PUBLISHED = ("processor_config.json", "chat_template.json")
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
    if config.token_order != "row":
        raise _unfit("image tokens column by column", "row by row only")
    for name, row in ONE_FOLDERS.items():
        mode, scales = row.fixed["image_aspect_ratio"], row.fixed.get("s2_scales")
        joined = ",".join(map(str, config.tiling.scales)) if scales else None
        if (
            set(row.projectors) & set(names)
            and row.channels in (None, config.feature_channels)
            and (config.tiling.mode, joined) == (mode, scales)
        ):
            return name
    raise _unfit(
        f"{config.tiling.mode} tiles of {config.feature_channels} channels for this projector",
        "; ".join(
            f"{row.fixed['image_aspect_ratio']} of {row.channels or 'any'} for {row.projector}"
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
        self._copy_published()
        write_checksums(self._folder, self._shards.digests)

    def _copy_published(self) -> None:
        """Copy the code and settings of a checkpoint in this layout, which SGLang needs."""
        layout = self._checkpoint.layout
        if layout.prefixes is not BY_PART:
            return
        for file in sorted(layout.root.iterdir()):
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
        projector = layout.projector.values["mm_projector_type"]
        return {
            **root,
            "architectures": [name],
            "model_type": ONE_FOLDERS[name].model_type,
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
        """Return the ids of the image and video tokens that VILA's loader adds to the tokenizer."""
        tokenizer = load_tokenizer(self._checkpoint.layout.folder("llm"))
        after = tokenizer.vocab_size + ADDED_BEFORE
        image, video = (tokenizer.token_id(token) for token in (IMAGE_TOKEN, VIDEO_TOKEN))
        return {
            "image_token_id": after if image is None else image,
            "video_token_id": after + 1 if video is None else video,
        }


def _unfit(found: str, classes: str) -> VilaDeployError:
    return VilaDeployError(f"SGLang's classes have {classes}, found {found}", fix=FIX)
