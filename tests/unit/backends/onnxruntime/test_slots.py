"""Several slots of the CPU engine: what one answers does not depend on the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.support.session_contract import check_session
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.onnxruntime import build as build_module
from vila_deploy.backends.onnxruntime import session as session_module
from vila_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, Manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.target import get_target
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

MAX_SEQ_LEN = 64
# Largest difference to the reference, as a share of the logits' spread.
TOLERANCES = {"fp32": 5e-5, "int8x2": 1e-3, "int8": 0.15, None: 5e-5}
PROMPTS = [[3 + number, *range(40, 45 + 3 * number)] for number in range(8)]
STEPS = 12


def build(
    folder: Path, checkpoint: Checkpoint, activations: str | None, lm_head: str, length: int
) -> tuple[Path, Manifest]:
    limits = Limits(1, length, length)
    modules = replace(ALL_FP16, lm_head=lm_head)
    request = BuildRequest(
        get_target("cpu"), limits, activations=activations, module_precision=modules
    )
    folder.mkdir()
    built = build_module.build(folder, checkpoint.config, checkpoint.weights, request)
    return folder, Manifest(
        name="tiny", target="cpu", backend="onnxruntime",
        precision="int4" if activations else "fp16", weights="trained",
        weight_bytes_per_token=built.weight_bytes_per_token, checkpoint_fingerprint=None,
        limits=limits, model=ModelInfo.from_config(checkpoint.config, None),
        versions=built.versions, activations=activations, module_precision=modules,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Checkpoint]:
    root = tmp_path_factory.mktemp("slots")
    return {
        quantized: open_checkpoint(make_checkpoint(root / str(quantized), quantized=quantized))
        for quantized in (False, True)
    }


@pytest.mark.parametrize("slots", [2, 3, 8])
@pytest.mark.parametrize("activations", ["int8x2", "fp32", None])
def test_it_keeps_the_contract(
    tmp_path: Path, checkpoints: dict[bool, Checkpoint], activations: str | None, slots: int
) -> None:
    checkpoint = checkpoints[activations is not None]
    built = build(tmp_path / "engine", checkpoint, activations, "fp16", 24)
    session = OnnxRuntimeSession(*built, slots)
    assert session.slots == slots
    check_session(session, ReferenceSession(checkpoint), TOLERANCES[activations])


def answers(session: OnnxRuntimeSession, together: Sequence[int]) -> dict[int, list[Floats]]:
    """Logits of a greedy answer to PROMPTS[number] in slot `number`, all decoded together."""
    logits = {}
    for number in together:
        session.keep(number, 0)
        logits[number] = [session.prefill(number, session.embed_tokens(PROMPTS[number]))]
    for _ in range(STEPS):
        tokens = [int(logits[number][-1].argmax()) for number in together]
        for number, row in zip(together, session.decode(together, tokens), strict=True):
            logits[number].append(row)
    return logits


@pytest.mark.parametrize("lm_head", ["fp16", "int8", "int4"])
def test_two_int8_terms_answer_alone_as_with_others(
    tmp_path: Path, checkpoints: dict[bool, Checkpoint], lm_head: str
) -> None:
    """Bit for bit, whichever slots decode together, and in whichever order they are named."""
    built = build(tmp_path / "engine", checkpoints[True], "int8x2", lm_head, MAX_SEQ_LEN)
    session = OnnxRuntimeSession(*built, 8)
    alone = {number: answers(session, [number])[number] for number in range(8)}
    for together in (range(8), [5, 1], [7, 0, 3], [6, 2, 4, 1, 0], [3]):
        for number, logits in answers(session, list(together)).items():
            assert np.array_equal(logits, alone[number]), (number, together)
    rows = {count for _, _, count in session._bound}
    assert rows == {1, 2, 4, 8}, "numbers of rows for which kernels are known to add alike"
    assert len({row.tobytes() for logits in alone.values() for row in logits}) == 8 * (STEPS + 1)


@pytest.mark.parametrize("activations", ["int8", "fp32", None])
def test_one_term_answers_nearly_as_alone(
    tmp_path: Path, checkpoints: dict[bool, Checkpoint], activations: str | None
) -> None:
    """Kernels add in another order for one row than for several."""
    checkpoint = checkpoints[activations is not None]
    built = build(tmp_path / "engine", checkpoint, activations, "fp16", MAX_SEQ_LEN)
    session = OnnxRuntimeSession(*built, 8)
    alone = {number: answers(session, [number])[number] for number in range(8)}
    for number, logits in answers(session, list(range(8))).items():
        difference = np.abs(np.stack(logits) - np.stack(alone[number])).max()
        assert difference < TOLERANCES[activations] * np.std(logits)


def test_idle_slots_stay_as_they_are(tmp_path: Path, checkpoints: dict[bool, Checkpoint]) -> None:
    """Full ones and empty ones, between those that decode, wherever their rows have moved."""
    built = build(tmp_path / "engine", checkpoints[True], "int8x2", "fp16", 24)
    session = OnnxRuntimeSession(*built, 8)
    for slot in range(7):
        count = 24 if slot % 2 else 6 + slot
        session.prefill(slot, session.embed_tokens([10 * slot + n for n in range(1, count + 1)]))

    def contents() -> list[list[Floats]]:
        rows = [session.rows.row(slot) for slot in range(7)]
        lengths = [session.length(slot) for slot in range(7)]
        return [
            [buffer[row, :, :length].copy() for buffer in session.rows.buffers]
            for row, length in zip(rows, lengths, strict=True)
        ]

    before = contents()
    passes = ([0], [0, 6], [6, 2, 0], [4, 2], [0, 2, 4, 6])
    for together in passes:
        session.decode(together, [5] * len(together))
    for slot, after in enumerate(contents()):
        held = before[slot][0].shape[1]
        assert session.length(slot) == held + sum(slot in together for together in passes)
        for old, new in zip(before[slot], after, strict=True):
            np.testing.assert_array_equal(old, new[:, :held])


def test_a_slot_takes_over_what_another_holds(
    tmp_path: Path, checkpoints: dict[bool, Checkpoint]
) -> None:
    built = build(tmp_path / "engine", checkpoints[True], "int8x2", "fp16", MAX_SEQ_LEN)
    session = OnnxRuntimeSession(*built, 3)
    prompt = session.embed_tokens(PROMPTS[5])
    expected = session.prefill(0, prompt)
    session.prefill(2, session.embed_tokens(PROMPTS[1]))
    session.copy(0, 2, len(prompt) - 1)
    assert session.length(2) == len(prompt) - 1
    assert np.array_equal(session.prefill(2, prompt[-1:]), expected)
    for tokens, match in ((len(prompt) + 1, "holds"), (-1, "holds")):
        with pytest.raises(ValueError, match=match):
            session.copy(0, 2, tokens)
    with pytest.raises(ValueError, match="slots"):
        session.copy(0, 0, 1)


def test_an_engine_built_for_one_row_has_one_slot(
    tmp_path: Path, checkpoints: dict[bool, Checkpoint]
) -> None:
    folder, manifest = build(tmp_path / "engine", checkpoints[True], "int8x2", "fp16", MAX_SEQ_LEN)
    expected = answers(OnnxRuntimeSession(folder, manifest), [0])[0]
    for path in (folder / "llm").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for value in [*model.graph.input, *model.graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == "rows":
                    dim.dim_value = 1
        onnx.save(model, path)
    session = OnnxRuntimeSession(folder, manifest, slots=4)
    assert session.slots == 1
    assert np.array_equal(answers(session, [0])[0], expected)


# Run in a process of its own: in this one, memory that earlier tests freed may be used again.
MEMORY_OF_SLOTS = """
from vila_deploy.backends.onnxruntime.decoder import CacheRows
from vila_deploy.utils.host_memory import own_bytes
shape, before = (1, 4, 1 << 16, 32), own_bytes()
one = CacheRows(1, 1, shape)
after_one = own_bytes()
several = CacheRows(4, 4, shape)
print(after_one - before, own_bytes() - after_one)
print(*(sum(buffer.nbytes for buffer in rows.buffers) for rows in (one, several)))
"""


def test_several_slots_take_their_memory_at_once() -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_SLOTS], capture_output=True, text=True, check=True
    )
    taken_by_one, taken_by_several, one, several = map(int, run.stdout.split())
    assert (one, several) == (64 << 20, 256 << 20)
    assert taken_by_one < one // 8
    assert taken_by_several > 0.95 * several


def test_slots_without_memory_are_refused(
    checkpoints: dict[bool, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = build(tmp_path / "e", checkpoints[False], None, "fp16", MAX_SEQ_LEN)
    monkeypatch.setattr(session_module, "available_memory_bytes", lambda: 1000)
    OnnxRuntimeSession(folder, manifest)
    with pytest.raises(VilaDeployError, match=r"cache of 4 slots takes .* ask for fewer"):
        OnnxRuntimeSession(folder, manifest, 4)
