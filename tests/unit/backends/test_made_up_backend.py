"""A backend is one folder and one row: a made-up one is planned, built, finished and run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import assert_one_line, invoke, succeed
from tests.support.paths import REPOSITORY
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.registry import BACKENDS, BackendRow
from vila_deploy.cli import bench_worker
from vila_deploy.engine import target as target_module
from vila_deploy.engine.manifest import load_manifest

# Answers every question with the tokens that it was built with, over and over.
SOURCE = """
import json

import numpy as np

from vila_deploy.backends.base import Backend
from vila_deploy.engine.build_request import BuildResult
from vila_deploy.engine.manifest import PendingStep
from vila_deploy.engine.memory import MemoryEstimate, MemoryRow, Storage, weight_items
from vila_deploy.engine.session import OneSlot
from vila_deploy.utils.errors import VilaDeployError

ANSWERS, QUESTIONS = "answers.json", "questions.json"
STEP = PendingStep("answers", "write the answers")
ON_DEVICE = [False]


class MadeUpBackend(Backend):
    name = "made-up"
    max_batch_size = 2

    def check_model(self, config, request):
        if config.llm.quantization is not None:
            raise VilaDeployError("backend made-up can't count to 4", fix="use fp16")

    def supported_dtypes(self, target):
        return {"lm_head": ("int4",)}

    def estimate_memory(self, config, request, precision, limit_bytes):
        items = weight_items(config, precision, Storage(), request.module_precision)
        return MemoryEstimate({MemoryRow.HEAD: items[MemoryRow.HEAD]}, program_bytes=1000)

    def build(self, folder, config, weights, request):
        content = {"vocab_size": config.llm.vocab_size, "hidden_size": config.llm.hidden_size}
        (folder / QUESTIONS).write_text(json.dumps(content))
        return BuildResult(1 << 20, {"made-up": "7.0"}, (STEP,))

    def finish_location(self, manifest):
        return "the kitchen table"

    def check_device(self, folder, manifest):
        if not ON_DEVICE[0]:
            raise VilaDeployError("this is no kitchen table", fix="go to one")

    def artifacts(self, step):
        return (ANSWERS,)

    def finish_step(self, folder, manifest, step):
        assert step == STEP
        content = json.loads((folder / QUESTIONS).read_text())
        stops = list(manifest.model.stop_token_ids)
        (folder / ANSWERS).write_text(json.dumps({**content, "tokens": [72, 105, *stops]}))
        return {"pen": "1.0"}

    def intermediates(self, folder, step):
        return (QUESTIONS,)

    def open(self, folder, manifest, slots=1):
        return OneSlot(MadeUpSession(folder, manifest))


class MadeUpSession:
    def __init__(self, folder, manifest):
        content = json.loads((folder / ANSWERS).read_text())
        self.max_seq_len, self.position = manifest.limits.max_seq_len, 0
        self._tokens, self._given = content["tokens"], 0
        self._vocab, self._hidden = content["vocab_size"], content["hidden_size"]
        self._per_block = manifest.model.tokens_per_block

    def _logits(self):
        logits = np.zeros(self._vocab, np.float32)
        logits[self._tokens[self._given % len(self._tokens)]] = 1
        return logits

    def truncate(self, tokens):
        self.position = tokens

    def prefill(self, embeds):
        self.position, self._given = self.position + len(embeds), 0
        return self._logits()

    def decode(self, token):
        self.position, self._given = self.position + 1, self._given + 1
        return self._logits()

    def encode_images(self, pixels, grid=None):
        return np.zeros((len(pixels), self._per_block, self._hidden), np.float32)

    def embed_tokens(self, tokens):
        return np.zeros((len(tokens), self._hidden), np.float32)

    def close(self):
        pass


BACKEND = MadeUpBackend()
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's module, after its folder, its row and a target that takes it were added."""
    package = tmp_path / "packages" / "made_up_backend"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""A backend that has its answers ready."""\n')
    (package / "backend.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(BACKENDS, "made-up", BackendRow("made_up_backend.backend:BACKEND"))
    cpu = target_module.get_target("cpu")
    board = replace(cpu, name="board", default_backend="made-up", backends={"made-up": "paper"})
    targets = {"board": board, "cpu": cpu}
    monkeypatch.setattr(target_module, "load_targets", lambda: targets)
    import made_up_backend.backend as module

    return module


def test_a_folder_and_a_row_are_a_backend(
    tmp_path: Path, made_up: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, engine = make_checkpoint(tmp_path / "c"), tmp_path / "engine"
    planned = json.loads(
        succeed("vila-build-engine", root, "--target", "board", "--plan", "--json")
    )
    (head,) = planned["components"]
    assert (planned["backend"], head["name"]) == ("made-up", "llm head")
    assert planned["device_bytes"] == head["bytes"] + 1000

    said = succeed("vila-build-engine", root, "--target", "board", "-o", engine)
    assert "Left for the kitchen table: write the answers. Copy engine there" in said
    assert load_manifest(engine).pending_steps == (made_up.STEP,)
    error = assert_one_line(invoke("vila-chat", engine, "-p", "Well?"))
    assert "is not finished: write the answers; run on the kitchen table" in error

    made_up.ON_DEVICE[0] = True
    succeed("vila-build-engine", engine, "--target", "board")
    manifest = load_manifest(engine)
    assert (manifest.backend, manifest.pending_steps) == ("made-up", ())
    assert {"made-up": "7.0", "pen": "1.0"}.items() <= manifest.versions.items()
    assert not (engine / made_up.QUESTIONS).exists()

    answer = json.loads(succeed("vila-chat", engine, "-p", "Well?", "--json"))
    assert answer["tokens"] == [72, 105, *manifest.model.stop_token_ids[:1]]
    assert answer["finish_reason"] == "stop"

    from vila_deploy.bench.measure import measure

    monkeypatch.setattr(bench_worker, "measure_in_subprocess", measure)
    (row,) = json.loads(succeed("vila-bench", engine, "--json"))
    assert (row["backend"], row["versions"]["made-up"]) == ("made-up", "7.0")
    assert row["decode_tokens_per_s"] > 0


def test_what_every_backend_refuses_is_refused_for_it_too(tmp_path: Path, made_up: Any) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    for options, message in (
        (["--max-batch-size", 3], "--max-batch-size 3 is more than this backend's 2"),
        (["--tp", 2], "backend made-up runs on one GPU, --tp and --pp are for several"),
        (["--jetpack", 6], "--jetpack is for backend tensorrt, not for made-up"),
        (["--kv-cache", "int8"], "backend made-up has --kv-cache fp16, not int8"),
        (["--lm-head", "int8"], "backend made-up has --lm-head fp16 or int4, not int8"),
        (["--backend", "native"], "target board has no backend 'native'; choose from made-up"),
        ([], "backend made-up can't count to 4; use fp16"),
    ):
        command = ("vila-build-engine", root, "--target", "board", "-o", tmp_path / "e", *options)
        assert message in assert_one_line(invoke(*command))


def test_only_tables_import_by_name() -> None:
    """Of backends and formats; the package's own names are imported when they are first asked."""
    folder = REPOSITORY / "vila_deploy"
    files = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"\b(import_module|__import__)\b", path.read_text("utf-8"))
    ]
    assert set(files) <= {"__init__.py", "backends/registry.py", "formats/registry.py"}
