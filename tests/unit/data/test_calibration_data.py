"""Calibration data: the built-in set, the user's own, and hostile files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.data.drawn_scenes import SCENES
from vila_deploy.data.examples import (
    Example,
    LazyImage,
    builtin_image_examples,
    builtin_text_examples,
    load_examples,
)
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import preprocess
from vila_deploy.quantize.calibrate import calibrate
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("made") / "tiny"))


def test_builtin_set_has_texts_conversations_and_images():
    texts, images = builtin_text_examples(), builtin_image_examples()
    assert sum(len(e.text) for e in texts) > 14_000
    assert sum(e.answer is not None for e in texts) > 20
    assert len({e.images[0].name for e in images}) == len(SCENES) == 8
    images = [np.asarray(scene.image()) for scene in SCENES]
    assert all(
        np.array_equal(a, np.asarray(s.image())) for a, s in zip(images, SCENES, strict=True)
    )
    for i, image in enumerate(images):
        assert all(np.abs(image.astype(int) - other).mean() > 20 for other in images[:i])


def test_images_are_spliced_as_the_model_does(checkpoint):
    scene = SCENES[0]
    example = Example("a <image> or <image> b", "yes", (LazyImage("s", scene.image),) * 2)
    embeds = calibrate(checkpoint, [example], seed=0).embeds[0]
    session = ReferenceSession(checkpoint)
    config = checkpoint.config
    (pixels,) = preprocess([scene.image()], config.image, config.tiling)
    feature = session.encode_images(pixels.tiles)[0]
    rows = len(feature)
    found = [
        start
        for start in range(len(embeds) - rows + 1)
        if np.allclose(embeds[start : start + rows], feature, atol=1e-6)
    ]
    assert len(found) == 2
    table = checkpoint.llm.tensor("model.embed_tokens.weight").float()
    text = torch.cat(
        [embeds[: found[0]], embeds[found[0] + rows : found[1]], embeds[found[1] + rows :]]
    )
    ids = [int((table - row).abs().sum(1).argmin()) for row in text]
    assert torch.equal(table[ids], text)
    assert ids[0] == 1
    assert ids.count(1) == 1  # one BOS


def test_texts_are_cut_into_blocks_and_counted(checkpoint):
    result = calibrate(checkpoint, builtin_text_examples() + builtin_image_examples(), seed=0)
    lengths = [len(e) for e in result.embeds]
    assert max(lengths) <= 512
    assert lengths.count(512) >= result.text_sequences - 1 > 10
    assert result.image_sequences == sum(len(scene.conversations) for scene in SCENES)
    assert result.image_tokens == result.image_sequences * 4
    assert result.tokens == sum(lengths)


def test_budget_and_seed(checkpoint):
    examples = [Example(f"{i} " * 300) for i in range(400)]
    first, again = (calibrate(checkpoint, examples, seed=0) for _ in range(2))
    other = calibrate(checkpoint, examples, seed=1)
    assert len(first.embeds) == 128
    assert first.tokens == 128 * 512
    assert first.sha256 == again.sha256 != other.sha256
    assert all(torch.equal(a, b) for a, b in zip(first.embeds, again.embeds, strict=True))


def test_own_data_replaces_the_builtin_of_its_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n\r\nthree", "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "q", "answer": "a"}\n\n', "utf-8")
    own = load_examples(tmp_path, None)
    assert [e.text for e in own if not e.images] == ["one", "two", "three", "q"]
    assert sum(bool(e.images) for e in own) == len(builtin_image_examples())
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    with_images = load_examples(None, tmp_path)
    assert [e.images[0].name for e in with_images if e.images] == [str(tmp_path / "p.png")]
    assert sum(not e.images for e in with_images) == len(builtin_text_examples())
    (tmp_path / "c.jsonl").write_text('{"text": "what?", "image": "p.png"}', "utf-8")
    asked = load_examples(tmp_path / "c.jsonl", None)[0]
    assert (asked.text, asked.images[0].load().size) == ("what?", (4, 4))


def test_what_other_systems_add_is_no_data(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\n \t\r\ntwo\n\n\nthree")
    (tmp_path / "w.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "four"}')
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    (tmp_path / "._p.png").write_bytes(b"\0\5\x16\7")
    own = load_examples(tmp_path, tmp_path)
    assert [e.text for e in own if not e.images] == ["four", "one", "two", "three"]
    assert [p.name for e in own for p in e.images] == [str(tmp_path / "p.png")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n \n", "holds no text"),
        ("latin.txt", b"caf\xe9", r"is not UTF-8 \(byte 3\)"),
        ("binary.jsonl", b"\x00\xff", "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops}', "line 2: is not valid JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: is not valid JSON"),
        ("list.jsonl", b"[1]", "must be an object with a string `text`"),
        ("number.jsonl", b'{"text": 3}', "must be an object with a string `text`"),
        ("key.jsonl", b'{"text": "a", "img": "b"}', "unknown key 'img'"),
        ("image.jsonl", b'{"text": "a", "image": 3}', "image must be a path"),
        ("nul.jsonl", b'{"text": "a", "image": "\\u0000"}', "image must be a path"),
        ("answer.jsonl", b'{"text": "a", "answer": []}', "answer must be a string"),
        ("marker.jsonl", b'{"text": "<image>"}', "1 <image> markers for 0 images"),
        ("inside.jsonl", b'{"text": "a", "answer": "<image>"}', "<image> markers for 0"),
    ],
)
def test_refuses_damaged_texts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VilaDeployError, match=message) as error:
        load_examples(tmp_path / name, None)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_other_paths(tmp_path):
    with pytest.raises(VilaDeployError, match="no such file"):
        load_examples(tmp_path / "none.txt", None)
    with pytest.raises(VilaDeployError, match=r"holds no file of texts \(.txt, .jsonl, .json\)"):
        load_examples(tmp_path, None)
    with pytest.raises(VilaDeployError, match="is no regular file"):
        load_examples(Path("/dev/zero"), None)
    with pytest.raises(VilaDeployError, match="no such folder"):
        load_examples(None, tmp_path / "none")
    (tmp_path / "list.jsonl").write_text('{"text": "a"}', "utf-8")
    with pytest.raises(VilaDeployError, match=r"list.jsonl: is a file, no folder.*goes to --calib"):
        load_examples(None, tmp_path / "list.jsonl")
    (tmp_path / "list.jsonl").unlink()
    with pytest.raises(VilaDeployError, match="holds no image"):
        load_examples(None, tmp_path)


def test_half_surrogates_become_question_marks(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": "a\\ud800b"}', "utf-8")
    assert load_examples(tmp_path / "s.jsonl", None)[0].text == "a?b"


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n\0\0"])
def test_refuses_what_is_no_image(checkpoint, tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(VilaDeployError, match=r"x.png: .*image"):
        calibrate(checkpoint, load_examples(None, tmp_path), seed=0)


def test_refuses_a_tokenizer_of_another_model(checkpoint, monkeypatch):
    monkeypatch.setattr(
        type(checkpoint.llm), "tensor", lambda self, name: torch.zeros(3, 128, dtype=torch.float16)
    )
    with pytest.raises(VilaDeployError, match="outside the embedding of 3 rows"):
        calibrate(checkpoint, [Example("some longer text")], seed=0)
