"""An int8 key/value cache beside a float32 one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.backends.onnxruntime import build as build_module
from vila_deploy.backends.onnxruntime import files
from vila_deploy.builder import build as builder
from vila_deploy.builder import build_engine
from vila_deploy.builder.calibration_prompts import random_prompts
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.engine.session import Session
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

# Root mean square, of the logits' spread. Tiny random weights show rounding more than trained ones.
TOLERANCE = 0.04


@pytest.fixture(autouse=True)
def text_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate on random tokens: features of images are far larger than text in random models."""
    monkeypatch.setattr(builder, "builtin_prompts", lambda c: random_prompts(c.config.llm, c.llm))


def logits(session: Session) -> Floats:
    """Return the logits behind a prompt and behind each of some tokens."""
    found = [session.prefill(0, session.embed_tokens(range(20, 60)))]
    found += [session.decode([0], [token])[0] for token in range(5, 25)]
    return np.array(found)


@pytest.mark.parametrize("activations", ["fp32", "int8x2"])
def test_logits_stay_close_and_memory_is_a_quarter(tmp_path: Path, activations: str) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, kv_heads=2)
    found = {}
    for dtype in ("fp16", "int8"):
        out = tmp_path / dtype
        build_engine(root, out, "cpu", kv_cache=dtype, activations=activations)
        assert load_manifest(out).module_precision.kv_cache == dtype
        assert not (out / files.LLM / files.SCRATCH_GRAPH).exists()
        with open_engine(out) as engine:
            size = engine.session.rows.buffers[0].itemsize  # type: ignore[attr-defined]
            assert size == {"fp16": 4, "int8": 1}[dtype]
            found[dtype] = logits(engine.session)
    assert 0 < (found["int8"] - found["fp16"]).std() / found["fp16"].std() < TOLERANCE


def test_slots_of_an_int8_cache_do_not_depend_on_each_other(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    build_engine(root, tmp_path / "e", "cpu", kv_cache="int8", activations="int8x2")
    with open_engine(tmp_path / "e", slots=2) as engine:
        session = engine.session
        alone = session.prefill(0, session.embed_tokens([1, 5, 9])), session.decode([0], [7])[0]
        session.keep(0, 0)
        session.prefill(1, session.embed_tokens([30, 31]))
        assert np.array_equal(session.prefill(0, session.embed_tokens([1, 5, 9])), alone[0])
        both = session.decode([1, 0], [8, 7])
        assert np.array_equal(both[1], alone[1])


def test_without_memory_to_calibrate_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    assert open_checkpoint(root).config.llm.quantization is not None
    monkeypatch.setattr(build_module, "available_memory_bytes", lambda: 1000)
    with pytest.raises(VilaDeployError, match=r"calibrating an int8 cache needs .* GB of memory"):
        build_engine(root, tmp_path / "e", "cpu", kv_cache="int8")
    assert not (tmp_path / "e").exists()
