"""The Python API: the same answers as vila-chat, whatever kind of image it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import assert_one_line, invoke, succeed
from tests.support.tiny import make_checkpoint
from vila_deploy import Conversation, SamplingParams, build_engine, open_engine, quantize
from vila_deploy.backends import base
from vila_deploy.runtime import open_engine as opening
from vila_deploy.utils.errors import VilaDeployError

QUESTION = "What is it?"
SAMPLING = SamplingParams(max_new_tokens=16)


def noise(width: int = 60, height: int = 40) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def rotated(folder: Path) -> Path:
    """A photo of a camera that was turned: stored on its side, orientation in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(folder / "phone.jpg", exif=exif, quality=95)
    return folder / "phone.jpg"


def saved(name: str, mode: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        image = noise().convert(mode)
        if mode.endswith("A"):
            image.putalpha(noise().convert("L"))
        image.save(folder / name)
        return folder / name

    return save


IMAGES: dict[str, Callable[[Path], Path]] = {
    "EXIF": rotated,
    "CMYK": saved("cmyk.jpg", "CMYK"),
    "RGBA": saved("rgba.png", "RGBA"),
    "LA": saved("la.png", "LA"),
    "P": saved("p.png", "P"),
    "L": saved("l.png", "L"),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the two functions."""
    folder = tmp_path_factory.mktemp("api")
    root = make_checkpoint(folder / "c")
    report = quantize(str(root), folder / "q", algorithm="rtn", group_size=64, symmetric=True)
    assert (report["algorithm"], report["group_size"]) == ("rtn", 64)
    manifest = build_engine(folder / "q", str(folder / "e"), "cpu", max_seq_len=256)
    assert (manifest.precision, manifest.limits.max_seq_len) == ("int4", 256)
    return folder / "e"


@pytest.mark.parametrize("kind", IMAGES)
def test_answers_are_the_commands(engine: Path, tmp_path: Path, kind: str) -> None:
    """An image given as a path, as text, or opened with Pillow."""
    path = IMAGES[kind](tmp_path)
    flags = ["--image", path, "-p", QUESTION, "--max-new-tokens", 16, "--json"]
    expected = json.loads(succeed("vila-chat", engine, *flags))
    with open_engine(str(engine)) as opened:
        for image in (path, str(path), Image.open(path)):
            answer = opened.chat().ask(QUESTION, images=[image], sampling=SAMPLING)
            assert (answer.text, answer.tokens) == (expected["text"], expected["tokens"])
        upright = opened.chat().ask(QUESTION, images=path, sampling=SAMPLING)
        assert upright.tokens == expected["tokens"], "one image needs no list"


def test_an_orientation_changes_the_answer(engine: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    with open_engine(engine) as opened:
        image = Image.open(rotated(tmp_path))
        sideways = Image.fromarray(np.asarray(image))
        answers = [opened.chat().ask(QUESTION, [i], SAMPLING).tokens for i in (image, sideways)]
    assert answers[0] != answers[1]


def test_16_bits_are_refused_alike(engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "gray16.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(path)
    message = assert_one_line(invoke("vila-chat", engine, "--image", path, "-p", QUESTION))
    assert "8 bits a channel are needed" in message
    with open_engine(engine) as opened:
        for image in (path, Image.open(path)):
            with pytest.raises(VilaDeployError) as raised:
                opened.chat().ask(QUESTION, [image])
            assert message == f"error: {raised.value}"


def test_bad_images_are_one_line(engine: Path, tmp_path: Path) -> None:
    saved("cut.png", "RGB")(tmp_path)
    cut = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    with open_engine(engine) as opened:
        with pytest.raises(VilaDeployError, match=r"cut\.png: image cannot be read"):
            opened.chat().ask(QUESTION, [Image.open(tmp_path / "cut.png")])
        with pytest.raises(VilaDeployError, match=r"no\.png: no such image"):
            opened.chat().ask(QUESTION, ["no.png"])
        with pytest.raises(VilaDeployError, match="can't be a ndarray; give a path"):
            opened.chat().ask(QUESTION, [np.zeros((4, 4, 3), np.uint8)])  # type: ignore[list-item]


def test_turns_and_streaming_text(engine: Path) -> None:
    pieces: list[str] = []
    with open_engine(engine) as opened:
        chat = opened.chat()
        assert isinstance(chat, Conversation)
        first = chat.ask(QUESTION, [noise()], SAMPLING, on_text=pieces.append)
        assert "".join(pieces).strip() == first.text
        # Another conversation between two turns changes neither.
        other = opened.chat().ask(QUESTION, [noise()], SAMPLING)
        assert other.tokens == first.tokens
        second = chat.ask("And now?", sampling=SAMPLING)
        assert second.prompt_tokens > first.prompt_tokens
        assert len(chat.turns) == 2


def test_it_is_closed_with_and_without_a_block(engine: Path) -> None:
    with open_engine(engine) as opened:
        session = opened.session
    with pytest.raises(AttributeError):
        session.embed_tokens([3])
    opened = open_engine(engine)
    assert opened.chat().ask("Hi", sampling=SAMPLING).tokens
    opened.close()
    with pytest.raises(AttributeError):
        opened.session.embed_tokens([3])


def test_a_cpu_engine_answers_without_torch(engine: Path) -> None:
    code = (
        "import sys; from vila_deploy import SamplingParams, open_engine\n"
        f"with open_engine({str(engine)!r}) as opened:\n"
        "    assert opened.chat().ask('Hi', sampling=SamplingParams(4)).tokens\n"
        "assert 'onnxruntime' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_options_are_one_line(engine: Path, tmp_path: Path) -> None:
    root, out = engine.parent / "c", tmp_path / "out"
    with pytest.raises(VilaDeployError, match="--algorithm 'gptq' is unknown; give one of awq-"):
        quantize(root, out, algorithm="gptq")
    with pytest.raises(VilaDeployError, match="--format 'zip' is unknown"):
        quantize(root, out, format=["awq", "zip"])
    with pytest.raises(VilaDeployError, match="--calib and --calib-images are of no use"):
        quantize(root, out, algorithm="rtn", calib="texts")
    with pytest.raises(VilaDeployError, match="toaster"):
        build_engine(root, out, "toaster")
    for option in ("precision", "vision", "lm_head", "kv_cache"):
        with pytest.raises(VilaDeployError, match=f"--{option.replace('_', '-')} 'int3' is unkno"):
            build_engine(root, out, "cpu", **{option: "int3"})
    for option in ("max_batch_size", "max_seq_len", "max_input_len", "tp", "pp"):
        with pytest.raises(VilaDeployError, match=f"--{option.replace('_', '-')} is -1"):
            build_engine(root, out, "cpu", **{option: -1})
    assert not out.exists()


def test_slots_that_fit(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(engine) as opened:
        each = opened.cache_bytes_per_slot
    files = sum(path.stat().st_size for path in engine.rglob("*") if path.is_file())
    for free, expected in ((0, 1), (3.5, 3), (8.5, 8), (100, 8)):
        room = int((files + free * each) / opening.SLOTS_SHARE)
        monkeypatch.setattr(base, "available_memory_bytes", lambda room=room: room)
        assert opening.slots_that_fit(engine) == expected
