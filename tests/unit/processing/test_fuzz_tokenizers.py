"""Damaged tokenizer and processor files: one line, or what transformers makes of the same files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tokenizer_damage import TEMPLATES, base, damage
from vila_deploy.checkpoint.config import load_config
from vila_deploy.processing.images import preprocess
from vila_deploy.processing.own_template import template_note
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.utils.errors import VilaDeployError

# As many as fit into make test; VILA_FUZZ_COUNT=300 is what a change of these files is tried with.
COUNT = int(os.environ.get("VILA_FUZZ_COUNT", "80"))
LIMIT_S = 10
# Without spaces at the start: transformers 5 drops them, sentencepiece, as VILA loads it, doesn't.
PROBES = (
    "USER: \nWhat is it? ASSISTANT: A cat.</s>USER: And now? ASSISTANT:",
    "go<|im_start|>user\nab end<|im_end|><|im_start|>assistant\nyes the",
    "a<s>the</s> the</s>  the<unk>the [PAD] <image>ab", "", "the  the ab", "THE The ｔｈｅ ﬁ é",
    "été 日本 😀", "1234 5,678.90 don't I'm C++ <br/>",
)  # fmt: skip
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {template: base(folder / template, template) for template in TEMPLATES}


def ours(root: Path) -> dict[str, Any]:
    config = load_config(root)
    check_vocabulary(root / "llm", config)
    tokenizer = load_tokenizer(root / "llm")
    template_note(root / "llm", config)
    ids = [tokenizer.encode(probe) for probe in PROBES]
    (pixels,) = preprocess([IMAGE], config.image, config.tiling)
    return {
        "ids": ids,
        "bos": tokenizer.bos_ids,
        "texts": [tokenizer.decode(each) for each in ids],
        "stops": config.llm.eos_token_ids,
        "pixels": pixels.tiles,
    }


def originals(root: Path) -> dict[str, Any]:
    """Return the same of transformers, without what it refuses."""
    found: dict[str, Any] = {}
    for part in (_original_tokens, _original_pixels, _original_stops):
        try:
            found |= part(root)
        except _OutOfTime:
            raise
        except Exception:
            continue
    return found


def _original_tokens(root: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    settings = (root / "llm" / "tokenizer_config.json").is_file()
    if not settings and (root / "llm" / "tokenizer.model").is_file():
        # VILA's transformers takes LlamaTokenizer then, a later one its own class without BOS.
        return {}
    tokenizer = AutoTokenizer.from_pretrained(root / "llm", use_fast=False, legacy=False)
    ids = [tokenizer(probe, add_special_tokens=False).input_ids for probe in PROBES]
    return {
        "ids": ids,
        "bos": tokenizer("").input_ids,
        "texts": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
    }


def _original_pixels(root: Path) -> dict[str, Any]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(root / "vision_tower", backend="pil")
    # llava/mm_utils.py, image_aspect_ratio "resize".
    size = getattr(processor, "crop_size", None) or processor.size
    image = IMAGE.resize((size["height"], size["width"]))
    return {"pixels": np.asarray(processor(image, return_tensors="np")["pixel_values"])}


def _original_stops(root: Path) -> dict[str, Any]:
    from transformers import GenerationConfig

    stops = GenerationConfig.from_pretrained(root / "llm").eos_token_id
    return {"stops": stops if isinstance(stops, list) else [stops]}


class _OutOfTime(BaseException):
    pass


def _within(seconds: int, work: Callable[[Path], Any], root: Path) -> Any:
    def stop(*_: object) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return work(root)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def differences(root: Path, result: dict[str, Any]) -> list[str]:
    """Return the parts in which `result` isn't transformers' own."""
    try:
        expected = _within(LIMIT_S, originals, root)
    except _OutOfTime:
        return []
    found = []
    if "ids" in expected:
        for key in ("ids", "texts"):
            pairs = zip(PROBES, expected[key], result[key], strict=True)
            found += [f"{key} of {p!r}: {a} but here {b}" for p, a, b in pairs if a != b][:1]
        if expected["bos"] != result["bos"]:
            found.append(f"bos: {expected['bos']} but here {result['bos']}")
    pixels = expected.get("pixels")
    if pixels is not None and (
        pixels.shape != result["pixels"].shape or np.abs(pixels - result["pixels"]).max() > 1e-5
    ):
        found.append(f"pixels {pixels.shape}")
    stops = {stop for stop in expected.get("stops", ()) if isinstance(stop, int)}
    vocabulary = load_config(root).llm.vocab_size
    if not {stop for stop in stops if 0 <= stop < vocabulary} <= set(result["stops"]):
        found.append(f"stops: {stops} but here {result['stops']}")
    return found


def case(seed: int, bases: dict[str, Path], root: Path) -> tuple[str, list[str], str | None]:
    """Return what seed's damage was, what is wrong with the outcome, and the line if it is one."""
    rng = random.Random(seed)
    template = rng.choice(TEMPLATES)
    shutil.copytree(bases[template], root)
    what = f"seed {seed}, {template}: {damage(root, rng)}"
    try:
        result = _within(LIMIT_S, ours, root)
    except VilaDeployError as error:
        line = str(error)
        plain = line.isprintable() and len(line) < 1000 and str(root) in line
        return what, [] if plain else [f"line {line[:1500]!r}"], line
    except _OutOfTime:
        return what, [f"takes more than {LIMIT_S} s"], None
    except Exception as error:
        return what, [f"{type(error).__name__}: {error}"], None
    return what, differences(root, result), None


def test_undamaged_files_equal_the_originals(bases: dict[str, Path]) -> None:
    for template in TEMPLATES:
        result = ours(bases[template])
        assert set(originals(bases[template])) == set(result), template
        assert differences(bases[template], result) == [], template


@pytest.mark.filterwarnings("ignore")
def test_damage_gives_one_line_or_the_originals_result(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    refused, wrong = 0, []
    for seed in range(COUNT):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what, problems, line = case(seed, bases, tmp_path / str(seed))
        refused += line is not None
        wrong += [f"{what}: {problem}" for problem in problems]
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    assert not wrong, "\n".join(text[:700] for text in wrong)
    assert COUNT / 10 < refused < COUNT * 0.9
