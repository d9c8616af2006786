"""Formats into one another and back: the same weights, and nothing of the rest lost."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.support.conversions import VARIANTS, assert_same_llm
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.tinychat_file import group_size
from vila_deploy.cli.convert import main
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.convert import convert
from vila_deploy.writers.tinychat import file_name


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, **VARIANTS[variant])
    convert(root, tmp_path / "tinychat", ["tinychat"])
    convert(tmp_path / "tinychat", tmp_path / "awq", ["awq"])
    assert not list((tmp_path / "tinychat" / "llm").glob("*.safetensors"))
    assert_same_llm(root, tmp_path / "tinychat")
    assert_same_llm(root, tmp_path / "awq")
    original: dict[str, torch.Tensor] = {}
    for file in (root / "llm").glob("*.safetensors"):
        original |= load_file(file)
    found = load_file(tmp_path / "awq" / "llm" / "model.safetensors")
    if "lm_head.weight" not in found:
        original.pop("lm_head.weight", None)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_tinychat_file_is_what_llm_awq_loads(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, group_size=64)
    convert(root, tmp_path / "t", ["tinychat"])
    (file,) = (tmp_path / "t" / "llm").glob("*-v2.pt")
    assert file.name == "q-w4-g64-awq-v2.pt"
    tensors = torch.load(file, weights_only=True)
    prefix = "model.layers.0.self_attn.q_proj"
    assert {n for n in tensors if n.startswith(prefix)} == {
        f"{prefix}.{part}" for part in ("qweight", "scales", "scaled_zeros")
    }
    assert tensors[f"{prefix}.qweight"].dtype == torch.int16
    assert "quantization_config" not in json.loads((tmp_path / "t/llm/config.json").read_text())
    sums = (tmp_path / "t" / "SHA256SUMS").read_text()
    assert f"llm/{file.name}" in sums


def test_tinychat_gets_the_head_that_it_unties(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, qwen2=True, tied=True)
    convert(root, tmp_path / "t", ["tinychat"])
    (file,) = (tmp_path / "t" / "llm").glob("*-v2.pt")
    tensors = torch.load(file, weights_only=True)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "model", ["run-g64-test", "a-g5-g7", "run_2024-11-26T00:07", "ファイル", "x" * 200, ""]
)
def test_no_name_of_a_model_hides_the_group_size(model: str, tmp_path: Path) -> None:
    name = file_name(model, 128)
    assert group_size(tmp_path / name) == 128
    assert re.fullmatch(r"[\w.+-]{1,100}-w4-g128-awq-v2\.pt", name, re.ASCII)


def test_what_tinychat_cannot_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (64, 128):
        root = make_checkpoint(tmp_path / f"{size}", quantized=True, group_size=size)
        convert(root, tmp_path / f"{size}-t", ["tinychat"])
        said = capsys.readouterr().err
        assert ("warning: TinyChat's kernels compute groups of 128 only" in said) == (size == 64)


def test_a_command_leaves_the_signals_of_its_caller(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    CliRunner().invoke(main, [str(tmp_path / "none"), "--to", "awq", "-o", str(tmp_path / "out")])
    assert signal.getsignal(signal.SIGTERM) == before


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain")
    result = CliRunner().invoke(main, [str(plain), "--to", "awq", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.search(r"plain: is not quantized; run vila-quantize first", result.output)
    odd = make_checkpoint(tmp_path / "odd", quantized=True, group_size=16)
    with pytest.raises(VilaDeployError, match="group") as caught:
        convert(odd, tmp_path / "out", ["tinychat"])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "plain"]
