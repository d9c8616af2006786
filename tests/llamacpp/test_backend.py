"""Engines of backend llamacpp: their answers beside those of our CPU engines, plans beside logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.comparison import Prompt, greedy_tokens_of_both, noise
from tests.support.mixed_bits import make_mixed_checkpoint
from tests.support.paths import TINY_VILA
from tests.support.session_contract import check_session
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.llamacpp import attention, files
from vila_deploy.backends.llamacpp.decoder import DecoderOptions, LlamaDecoder, LlamaModel
from vila_deploy.backends.llamacpp.library import LOG
from vila_deploy.backends.llamacpp.memory import cache_bytes, scratch_bytes, shape_of
from vila_deploy.builder import build_engine
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.session import CopiesSlots, EncodesTiles
from vila_deploy.formats.gguf_file import read_header
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.video import VideoFrames
from vila_deploy.quantize import quantize_checkpoint
from vila_deploy.runtime.open_engine import open_engine

# Largest difference of logits as a share of their spread: llama.cpp's activations are int8 in
# blocks of 32, or float16 for unquantized weights.
TOLERANCE, FP16_TOLERANCE = 0.1, 0.01
# Of a near-tie: share of the standard deviation of a token's logits.
MARGIN = 0.1
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"quantized": True},
    "Llama 3": {"quantized": True, "kv_heads": 1, "vocab": 515},
    "Qwen2": {"quantized": True, "qwen2": True, "kv_heads": 2},
    "fp16": {},
}


def engine(root: Path, out: Path, **options: Any) -> Path:
    options = {"vision": "fp16", "lm_head": "fp16", "max_seq_len": 256, **options}
    build_engine(root, out, "cpu", backend="llamacpp", **options)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_the_contract_of_a_session(shape: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", **SHAPES[shape])
    reference = ReferenceSession(open_checkpoint(root))
    with open_engine(engine(root, tmp_path / "e"), slots=3) as opened:
        assert opened.session.slots == 3
        tolerance = FP16_TOLERANCE if shape == "fp16" else TOLERANCE
        check_session(opened.session, reference, tolerance)


IMAGES: dict[str, dict[str, Any]] = {
    "S2": {
        "image": 70,
        "scales": 2,
        "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
        "preprocessor_config": {"size": {"height": 140, "width": 140}},
    },
    "tiles": {
        "root_config": {
            "model_type": "vila", "image_aspect_ratio": "dynamic", "min_tiles": 2, "max_tiles": 6,
            "prompt_template": "vicuna_v1",
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("images", IMAGES)
def test_images_in_several_scales_and_tiles(images: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, **IMAGES[images])
    folder = engine(root, tmp_path / "e", max_seq_len=512)
    prompts = [([noise(1)], "What is this?"), ([noise(2), noise(3)], "And these?")]
    for expected, found in greedy_tokens_of_both(root, folder, prompts, tie=MARGIN):
        assert expected == found


VIDEOS: dict[str, dict[str, Any]] = {
    "frames": {},
    "frames averaged in fours": {
        "root_config": {
            "model_type": "vila", "num_video_frames": 8, "prompt_template": "vicuna_v1",
            "video_encoder": {
                "_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[4, 1, 1]],
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("video", VIDEOS)
def test_frames_of_a_video(video: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, **VIDEOS[video])
    folder = engine(root, tmp_path / "e", max_seq_len=512)
    frames = VideoFrames([noise(number) for number in range(8)])
    prompts: list[Prompt] = [([frames], "What happens?"), ([noise(9), frames], "Is it in both?")]
    for expected, found in greedy_tokens_of_both(root, folder, prompts, tie=MARGIN):
        assert expected == found


def test_an_int8_cache(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, hidden=128, heads=4)
    folder = engine(root, tmp_path / "e", kv_cache="int8")
    with open_engine(folder, slots=2) as opened:
        check_session(opened.session, ReferenceSession(open_checkpoint(root)), 2 * TOLERANCE)
    assert not (folder / "llm" / files.ATTENTION_CHOICE).exists(), "there is no choice"


@pytest.mark.parametrize("symmetric", [False, True])
def test_linears_in_4_5_and_8_bits(symmetric: bool, tmp_path: Path) -> None:
    root = make_mixed_checkpoint(tmp_path, "gguf", symmetric)
    folder = engine(root, tmp_path / "e")
    (file,) = (folder / "llm").glob("*.gguf")
    # On a processor linears with zero points are in Q5_0, as in other engines.
    types = ("Q4_0", "Q5_0", "Q8_0") if symmetric else ("Q5_0", "Q5_1", "Q8_0")
    assert {tensor.dtype for tensor in read_header(file).tensors.values()} > {*types}
    with open_engine(folder, slots=3) as opened:
        check_session(opened.session, ReferenceSession(open_checkpoint(root)), TOLERANCE)


def test_slots_are_independent_and_copied(tmp_path: Path) -> None:
    """Rows of a pass in any order, with idle slots between them."""
    root = make_checkpoint(tmp_path / "c", quantized=True)
    with open_engine(engine(root, tmp_path / "e"), slots=4) as opened:
        session = opened.session
        assert isinstance(session, CopiesSlots)
        assert isinstance(session, EncodesTiles)
        prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18]]
        alone = []
        for prompt in prompts:
            session.keep(0, 0)
            session.prefill(0, session.embed_tokens(prompt))
            alone.append(session.decode([0], [20])[0])
        for slot, prompt in enumerate(prompts):
            session.keep(slot, 0)
            session.prefill(slot, session.embed_tokens(prompt))
        found = session.decode([3, 0, 2], [20, 20, 20])
        for row, slot in zip(found, (3, 0, 2), strict=True):
            np.testing.assert_allclose(row, alone[slot], atol=1e-4)
        session.copy(3, 1, 5)
        assert [session.length(slot) for slot in range(4)] == [4, 5, 3, 6]
        session.keep(3, 0)
        np.testing.assert_allclose(session.decode([1], [20])[0], alone[3], atol=1e-4)


def test_attention_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = engine(make_checkpoint(tmp_path / "c", quantized=True), tmp_path / "e")
    measured = []
    seconds = attention._seconds
    monkeypatch.setattr(attention, "_seconds", lambda *a: measured.append(a[2]) or seconds(*a))
    for slots in (1, 1, 3, 1, 3):
        open_engine(folder, slots=slots).close()
    assert measured == [True, False] * 2, "once for each number of slots"
    (folder / "llm" / files.ATTENTION_CHOICE).write_text("[]")
    open_engine(folder).close()
    assert measured == [True, False] * 3, "a damaged choice is measured anew"


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("slots", "length"), [(1, 256), (3, 2000)])
def test_a_plan_says_what_the_log_says(
    tmp_path: Path, flash: bool, slots: int, length: int
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, heads=4)
    folder = engine(root, tmp_path / "e", max_seq_len=min(length, 256))
    model = LlamaModel(folder / "llm" / files.MODEL, options(slots, length))
    LOG.lines.clear()
    decoder = LlamaDecoder(model, options(slots, length), flash)
    decoder.decode([0], [5])
    config = open_checkpoint(root).config.llm
    cache = config.num_layers * slots * cache_bytes(shape_of(config), length, "fp16")
    assert logged("KV buffer size") == pytest.approx(cache, abs=1 << 14)
    planned = scratch_bytes(shape_of(config), length)
    found = logged("compute buffer size")
    # The plan takes the attention that needs more.
    assert found <= 1.05 * planned + (1 << 16)
    if not flash and length > 256:
        assert found >= 0.9 * planned
    decoder.close()
    model.close()


def options(slots: int, length: int) -> DecoderOptions:
    return DecoderOptions(slots, length, int8_cache=False, threads=1)


def logged(words: str) -> float:
    """Bytes of the last line of llama.cpp's log with these words."""
    line = [line for line in LOG.lines if words in line][-1]
    return float(line.split("=")[1].split("MiB")[0]) * (1 << 20)


def test_tokens_of_tiny_vila(tmp_path: Path) -> None:
    """The reference has the same weights; what int8 activations change is below the margin."""
    quantize_checkpoint(TINY_VILA, tmp_path / "q", algorithm="rtn", group_size=64)
    folder = engine(tmp_path / "q", tmp_path / "e", max_seq_len=1024)
    questions = ("Describe the image.", "Which colours do you see?")
    prompts = [
        ([noise(3 * index + each) for each in range(1 + index % 3)], questions[index % 2])
        for index in range(20)
    ]
    pairs = greedy_tokens_of_both(tmp_path / "q", folder, prompts, tie=MARGIN)
    different = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    assert different == []
