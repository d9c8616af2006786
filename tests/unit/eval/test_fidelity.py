"""The quantized model beside the original on held-out data, and what is said of it."""

import json
import math
import os

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.functional import cross_entropy, kl_div

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.cli.quantize import main
from vila_deploy.data import drawn_scenes, drawn_scenes_eval
from vila_deploy.data.examples import (
    Example,
    LazyImage,
    builtin_image_examples,
    builtin_text_examples,
    load_examples,
    load_held_out,
)
from vila_deploy.eval import fidelity as evaluating
from vila_deploy.eval.data import EvaluationData
from vila_deploy.eval.fidelity import evaluate
from vila_deploy.formats.base import QuantScheme
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import preprocess
from vila_deploy.processing.multimodal_prompt import text_chunks
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.quantize import pipeline
from vila_deploy.quantize.data_warnings import data_warnings
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.host_memory import PeakMemory, give_back, own_bytes

QUESTION, ANSWER = "What colour is it?", "Red, like the other one."
PLAIN = "the king saw the red house on the hill and went home again."
# vicuna_v1, written out: the template's own code is not asked.
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    f"helpful, detailed, and polite answers to the user's questions. USER: <image>\n{QUESTION} "
    "ASSISTANT:"
)
RTN = ["--algorithm", "rtn", "--group-size", "64"]


def red():
    return Image.new("RGB", (60, 40), "red")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def rounded(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounded") / "out"
    pipeline.quantize(root, out, QuantizeOptions(QuantScheme(64), "rtn"))
    return out


@pytest.fixture(scope="module")
def examples():
    image = LazyImage("red", red)
    return [Example(PLAIN), Example(QUESTION, ANSWER, (image,)), Example(PLAIN[4:])]


def reference_logits(root, ids, features):
    """Of the whole model at once; `features` take the places whose id is -1."""
    session = ReferenceSession(open_checkpoint(root))
    embeds = torch.from_numpy(session.embed_tokens([max(token, 0) for token in ids]))
    if features is not None:
        embeds[torch.tensor(ids) < 0] = features
    return session.llm(embeds)


def expected_quality(root, rounded, image):
    """Plain torch over full logits; positions counted by hand."""
    checkpoint = open_checkpoint(root)
    tokenizer = load_tokenizer(root / "llm")
    if image:
        first, last = text_chunks(tokenizer, f"{BEFORE} {ANSWER}</s>")
        asked = len(text_chunks(tokenizer, BEFORE)[1])
        (pixels,) = preprocess([red()], checkpoint.config.image, checkpoint.config.tiling)
        session = ReferenceSession(checkpoint)
        features = torch.from_numpy(session.encode_images(pixels.tiles)[0])
        ids, features = first + [-1] * len(features) + last, features
        start = len(ids) - (len(last) - asked)
    else:
        stream = [t for text in (PLAIN, PLAIN[4:]) for t in [1, *tokenizer.encode(text)]]
        ids, features, start = stream, None, 1
    exact, other = (reference_logits(each, ids, features) for each in (root, rounded))
    places = [i for i in range(start - 1, len(ids) - 1) if ids[i + 1] != 1]
    exact, other = exact[places], other[places]
    targets = torch.tensor([ids[i + 1] for i in places])
    kl = kl_div(other.log_softmax(1), exact.softmax(1), reduction="none").sum(1)
    return {
        "tokens": len(places),
        "perplexity_original": float(cross_entropy(exact, targets).exp()),
        "perplexity": float(cross_entropy(other, targets).exp()),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1_agreement": float((exact.argmax(1) == other.argmax(1)).float().mean()),
    }


def measured(root, other, examples):
    original = open_checkpoint(root)
    return evaluate(original, open_checkpoint(other), EvaluationData(original, examples))


def test_equals_the_whole_models_side_by_side(root, rounded, examples):
    quality = measured(root, rounded, examples).quality
    expected = {
        kind: expected_quality(root, rounded, kind == "image") for kind in ("text", "image")
    }
    for kind, values in expected.items():
        assert vars(quality[kind]) == pytest.approx(values, rel=1e-4, abs=1e-6)
    counts = [expected[kind]["tokens"] for kind in expected]
    assert quality["all"].tokens == sum(counts)
    kl = [expected[kind]["kl_mean"] for kind in expected]
    mean = sum(n * x for n, x in zip(counts, kl, strict=True)) / sum(counts)
    assert quality["all"].kl_mean == pytest.approx(mean, rel=1e-4)
    assert all(value > 1e-3 for value in kl)


def test_pieces_change_nothing(root, rounded, examples, monkeypatch):
    whole = measured(root, rounded, examples)
    for name, size in (("LAYER_TOKENS", 20), ("LOGIT_ROWS", 3), ("HEAD_ROWS", 50)):
        monkeypatch.setattr(evaluating, name, size)
    pieces = measured(root, rounded, examples)
    for kind, quality in whole.quality.items():
        assert vars(pieces.quality[kind]) == pytest.approx(vars(quality), rel=1e-4, abs=1e-6)
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        assert vars(b) == pytest.approx(vars(a), rel=1e-4)


def test_a_model_equals_itself(root, examples):
    result = measured(root, root, examples)
    for quality in result.quality.values():
        assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0, 0, 1)
        assert quality.perplexity == quality.perplexity_original
    assert all((e.text_error, e.image_error) == (0, 0) for e in result.layers)


def test_drift_is_told_by_modality(root, rounded, examples):
    both = measured(root, rounded, examples)
    assert [e.layer for e in both.layers] == [0, 1]
    assert (both.image_sequences, both.images, both.image_positions) == (1, 1, 4)
    assert both.layers[0].text_error != both.layers[0].image_error
    assert both.layers[0].text_error < both.layers[1].text_error < 0.5
    text = measured(root, rounded, examples[:1])
    assert text.quality["image"] is None
    assert text.layers[0].image_error is None
    assert text.quality["text"] == text.quality["all"]
    assert measured(root, rounded, examples) == both


def test_what_is_predicted(root):
    checkpoint = open_checkpoint(root)
    tokenizer = load_tokenizer(root / "llm")
    unanswered = Example("What is it?", None, (LazyImage("red", red),))
    data = EvaluationData(checkpoint, [unanswered, Example("2 + 2?", "4"), Example("one two")])
    texts = []
    for index, ids in enumerate(data.ids):
        chosen = data.predicted(index)
        assert not chosen[-1]
        texts.append(tokenizer.decode(ids[1:][chosen[:-1]].tolist()).strip())
    assert texts == ["What is it? ASSISTANT:", "4", "one two"]
    stop = data.ids[1][1:][data.predicted(1)[:-1]].tolist()[-1]
    assert stop == tokenizer.token_id("</s>"), "that an answer ends is predicted too"


def test_builtin_sets_are_disjoint():
    ours, theirs = load_held_out(None), builtin_text_examples() + builtin_image_examples()
    assert not {e.text for e in ours} & {e.text for e in theirs if not e.images}
    assert not {e.answer for e in ours if e.answer} & {e.answer for e in theirs if e.answer}
    sentences = {s for e in theirs for s in e.text.split(". ") if len(s) > 20}
    assert not [e for e in ours if e.is_plain and sentences & set(e.text.split(". "))]
    names = {scene.name for scene in drawn_scenes.SCENES}
    assert (
        len({s.name for s in drawn_scenes_eval.SCENES} - names)
        == len(drawn_scenes_eval.SCENES)
        == 8
    )
    old = [scene.image() for scene in drawn_scenes.SCENES]
    assert all(scene.image() not in old for scene in drawn_scenes_eval.SCENES)
    assert sum(e.is_plain for e in ours) > 12
    assert sum(bool(e.images) for e in ours) == 8


def test_a_budget_bounds_own_data(root):
    checkpoint = open_checkpoint(root)
    about = Example(QUESTION, ANSWER, (LazyImage("red", red),))
    many = [about] * 100 + [Example("word " * 200)] * 400
    data = EvaluationData(checkpoint, many)
    assert (len(data.sequences), data.image_sequences) == (64, 32)
    assert max(map(len, data.ids)) <= 512
    assert EvaluationData(checkpoint, [about] * 100).image_sequences == 64


def test_refuses_other_models_and_empty_data(root, rounded, tmp_path, examples):
    with pytest.raises(VilaDeployError, match="gives no tokens to predict"):
        EvaluationData(open_checkpoint(root), [Example("")])
    other = make_checkpoint(tmp_path / "other", layers=1)
    with pytest.raises(VilaDeployError, match=r"num_layers is 2, in .* it is 1; compare"):
        measured(other, rounded, examples)


def run(root, out, *flags):
    done = CliRunner().invoke(main, [str(root), "-o", str(out), *map(str, flags)])
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Own texts to calibrate with, and to evaluate with."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "calib.txt").write_text(f"{PLAIN}\n\n" * 3, "utf-8")
    red().save(folder / "red.png")
    lines = [{"text": QUESTION, "answer": ANSWER, "image": "red.png"}, {"text": PLAIN[4:]}]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return folder


def test_command_reports_warns_and_gates(root, own, tmp_path):
    out = tmp_path / "out"
    data = ["--calib", own / "calib.txt", "--text-only", "--eval", own / "eval.jsonl"]
    done = run(root, out, *data, "--algorithm", "awq", *RTN[2:], "--max-kl", "1e-9")
    assert done.exit_code == 1
    line = done.stderr.splitlines()[-1]
    report = json.loads((out / "report.json").read_text("utf-8"))
    quality = report["evaluation"]["quality"]
    worst = max(quality["text"]["kl_mean"], quality["image"]["kl_mean"])
    assert line.startswith(f"error: {out}: mean KL of ")
    assert f"is {worst:.4g}, above --max-kl 1e-09; the output is kept" in line
    assert open_checkpoint(out)
    assert "answers about images: perplexity" in done.stdout
    assert report["evaluation"]["own_data"]
    assert report["evaluation_seconds"] < report["seconds"]
    (warning,) = report["warnings"]
    assert "calibrated without images" in warning
    assert f"warning: {warning}" in done.stderr.splitlines()
    text = (out / "report.md").read_text("utf-8")
    assert f"- **warning**: {warning}" in text
    for row in ("| text | ", "| answers about images | ", "| 1 | "):
        assert row in text
    assert str(own) not in text + (out / "README.md").read_text("utf-8")


def test_command_lets_a_good_result_pass_and_rtn_be_quick(root, tmp_path):
    done = run(root, tmp_path / "kl", *RTN, "--max-kl", 1)
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "kl" / "report.json").read_text("utf-8"))
    assert not report["evaluation"]["own_data"]
    assert report["evaluation"]["images"] == 8
    done = run(root, tmp_path / "rtn", *RTN)
    assert "perplexity" not in done.stdout
    assert json.loads((tmp_path / "rtn" / "report.json").read_text("utf-8"))["evaluation"] is None
    assert "Not evaluated" in (tmp_path / "rtn" / "README.md").read_text("utf-8")


def test_nan_never_passes_the_gate(root, tmp_path, monkeypatch):
    compare = evaluating.compare_logits

    def compare_with_nan(expected, actual, *rest):
        return compare(expected, actual.mul_(math.nan), *rest)

    monkeypatch.setattr(evaluating, "compare_logits", compare_with_nan)
    done = run(root, tmp_path / "out", *RTN, "--max-kl", 1e9)
    assert done.exit_code == 1
    assert "is nan, above --max-kl" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-eval", "--max-kl", 1], "leave nothing for --max-kl"),
        (["--no-eval", "--eval", "x"], "leaves nothing for --eval"),
        (["--max-kl", "nan"], "must be a number"),
        (["--max-kl", -1], "is not in the range"),
        (["--text-only", "--calib-images", "x"], "leaves out the images"),
    ],
)
def test_refuses_flags_that_contradict(root, tmp_path, flags, message):
    done = run(root, tmp_path / "out", *flags)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("content", [b"", b"caf\xe9", b'{"text": "a", "image": "none.png"}'])
def test_bad_evaluation_data_is_refused_before_the_work(root, tmp_path, monkeypatch, content):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    monkeypatch.setattr(pipeline, "_write_layers", lambda *args: pytest.fail("too late"))
    done = run(root, tmp_path / "out", *RTN, "--eval", file)
    assert done.exit_code == 1
    assert ("none.png" if b"none" in content else "bad.jsonl") in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_warns_of_text_only_and_of_data_seen_before(root, own, capsys):
    options = QuantizeOptions(calib=own / "calib.txt", text_only=True)
    seen = load_examples(own / "calib.txt", None, text_only=True)
    assert not [e for e in seen if e.images]
    (third,) = data_warnings(QuantizeOptions(calib=own / "calib.txt"), builtin_image_examples(), [])
    assert "the built-in drawings stand in" in third
    first, second = data_warnings(options, seen, [*seen[:1], Example("new")])
    assert "--text-only" in first
    assert second.startswith("1 of 2 evaluation examples were calibrated on")
    assert data_warnings(QuantizeOptions(), load_examples(None, None), load_held_out(None)) == []
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_folder_of_images_is_evaluation_data(own, tmp_path):
    red().save(tmp_path / "a.png")
    (example,) = load_held_out(tmp_path)
    assert example.answer is None
    assert len(example.images) == 1
    assert len(load_held_out(own)) == 5  # three paragraphs and two lines


def test_own_memory_is_measured_without_mapped_files(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20) * 64)
    # Freed memory of earlier tests, were it kept, would be used again unseen.
    give_back()
    with PeakMemory() as memory:
        before = memory.own_bytes
        mapped = torch.from_file(str(file), size=64 << 20, dtype=torch.uint8)
        assert int(mapped.max()) == 255
        assert memory.own_bytes - before < 32 << 20
        held = torch.ones(64 << 20, dtype=torch.uint8)
        assert own_bytes() - before > 60 << 20
        threading_saw = memory._done.wait(0.2)
        del held
    assert not threading_saw
    assert memory.own_bytes - before > 60 << 20
