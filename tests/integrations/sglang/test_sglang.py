"""SGLang's server starts from our folder as it is, and computes what our reference computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sglang", reason="needs SGLang: make test-integrations")

from tests.support.sglang_cases import LITE, S2, make_nvila
from tests.support.sglang_server import ask, image_part, reference, sglang_server
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.runtime.prompt import Message
from vila_deploy.writers.convert import convert

CASES = {"lite": LITE, "s2": S2}
# Log-probabilities: float16 in SGLang, float32 in our reference.
TOLERANCE = 0.005
QUESTION = "What is it?"
# Sizes of images, columns and rows of tiles. NVILA-Lite: 1, 2, 6 and 7+1 tiles, two images of one
# tile each, none. Dynamic S2: 9 tiles at the last scale behind 1 and 4, about a minute on a CPU.
QUESTIONS: list[tuple[str, list[tuple[int, int]]]] = [
    ("lite", [(1, 1)]),
    ("lite", [(2, 1)]),
    ("lite", [(3, 2)]),
    ("lite", [(1, 7)]),
    ("lite", [(1, 1), (2, 1)]),
    ("lite", []),
    ("s2", [(1, 1)]),
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_nvila(path / "three", **CASES[request.param])
    convert(path / "three", path / "one", ["sglang"])
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The address of a server of the folder."""
    options = ("--model-path", str(folder / "one"), "--trust-remote-code")
    with sglang_server(folder / "log", *options) as address:
        yield address


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("folder", "shapes"), QUESTIONS, indirect=["folder"], scope="module")
def test_log_probabilities(folder: Path, url: str, shapes: list[tuple[int, int]]) -> None:
    tile = open_checkpoint(folder / "three").config.tiling.tile
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 255, (h * tile, w * tile, 3), dtype=np.uint8))
        for w, h in shapes
    ]
    expected, expected_length = reference(folder / "three", [Message("user", (*images, QUESTION))])
    content = [*map(image_part, images), {"type": "text", "text": QUESTION}]
    found, length = ask(url, [{"role": "user", "content": content}])
    assert length == expected_length
    assert np.abs(expected - found).max() < TOLERANCE
