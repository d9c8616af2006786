"""`--bits-per-weight` from the measured sensitivity to checkpoints that are read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.rtn import fake_quantize
from vila_deploy.model.llm import LanguageModel
from vila_deploy.quantize import pipeline
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.quantize.options import QuantizeOptions, quantize_options
from vila_deploy.quantize.sensitivity import measure_sensitivities
from vila_deploy.utils.device import CPU
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.convert import convert

SCHEME = QuantScheme(32)
TOKENS = 192


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "root")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> QuantizeOptions:
    file = tmp_path_factory.mktemp("data") / "texts.txt"
    file.write_text("the king saw the red house on the hill.\n\n" * 8, "utf-8")
    return QuantizeOptions(
        SCHEME, "rtn", file, text_only=True, evaluate=False, bits_per_weight=4.5,
        formats=("gguf", "compressed-tensors"),
    )  # fmt: skip


class _Changed:
    """A checkpoint's weights with one linear rounded."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._llm, self._name = checkpoint.llm, name

    def tensor(self, name: str) -> Tensor:
        return self._llm.tensor(name)

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        weight = self._llm.linear(prefix)
        assert isinstance(weight, Tensor)
        return fake_quantize(weight.float(), SCHEME) if prefix == self._name else weight


def test_predicted_kl_is_what_rounding_a_linear_costs(root: Path, tmp_path: Path) -> None:
    """Of each linear alone, measured with the whole model on the same tokens."""
    checkpoint = open_checkpoint(root)
    llm = checkpoint.config.llm
    embeds = torch.randn(TOKENS, llm.hidden_size, generator=torch.Generator().manual_seed(0))
    data = Calibration([embeds], torch.zeros(TOKENS, dtype=torch.bool), 1, 0, 0, TOKENS, 0, "")
    found = measure_sensitivities(
        checkpoint, data, SCHEME, (4, 8), algorithm="rtn", seed=0, device=CPU, scratch=tmp_path
    )
    assert list(found) == [n for i in range(llm.num_layers) for n in llm.layer_linears(i)]
    exact = torch.log_softmax(LanguageModel(llm, checkpoint.llm)(embeds), 1)
    measured = {}
    for name in found:
        changed = torch.log_softmax(LanguageModel(llm, _Changed(checkpoint, name))(embeds), 1)
        measured[name] = float((exact.exp() * (exact - changed)).sum(1).mean())
    ratios = {name: round(found[name][4] / measured[name], 2) for name in found}
    assert 0.7 < sum(v[4] for v in found.values()) / sum(measured.values()) < 1.4, ratios
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios
    assert all(v[8] < v[4] / 100 for v in found.values())


def test_both_formats_hold_the_chosen_bits(
    root: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    report = pipeline.quantize(root, tmp_path / "out", options)
    choice = report["bit_choice"]
    assert 4.3 < choice["mean_bits"] <= 4.5
    checkpoints = [open_checkpoint(tmp_path / "out" / name) for name in options.formats]
    given = {name: row["bits"] for name, row in choice["linears"].items()}
    assert set(given.values()) == {4, 8}
    for name, bits in given.items():
        first, second = (checkpoint.llm.linear(name) for checkpoint in checkpoints)
        assert isinstance(first, QuantizedLinear)
        assert isinstance(second, QuantizedLinear)
        assert first.bits == second.bits == bits
        assert torch.equal(first.dequantize(), second.dequantize())
    assert "4 or 8 bits" in (tmp_path / "out" / "report.md").read_text()
    assert any("transformers" in warning for warning in report["warnings"])
    convert(tmp_path / "out" / "compressed-tensors", tmp_path / "again", ["gguf"])
    name = next(name for name, bits in given.items() if bits == 8)
    again = open_checkpoint(tmp_path / "again").llm.linear(name)
    assert isinstance(again, QuantizedLinear)
    assert again.bits == 8
    with pytest.raises(VilaDeployError, match="found 8 bits"):
        convert(tmp_path / "out" / "gguf", tmp_path / "awq", ["awq"])


@pytest.mark.parametrize(("algorithm", "symmetric"), [("awq-gptq", False), ("awq", True)])
def test_every_algorithm(
    algorithm: str, symmetric: bool, root: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    options = replace(
        options, algorithm=algorithm, formats=("gguf",), scheme=QuantScheme(32, symmetric)
    )
    report = pipeline.quantize(root, tmp_path / "out", options)
    given = {name: row["bits"] for name, row in report["bit_choice"]["linears"].items()}
    assert 5 in given.values()
    checkpoint, original = open_checkpoint(tmp_path / "out"), open_checkpoint(root)
    for name, bits in given.items():
        linear = checkpoint.llm.linear(name)
        assert isinstance(linear, QuantizedLinear)
        assert linear.bits == bits
        assert linear.symmetric or not symmetric
    hidden = original.config.llm.hidden_size
    embeds = torch.randn(32, hidden, generator=torch.Generator().manual_seed(1))
    models = [LanguageModel(c.config.llm, c.llm) for c in (original, checkpoint)]
    exact, close = (torch.log_softmax(model(embeds), 1) for model in models)
    assert float((exact.exp() * (exact - close)).sum(1).mean()) < 0.1


def test_resume_keeps_the_choice(
    root: Path, options: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, algorithm="awq-gptq", formats=("gguf",))
    pipeline.quantize(root, tmp_path / "whole", options)
    write = pipeline.CheckpointWriter.add

    def stop(self: pipeline.CheckpointWriter, name: str, value: Tensor | QuantizedLinear) -> None:
        if name.startswith("model.layers.1."):
            raise VilaDeployError("stopped")
        write(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.CheckpointWriter, "add", stop)
        with pytest.raises(VilaDeployError, match="stopped"):
            pipeline.quantize(root, tmp_path / "out", options)

    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(pipeline, "search_bits", never)
    pipeline.quantize(root, tmp_path / "out", options, resume=True)
    files = [next((tmp_path / n / "llm").glob("*.gguf")) for n in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    kept = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "out")]
    assert kept[0]["bit_choice"] == kept[1]["bit_choice"]


@pytest.mark.parametrize(
    ("bits", "formats", "layers", "message"),
    [
        (3.9, ("gguf",), None, "must be from 4 to 8"),
        (8.1, ("gguf",), None, "must be from 4 to 8"),
        (4.5, ("awq",), None, "needs a format with other bits than 4, awq has none"),
        (4.5, ("gguf", "trtllm"), None, "trtllm has none"),
        (4.5, ("gguf",), "0:1", "chooses among all layers"),
    ],
)
def test_refused_before_any_work(
    bits: float, formats: tuple[str, ...], layers: str | None, message: str
) -> None:
    with pytest.raises(VilaDeployError, match=message):
        quantize_options(
            algorithm="rtn", group_size=64, symmetric=False, calib=None, calib_images=None,
            text_only=False, eval=None, no_eval=False, formats=formats, device="cpu",
            prompt_template=None, seed=0, lora=None, layers=layers, bits_per_weight=bits,
        )  # fmt: skip
