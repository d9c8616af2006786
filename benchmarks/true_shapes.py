"""A checkpoint of a released model's true shapes with random weights, and the memory that it takes.

$ python benchmarks/true_shapes.py VILA1.5-3b /tmp/vila-3b          # writes it, 6.3 GB
$ python benchmarks/true_shapes.py VILA1.5-3b /tmp/vila-3b --run    # quantizes, builds, asks

With --run it prints one JSON line for each command: seconds and largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vila_deploy.bench.conditions import commit, device_name, versions
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.checkpoint.tensor_schema import (
    TensorSpec,
    llm_tensor_specs,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.checkpoint.variants import (
    LLM_FAMILIES,
    PROJECTOR_TYPES,
    TOWER_FAMILIES,
)
from vila_deploy.model.random_weights import RandomWeights
from vila_deploy.writers.folder import ShardWriter

TINY_LLM = Path(__file__).resolve().parents[1] / "examples" / "tiny-vila" / "checkpoint" / "llm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEXT = "A fox walks along the river and looks at the water before it goes back into the wood.\n\n"


def write_checkpoint(root: Path, config: VilaConfig) -> None:
    """Write a checkpoint shard by shard, with the memory of one shard."""
    parts: dict[str, Iterator[TensorSpec]] = {
        "llm": llm_tensor_specs(config.llm),
        "vision_tower": tower_tensor_specs(config),
        "mm_projector": projector_tensor_specs(config),
    }
    for part, expected in parts.items():
        (root / part).mkdir(parents=True)
        tensors = list(expected)
        source, writer = RandomWeights(tensors), ShardWriter(root / part)
        for tensor in tensors:
            writer.add(tensor.name, source.tensor(tensor.name))
        writer.finish()
    for name, values in config_files(config).items():
        (root / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_LLM / name, root / "llm" / name)


def config_files(config: VilaConfig) -> dict[str, dict[str, Any]]:
    """Return the config files of a VILA layout that say what `config` says, by path."""
    llm, vision, tiling, image = config.llm, config.vision, config.tiling, config.image
    root: dict[str, Any] = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "hidden_size": llm.hidden_size,
        "mm_hidden_size": config.feature_channels,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": config.select_feature,
        "image_aspect_ratio": image.mode if tiling.mode in ("single", "s2") else tiling.mode,
        "s2": tiling.mode == "s2",
        "dynamic_s2": tiling.mode == "dynamic_s2",
    }
    if tiling.uses_s2:
        root["s2_scales"] = ",".join(map(str, tiling.scales))
        root["s2_max_split_size"] = tiling.tile
        root["s2_resize_output_to_scale_idx"] = tiling.output_scale
    root["num_video_frames"] = config.video.num_frames
    if config.video.pools:
        pools = [list(pool) for pool in config.video.pools]
        root["video_encoder"] = {"_target_": "TSPVideoEncoder", "pool_sizes": pools}
    return {
        "config.json": root,
        "llm/config.json": {
            "architectures": [_key(LLM_FAMILIES, llm.family)],
            "hidden_size": llm.hidden_size,
            "num_hidden_layers": llm.num_layers,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_kv_heads,
            "intermediate_size": llm.intermediate_size,
            "vocab_size": llm.vocab_size,
            "rope_theta": llm.rope_theta,
            "rope_scaling": _rope_scaling(llm.rope_factor),
            "rms_norm_eps": llm.rms_norm_eps,
            "max_position_embeddings": llm.max_position_embeddings,
            "model_max_length": config.model_max_length,
            "tie_word_embeddings": llm.tie_word_embeddings,
            "bos_token_id": llm.bos_token_id,
            "eos_token_id": list(llm.eos_token_ids),
        },
        "vision_tower/config.json": {
            "model_type": _key(TOWER_FAMILIES, vision.family),
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        "vision_tower/preprocessor_config.json": {
            "size": {"height": image.size, "width": image.size}
        },
        "mm_projector/config.json": {"mm_projector_type": _key(PROJECTOR_TYPES, config.projector)},
    }


def _rope_scaling(factor: float) -> dict[str, Any] | None:
    return None if factor == 1.0 else {"type": "linear", "factor": factor}


def _key(table: dict[str, Any], row: Any) -> str:
    """The first name of a row; 2x2_fix is mlp_downsample with another order of tokens."""
    return next(name for name, value in table.items() if value == row)


def run(root: Path, model: str) -> None:
    """Quantize with AWQ on a few sentences and an image, build for the CPU and ask."""
    work = root.with_name(f"{root.name}-run")
    if work.exists():
        sys.exit(f"{work} is there already; remove it first")
    (work / "images").mkdir(parents=True)
    (work / "texts.txt").write_text(TEXT * 2, "utf-8")
    image = work / "images" / "gradient.png"
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(image)
    data = ["--calib", work / "texts.txt", "--calib-images", work / "images"]
    for command in (
        ["vila-quantize", root, "-o", work / "awq", *data],
        ["vila-build-engine", work / "awq", "--target", "cpu", "-o", work / "engine"],
        ["vila-chat", work / "engine", "--image", image, "-p", "What?", "--max-new-tokens", "8"],
    ):
        name, *arguments = map(str, command)
        start = time.monotonic()
        child = subprocess.Popen(
            [Path(sys.executable).parent / name, *arguments], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
        row = {"command": name, "seconds": round(seconds, 1)}
        row |= {"peak_memory_bytes": usage.ru_maxrss * 1024, "label": "measured"}
        row |= {"model": model, "weights": "random", "device": device_name()}
        row |= {"versions": versions(), "commit": commit()}
        print(json.dumps(row), flush=True)
        if status:
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="store_true", help="use it, and measure memory")
    options = parser.parse_args()
    if not options.folder.exists():
        write_checkpoint(options.folder, preset(options.model, "fp16"))
    if options.run:
        run(options.folder, options.model)


if __name__ == "__main__":
    main()
