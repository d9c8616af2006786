"""No mmproj file is written, and why: from the released models' configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import assert_one_line, invoke
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.mmproj import refuse_mmproj

REASONS = {
    "VILA1.5-3b": "column by column",
    "VILA1.5-40b": "column by column",
    "VILA1.5-3b-s2": "several scales",
    "NVILA-8B": "several scales",
    "NVILA-Lite-8B": "joins 3×3 patches",
    "NVILA-8B-Video": "aren't square",
    "VILA-7b": "not tried",
}


@pytest.mark.parametrize("model", REASONS)
def test_the_reason_is_that_of_the_model(model: str) -> None:
    with pytest.raises(VilaDeployError, match=REASONS[model]) as caught:
        refuse_mmproj(preset(model, "fp16"))
    assert "--backend llamacpp" in (caught.value.fix or "")


def test_the_command_refuses_before_work(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    result = invoke("vila-convert", root, "--to", "mmproj", "-o", tmp_path / "out")
    assert "no mmproj file is written" in assert_one_line(result)
    assert not (tmp_path / "out").exists()
