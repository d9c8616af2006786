"""vila-eval from command line to exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.commands import BIN, assert_one_line, invoke, succeed
from tests.support.eval_tasks import write_lines
from tests.support.paths import TINY_VILA
from tests.support.tiny import make_checkpoint

QUESTIONS = 12


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    succeed("vila-build-engine", TINY_VILA, "--target", "cpu", "-o", folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from write_questions import write

    folder = tmp_path_factory.mktemp("eval") / "questions"
    write(folder, QUESTIONS)
    return folder


def test_scores_are_those_of_single_conversations(
    engine: Path, questions: Path, tmp_path: Path
) -> None:
    from tiny_vila.questions import held_out
    from tiny_vila.scoring import score
    from vila_deploy import SamplingParams, open_engine

    sampling = SamplingParams(max_new_tokens=128)
    with open_engine(engine) as opened:
        right = score(
            lambda images, prompt: opened.chat().ask(prompt, images, sampling).text,
            held_out(QUESTIONS),
        )
    out = tmp_path / "answers.jsonl"
    report = json.loads(succeed("vila-eval", engine, "--data", questions, "-o", out, "--json"))
    task = report["task"]
    assert task["score"]["value"] == pytest.approx(100 * right.accuracy)
    assert {k: round(v["value"] * v["count"] / 100) for k, v in task["categories"].items()} == (
        right.right
    )
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in range(QUESTIONS)]
    assert sum(row["score"] for row in rows) == sum(right.right.values())
    again = invoke("vila-eval", engine, "--data", questions, "-o", out)
    assert "output file exists" in assert_one_line(again)


def test_a_layer_of_zeros_fails_max_kl(engine: Path, questions: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(TINY_VILA, damaged)
    (damaged / "SHA256SUMS").unlink()
    file = damaged / "llm" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("model.layers.1.") and name.endswith("proj.weight"):
            tensors[name].zero_()
    save_file(tensors, file, {"format": "pt"})
    succeed("vila-build-engine", damaged, "--target", "cpu", "-o", tmp_path / "zeroed")
    options = ("--data", questions, "--limit", 6, "--reference", TINY_VILA, "--max-kl", 0.05)
    report = json.loads(succeed("vila-eval", engine, *options, "--json"))
    assert report["likelihood"]["quality"]["image"]["kl_mean"] < 0.005
    failed = invoke("vila-eval", tmp_path / "zeroed", *options)
    assert "above --max-kl 0.05" in assert_one_line(failed)


def test_min_score(engine: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "questions.jsonl", [{"question": "Hello?", "answer": "\0"}])
    failed = invoke("vila-eval", engine, "--data", tmp_path, "--min-score", 50)
    assert "scores 0.00, below --min-score 50" in assert_one_line(failed)
    succeed("vila-eval", engine, "--data", tmp_path, "--min-score", 0)


def test_a_question_that_fails_is_asked_again(engine: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a.png").write_bytes(b"no image")
    rows = [
        {"question": "Hello?", "answer": "x"},
        {"question": "?", "answer": "x", "image": "a.png"},
    ]
    write_lines(tmp_path / "questions.jsonl", rows)
    out = tmp_path / "out.jsonl"
    failed = invoke("vila-eval", engine, "--data", tmp_path, "-o", out)
    assert "questions that could not be asked: 1, one: " in assert_one_line(failed)
    assert "is not an image" in failed.stderr
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    succeed("vila-eval", engine, "--data", tmp_path, "-o", out, "--resume")
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_run_goes_on(engine: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Question {number}?", "answer": "x"} for number in range(200)]
    write_lines(tmp_path / "questions.jsonl", rows)
    command = [BIN / "vila-eval", engine, "--data", tmp_path, "-o", tmp_path / "out.jsonl"]
    command += ["--max-new-tokens", "4"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE)
    log = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_bytes().count(b"\n") > 20):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = log.read_bytes().count(b"\n")
    done = invoke("vila-eval", *command[1:], "--resume")
    assert done.returncode == 0, done.stderr
    assert kept > 20
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 200
    other = invoke("vila-eval", *command[1:], "--resume", "--max-new-tokens", 3)
    assert "output file exists" in assert_one_line(other)


@pytest.mark.parametrize(
    "options",
    [
        [], ["--max-kl", 1, "--data", "x"], ["--reference", "x", "--min-score", 1],
        ["--data", "x", "--resume"], ["--data", "x", "--task", "mmmu", "--metric", "vqa"],
        ["--data", "x", "--min-score", "nan"], ["--reference", "x", "--task", "mmmu"],
    ],
)  # fmt: skip
def test_wrong_usage(options: list[object]) -> None:
    assert invoke("vila-eval", "x", *options).returncode == 2


def test_files_are_checked_before_a_model_is_opened(tmp_path: Path) -> None:
    done = invoke("vila-eval", tmp_path / "no-engine", "--data", tmp_path)
    assert "questions.jsonl: no such file" in assert_one_line(done)


def test_an_engine_too_short_to_compare_is_one_line(tmp_path: Path) -> None:
    root, short = make_checkpoint(tmp_path / "c"), tmp_path / "short"
    flags = ["--max-input-len", 1, "--max-seq-len", 2]
    succeed("vila-build-engine", root, "--target", "cpu", "-o", short, *flags)
    (tmp_path / "text.txt").write_text("Hello there.")
    asked = ["--reference", root, "--text", tmp_path / "text.txt", "--max-kl", 1]
    line = assert_one_line(invoke("vila-eval", short, *asked))
    assert "text.txt: no text has two tokens that fit into both models" in line
