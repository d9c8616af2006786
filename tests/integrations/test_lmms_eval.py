"""lmms-eval finds the model by its entry point; a local task scores as vila-eval does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import succeed
from tests.support.paths import TINY_VILA

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-integrations")
datasets = pytest.importorskip("datasets")

QUESTIONS = 48
TASK = """\
dataset_path: {path}
dataset_kwargs:
  load_from_disk: true
task: local_scenes
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 96
  temperature: 0
  do_sample: false
  num_beams: 1
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
UTILS = "def visual(doc):\n    return [image.convert('RGB') for image in doc['images']]\n"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with one, two and three images."""
    from write_questions import write

    folder = tmp_path_factory.mktemp("lmms") / "questions"
    write(folder, QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    options = ("--algorithm", "rtn", "--no-eval")
    succeed("vila-quantize", TINY_VILA, "-o", folder / "rtn", *options)
    succeed("vila-build-engine", folder / "rtn", "--target", "cpu", "-o", folder / "engine")
    return folder / "engine"


def make_task(folder: Path, questions: Path) -> Path:
    """Make the same questions a task of lmms-eval, on the disk alone."""
    lines = (questions / "questions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    columns = {
        "question": [row["question"] for row in rows],
        "answer": [row["answer"] for row in rows],
        "images": [[str(questions / name) for name in row["image"]] for row in rows],
    }
    images = datasets.Sequence(datasets.Image())
    text = datasets.Value("string")
    features = datasets.Features({"question": text, "answer": text, "images": images})
    data = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"test": data}).save_to_disk(folder / "data")
    (folder / "task").mkdir()
    (folder / "task" / "local_scenes.yaml").write_text(TASK.format(path=folder / "data"), "utf-8")
    (folder / "task" / "utils.py").write_text(UTILS, "utf-8")
    return folder / "task"


def lmms_eval(task: Path, model: Path, out: Path) -> dict[str, Any]:
    """Run lmms-eval as users do, with nothing but this computer."""
    command = [
        sys.executable, "-m", "lmms_eval", "eval", "--model", "vila_deploy",
        "--model_args", f"pretrained={model}", "--tasks", "local_scenes",
        "--include_path", task, "--batch_size", 1, "--output_path", out, "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | offline, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    # lmms-eval ends with 0 after an error too.
    paths = list(out.rglob("*_results.json"))
    assert len(paths) == 1, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(paths[0].read_text("utf-8"))
    return results


@pytest.mark.parametrize("kind", ["engine", "checkpoint"])
def test_scores_equal_those_of_vila_eval(
    kind: str, engine: Path, questions: Path, tmp_path: Path
) -> None:
    model = engine if kind == "engine" else TINY_VILA
    results = lmms_eval(make_task(tmp_path, questions), model, tmp_path / "out")
    (theirs,) = (
        value
        for name, value in results["results"]["local_scenes"].items()
        if name.startswith("exact_match,")
    )
    options = ("--max-new-tokens", 96, "--json")
    ours = json.loads(succeed("vila-eval", model, "--data", questions, *options))
    assert ours["task"]["answered"] == QUESTIONS
    assert 100 * theirs == pytest.approx(ours["task"]["score"]["value"])
    assert theirs > 0.9


def test_what_a_task_wants_and_we_lack_is_refused() -> None:
    from vila_deploy.integrations.lmms_eval import sampling
    from vila_deploy.utils.errors import VilaDeployError

    for settings in ({"num_beams": 5}, {"penalty_alpha": 1}, {"temperature": -1}):
        with pytest.raises(VilaDeployError):
            sampling(settings)
    assert sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
