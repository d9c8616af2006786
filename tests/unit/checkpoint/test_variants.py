"""Every row of the variant tables, scaled down: checkpoint → 4 bits → CPU engine → same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import PROJECTORS, TOWERS, Tiny, make_checkpoint
from vila_deploy.bench.measure import measure
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.variants import (
    CONVERSATION_NAMES,
    GENERATIONS,
    IMAGE_MODES,
    LLM_FAMILIES,
    PROJECTOR_TYPES,
    PROMPT_CHOICES,
    PROMPT_NAMES,
    TOWER_FAMILIES,
)
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import OneSlot, Session
from vila_deploy.formats.base import QuantScheme
from vila_deploy.model.llm import load_decoder_layer, rotary, run_layer
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES
from vila_deploy.quantize.algorithms.awq_scales import (
    GROUPS,
    ScaleChoice,
    bias_of,
    fold_scales,
    has_group,
    weight_of,
)
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.pipeline import quantize
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
QWEN2: dict[str, Any] = {
    "qwen2": True,
    "added_tokens": CHATML,
    "llm_config": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False},
}
PAD, SQUARE = {"image_aspect_ratio": "pad"}, {"image_aspect_ratio": "square"}
S2: dict[str, Any] = {
    "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
    "preprocessor_config": {"size": {"height": 140, "width": 140}},
}
S2_LARGE = {**S2, "root_config": {**S2["root_config"], "s2_resize_output_to_scale_idx": -1}}
DYNAMIC_S2 = {
    "image_aspect_ratio": "dynamic_s2",
    "s2": False,
    "dynamic_s2": True,
    "s2_scales": "42,84,126",
    "s2_max_split_size": 42,
    "s2_resize_output_to_scale_idx": -1,
}
# Name → (fields of Tiny, prompt template).
LLM_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "Llama-2": ({}, "vicuna_v1"),
    "Llama-3": (
        {"kv_heads": 2, "added_tokens": LLAMA_3, "llm_config": {"rope_theta": 5e5}},
        "llama_3",
    ),
    "Yi": (
        {"kv_heads": 1, "added_tokens": CHATML, "llm_config": {"rope_theta": 5e6}},
        "hermes-2",
    ),
    "Qwen2": ({**QWEN2, "kv_heads": 2}, "qwen2"),
    "Qwen2, as many key heads": (QWEN2, "qwen2"),
    "Qwen2, tied, linear rope": (
        {
            **QWEN2,
            "kv_heads": 2,
            "tied": True,
            "llm_config": {
                **QWEN2["llm_config"],
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
        },
        "qwen2",
    ),
    "Qwen2, bfloat16": ({**QWEN2, "kv_heads": 2, "dtype": torch.bfloat16}, "qwen2"),
}
# An odd grid (5 × 5) wherever the projector pads.
VISION_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "CLIP": (
        {"tower": "clip", "projector": "mlp2x_gelu", "image": 70, "root_config": PAD},
        "vicuna_v1",
    ),
    "CLIP, processor": ({"tower": "clip", "image": 70, "root_config": SQUARE}, "vicuna_v1"),
    "InternViT": (
        {
            "tower": "internvit",
            "image": 70,
            "kv_heads": 2,
            "added_tokens": CHATML,
            "root_config": {"mm_vision_select_layer": -1},
        },
        "hermes-2",
    ),
    "static S2": ({"scales": 2, "image": 70, **S2}, "vicuna_v1"),
    "static S2, large output": ({"scales": 2, "image": 70, **S2_LARGE}, "vicuna_v1"),
    "dynamic S2": ({**QWEN2, "scales": 3, "root_config": DYNAMIC_S2}, "qwen2"),
    "dynamic S2, small output": (
        {**QWEN2, "scales": 3, "root_config": {**DYNAMIC_S2, "s2_resize_output_to_scale_idx": 1}},
        "qwen2",
    ),
    "dynamic": (
        {
            **QWEN2,
            "projector": "mlp_downsample_3x3_fix",
            "image": 70,
            "root_config": {"image_aspect_ratio": "dynamic", "max_tiles": 6},
        },
        "qwen2",
    ),
    "linear": ({"projector": "linear", "image": 70}, "vicuna_v1"),
    "mlp2x_gelu": ({"projector": "mlp2x_gelu", "image": 70}, "vicuna_v1"),
    "mlp_downsample_2x2_fix": (
        {**QWEN2, "projector": "mlp_downsample_2x2_fix", "image": 70},
        "qwen2",
    ),
    "mlp_downsample_3x3_fix": (
        {**QWEN2, "projector": "mlp_downsample_3x3_fix", "image": 70},
        "qwen2",
    ),
}
SAMPLING = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.txt").write_text("the king saw the red house on the hill.\n\n" * 8, "utf-8")
    return folder


def image(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8))


def answers(session: Session, opened: Any) -> list[list[int]]:
    """Greedy tokens of questions about two images, then none; and about one, then another."""
    chat = Conversation(session, opened.tokenizer, opened.model, opened.max_input_len)
    questions = [[image(1), image(2)], [], [image(3)], [image(4)]]
    found = []
    for index, images in enumerate(questions):
        if index == 2:
            chat.reset()
        found.append(chat.ask("What is it?", images, SAMPLING).tokens)
    return found


# The vision encoder is the same in every precision; the evaluation goes through it too.
@pytest.mark.parametrize(
    ("row", "precision"),
    [
        *((row, precision) for row in LLM_ROWS for precision in ("fp16", "rtn", "awq")),
        *((row, "rtn") for row in VISION_ROWS),
    ],
)
def test_engine_answers_as_the_reference(
    row: str, precision: str, texts: Path, tmp_path: Path
) -> None:
    fields, template = (LLM_ROWS | VISION_ROWS)[row]
    root = make_checkpoint(tmp_path / "c", max_length=1024, **fields)
    if precision != "fp16":
        calib = texts if precision == "awq" else None
        evaluate = precision == "awq" or row in VISION_ROWS
        scheme = QuantScheme(64)
        quantize(root, tmp_path / "q", QuantizeOptions(scheme, precision, calib, evaluate=evaluate))
        root = tmp_path / "q"
    # One int8 term and an int8 head round what the reference doesn't.
    activations = None if precision == "fp16" else "int8x2"
    options = BuildOptions("cpu", module_precision=ALL_FP16, activations=activations)
    build_engine(root, tmp_path / "e", options)
    with open_engine(tmp_path / "e") as opened:
        assert opened.model.prompt == template
        expected = answers(OneSlot(ReferenceSession(open_checkpoint(root))), opened)
        assert len(expected[0]) > 5
        assert answers(opened.session, opened) == expected


@pytest.mark.parametrize("row", ["dynamic", "dynamic S2", "static S2", "InternViT"])
def test_bench_measures_it(row: str, tmp_path: Path) -> None:
    fields, _ = (LLM_ROWS | VISION_ROWS)[row]
    root = make_checkpoint(tmp_path / "c", max_length=1024, **fields)
    manifest = build_engine(root, tmp_path / "e", BuildOptions("cpu"))
    measured = measure(tmp_path / "e")
    assert measured["decode_tokens_per_s"] > 0
    tiles = {"dynamic": 7, "dynamic S2": 12}.get(row, 1)
    assert measured["prompt_tokens"] > tiles * manifest.model.tokens_per_block


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_folding_scales_keeps_what_a_layer_with_biases_computes(
    kv_heads: int, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", **{**QWEN2, "kv_heads": kv_heads}))
    config = checkpoint.config.llm
    layer = load_decoder_layer(config, checkpoint.llm, 0)
    hidden = torch.randn(1, 20, 128)
    cos, sin = rotary(config, torch.arange(20))
    before = run_layer(layer, hidden, cos, sin)
    bias = bias_of(layer, "self_attn.v_proj")
    assert bias is not None
    old_bias, folded = bias.clone(), 0
    for group in GROUPS:
        if has_group(layer, group):
            width = weight_of(layer, group.linears[0]).shape[1]
            fold_scales(layer, ScaleChoice(group, 0.5, torch.rand(width) + 0.5, ()))
            folded += 1
    assert folded == (4 if kv_heads == 4 else 3)
    assert torch.equal(bias, old_bias) == (kv_heads != 4)
    torch.testing.assert_close(run_layer(layer, hidden, cos, sin), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("command", ["quantize", "build"])
def test_the_prompt_template_can_be_given(command: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", added_tokens=LLAMA_3)
    named = "llama_3_original"
    if command == "quantize":
        options = QuantizeOptions(QuantScheme(64), "rtn", prompt_template=named)
        quantize(root, tmp_path / "q", options)
        manifest = build_engine(tmp_path / "q", tmp_path / "e", BuildOptions("cpu"))
    else:
        options = BuildOptions("cpu", prompt_template=named)
        manifest = build_engine(root, tmp_path / "e", options)
    assert manifest.model.prompt == named


@pytest.mark.parametrize("algorithm", ["rtn", "awq"])
def test_biases_stay_as_they_are(algorithm: str, texts: Path, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", **{**QWEN2, "kv_heads": 2})
    calib = texts if algorithm == "awq" else None
    quantize(root, tmp_path / "q", QuantizeOptions(QuantScheme(64), algorithm, calib))
    before, after = open_checkpoint(root).llm, open_checkpoint(tmp_path / "q").llm
    biases = [name for name in before.names() if name.endswith(".bias")]
    assert len(biases) == 2 * 3
    for name in biases:
        assert after.dtype(name) == torch.float16
        assert torch.equal(after.tensor(name), before.tensor(name))


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    options = BuildOptions("cpu", prompt_template="vicuna_v0")
    for job in (
        lambda: build_engine(root, tmp_path / "e", options),
        lambda: plan_build(resolve_build(root, options, planning=True)),
        lambda: quantize(root, tmp_path / "q", QuantizeOptions(prompt_template="vicuna_v0")),
    ):
        with pytest.raises(VilaDeployError, match=r"'vicuna_v0'; choose from vicuna_v1, llama_3"):
            job()


def test_every_row_of_the_tables_is_tested() -> None:
    assert set(PROJECTORS) == set(PROJECTOR_TYPES)
    families = {family.name for family in LLM_FAMILIES.values()}
    assert families == {choice.family for choice in PROMPT_CHOICES}
    assert {choice.template for choice in PROMPT_CHOICES} == {row[1] for row in LLM_ROWS.values()}
    assert set(GENERATIONS) == {family.generation for family in LLM_FAMILIES.values()}
    assert set(CONVERSATION_NAMES.values()) <= {None, *PROMPT_NAMES}
    assert set(PROMPT_TEMPLATES) == set(PROMPT_NAMES)
    fields = [Tiny(**row) for row, _ in (*LLM_ROWS.values(), *VISION_ROWS.values())]
    assert {row.projector for row in fields} == set(PROJECTOR_TYPES)
    towers = {TOWERS[row.tower]["model_type"] for row in fields}
    assert towers == set(TOWER_FAMILIES)
    modes = {row.root_config.get("image_aspect_ratio", "resize") for row in fields}
    assert modes == set(IMAGE_MODES)
    assert any(row.root_config.get("s2") for row in fields)
