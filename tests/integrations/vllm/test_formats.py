"""4-bit formats and layouts under vLLM, beside our reference of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.vllm.one_process import answers, check_answers
from tests.support.commands import succeed
from tests.support.first_generation import make_first_generation, shrink_clip
from tests.support.tiny import make_checkpoint
from tests.support.vllm_cases import CASES, QWEN2
from vila_deploy.integrations.served_model import read_served_model

# fp16 against float32, of logits whose spread is about 1.
HALF_PRECISION = 0.03
LLAMA, LITE = CASES["Llama-3"], {
    **QWEN2, "projector": "mlp_downsample_3x3_fix", "vision_hidden": 1152, "vision_layers": 2,
    "vision_heads": 16, "root_config": {"image_aspect_ratio": "dynamic", "max_tiles": 4},
}  # fmt: skip
ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "AWQ": (LLAMA, "awq", ()),
    "AWQ, symmetric": (LLAMA, "awq", ("--symmetric",)),
    "compressed-tensors": (LLAMA, "compressed-tensors", ()),
    "compressed-tensors, symmetric": (LLAMA, "compressed-tensors", ("--symmetric",)),
    "one folder, as SGLang's": (LITE, "sglang", ()),
}


@pytest.mark.parametrize("row", ROWS)
def test_formats(row: str, tmp_path: Path) -> None:
    tiny, name, options = ROWS[row]
    root = make_checkpoint(tmp_path / "c", **tiny)
    succeed("vila-quantize", root, "-o", tmp_path / "q", "--algorithm", "rtn", "--group-size", 64,
            "--no-eval", "--format", name, *options)  # fmt: skip
    served = read_served_model(tmp_path / "q")
    found = answers(served, "Llama-3", dtype="float16")
    check_answers(served, "Llama-3", found, HALF_PRECISION)


def test_the_first_generations_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_clip(monkeypatch)
    served = read_served_model(make_first_generation(tmp_path / "c"))
    assert served.layout.flat
    check_answers(served, "CLIP", answers(served, "CLIP", dtype="float16"), HALF_PRECISION)
