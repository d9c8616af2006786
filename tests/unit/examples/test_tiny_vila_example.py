"""tiny-vila: its images, its questions and the committed checkpoint."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.support.paths import TINY_VILA as CHECKPOINT
from tiny_vila import model, packing, questions, scoring
from tiny_vila import scenes as drawing
from vila_deploy.checkpoint.config import load_config
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "llm" / "tokenizer.json"))


def test_sets_are_deterministic():
    first, again = questions.held_out(16), questions.held_out(16)
    assert first == again
    for one, other in zip(first, again, strict=True):
        for image, same in zip(one.images, other.images, strict=True):
            assert image.tobytes() == same.tobytes()


def test_sets_share_no_picture():
    held_out = {scene for q in questions.held_out(500) for scene in q.scenes}
    calibration = {scene for q in questions.calibration(200) for scene in q.scenes}
    rng = np.random.default_rng([questions.TRAINING, 1, 0])
    training = {drawing.random_scene(rng) for _ in range(2000)}
    assert len(held_out) == sum(len(q.scenes) for q in questions.held_out(500))
    assert not held_out & calibration
    assert not (held_out | calibration) & training


def test_kinds_are_even_and_images_fit_the_prompt():
    asked = questions.held_out(60)
    assert all(sum(q.kind == kind for q in asked) == 10 for kind in questions.SCORED)
    for question in asked:
        assert len(question.images) == questions.IMAGES[question.kind]
        assert question.prompt.count("<image>") in (0, len(question.images))


def shown(image, shape: drawing.Shape) -> np.ndarray:
    """The pixel in the middle of a shape, found from the image alone."""
    row, column = divmod(drawing.PLACES.index(shape.place), 3)
    x = int((column + 0.5 + shape.offset[0]) * image.width / 3)
    y = int((row + 0.5 + shape.offset[1]) * image.height / 3)
    return np.asarray(image, int)[y, x]


def test_shapes_are_drawn_where_and_as_the_scene_says():
    names = list(drawing.COLOURS)
    palette = np.array([drawing.COLOURS[name] for name in names])
    for question in questions.held_out(24):
        for scene, image in zip(question.scenes, question.images, strict=True):
            for shape in scene.shapes:
                distance = np.abs(palette - shown(image, shape)).sum(1)
                assert names[distance.argmin()] == shape.colour


def test_answers_follow_from_the_scene():
    """Answers found again by counting and looking up, with none of the makers' helpers."""
    checked = 0
    kinds = ("in-context count", "place", "presence", "shape", "count")
    for q in questions.held_out(400, kinds):
        shapes = q.scenes[-1].shapes
        words = q.prompt.replace("?", "").replace(":", "").split()
        if q.kind == "in-context count":
            kind = words[-1].removesuffix("s")
            assert q.answer == str([s.kind for s in shapes].count(kind))
        elif q.kind == "place":
            fits = [s for s in shapes if s.kind in words or s.colour in words]
            if "shape" not in words and any(colour in words for colour in drawing.COLOURS):
                fits = [s for s in shapes if s.kind in words and s.colour in words]
            assert [s.place for s in fits] == [q.answer]
        elif q.kind == "presence":
            pairs = {(s.colour, s.kind) for s in shapes}
            assert q.answer == ("yes" if tuple(words[-2:]) in pairs else "no")
        elif q.kind == "shape":
            assert q.answer in {s.kind for s in shapes}
        else:
            continue
        checked += 1
    assert checked == 320


def test_description_names_every_shape_in_reading_order():
    for q in questions.held_out(20, ["description"]):
        positions = [
            q.answer.lower().index(f"{s.colour} {s.kind} {questions.where(s.place)}")
            for s in q.scenes[0].shapes
        ]
        assert positions == sorted(positions)


def test_branch_is_what_the_question_would_be_alone(tokenizer):
    rng = np.random.default_rng(5)
    scenes = (drawing.random_scene(rng),)
    pairs = questions_of(scenes, rng)
    packed = packing.pack(tokenizer, packing.Packed(scenes), pairs)
    for branch, (prompt, answer) in enumerate(pairs, 1):
        kept = [i for i, b in enumerate(packed.branches) if b in (0, branch)]
        system = PROMPT_TEMPLATES["vicuna_v1"].system
        text = f"{system}USER: <image>\n{prompt} ASSISTANT: {answer}</s>"
        alone = model.tokenize(tokenizer, text)
        assert [packed.tokens[i] for i in kept] == alone
        assert [packed.positions[i] for i in kept] == list(range(len(alone)))
        learnt = [packed.targets[i] for i in kept if packed.targets[i] != packing.IGNORED]
        assert tokenizer.decode(learnt, skip_special_tokens=False) == f" {answer}</s>"


def questions_of(scenes, rng):
    return packing.questions_about(scenes, rng)[:4]


def test_mask_hides_other_branches(tokenizer):
    rng = np.random.default_rng(6)
    scenes = (drawing.random_scene(rng),)
    packed = packing.pack(tokenizer, packing.Packed(scenes), questions_of(scenes, rng))
    mask = packing.collate([packed]).mask[0, 0]
    for row in range(len(packed.tokens)):
        for column in range(len(packed.tokens)):
            same = packed.branches[column] in (0, packed.branches[row])
            assert mask[row, column] == (same and column <= row)


def test_score_counts_exact_answers():
    asked = questions.held_out(8)
    answers = iter(q.answer if i else "nonsense" for i, q in enumerate(asked))
    wrong = []
    result = scoring.score(
        lambda images, prompt: next(answers), asked, lambda q, a: wrong.append(a)
    )
    assert result.accuracy == 7 / 8
    assert wrong == ["nonsense"]


def test_checkpoint_is_a_vila_of_at_most_10_mb():
    config = load_config(CHECKPOINT)
    assert config.token_order == "column"
    assert config.tokens_per_block == model.TOKENS_PER_IMAGE
    assert config.vision.grid % 2 == 1, "the padding of odd grids should be exercised"
    assert config.vision_layers_used == config.vision.num_layers - 1
    assert config.llm.hidden_size % 128 == 0
    assert config.llm.intermediate_size % 128 == 0
    assert config.llm.eos_token_ids == (model.EOS,)
    assert sum(f.stat().st_size for f in CHECKPOINT.rglob("*") if f.is_file()) <= 10_000_000


def test_checkpoint_is_the_released_one():
    lines = (CHECKPOINT / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {str(f.relative_to(CHECKPOINT)): f for f in CHECKPOINT.rglob("*.safetensors")}
    assert listed == {n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items()}
    for file in files.values():
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("text", ["naïve café ☕ 日本", "</s> in the middle\n\n\ttabs", ""])
def test_tokenizer_takes_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert model.PAD not in ids


def test_answers_like_it_was_trained_to():
    tiny = model.load(CHECKPOINT)
    result = scoring.score(tiny.answer, questions.held_out(40))
    assert result.accuracy >= 0.95, result.table()
