"""Precision of each module: from the command's options to manifest and plan, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.plans import plan_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.onnxruntime.backend import OnnxRuntimeBackend
from vila_deploy.backends.registry import BACKENDS, get_backend
from vila_deploy.backends.tensorrt.backend import TensorRtBackend
from vila_deploy.builder.fit import fit_everywhere
from vila_deploy.builder.memory_plan import EnginePlan
from vila_deploy.builder.resolve import check_module_precision
from vila_deploy.checkpoint.presets import preset
from vila_deploy.checkpoint.tensor_schema import tower_tensor_specs
from vila_deploy.cli.build_engine import main
from vila_deploy.engine.manifest import Limits, load_manifest
from vila_deploy.engine.precision import CHOICES, DefaultChoice, ModulePrecision
from vila_deploy.engine.target import get_target
from vila_deploy.formats.module_dtypes import head_group_size
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

EVERY = [(name, value) for name, values in CHOICES.items() for value in values[1:]]
LIMITS = Limits(1, 4096, 4096)


# Target and backend, its name in messages, and its dtypes beside fp16.
SUPPORTED = [
    (
        "cpu", "onnxruntime", "onnxruntime",
        {"vision": ("int8",), "lm_head": ("int8", "int4"), "kv_cache": ("int8",)},
    ),
    (
        "h100", "native", "native",
        {"vision": ("int8",), "lm_head": ("int8", "int4"), "kv_cache": ("int8",)},
    ),
    ("a100", "tensorrt", "tensorrt-rtx", {"vision": ("int8",), "lm_head": ("int8", "int4")}),
    ("orin", "tensorrt", "tensorrt", {"lm_head": ("int8", "int4")}),
    ("a100", "tensorrt-llm", "tensorrt-llm", {}),
    ("orin", "edge-llm", "edge-llm", {}),
    (
        "vulkan", "llamacpp", "llamacpp",
        {"vision": ("int8",), "lm_head": ("int8",), "kv_cache": ("int8",)},
    ),
]  # fmt: skip


def test_every_backend_says_what_it_has() -> None:
    assert {backend for _, backend, _, _ in SUPPORTED} == BACKENDS.keys()
    for target, name, title, dtypes in SUPPORTED:
        backend, device = get_backend(name), get_target(target)
        assert backend.title(device) == title
        assert {k: tuple(v) for k, v in backend.supported_dtypes(device).items()} == dtypes


@pytest.mark.parametrize(("name", "value"), EVERY)
@pytest.mark.parametrize(("target", "backend_name", "title", "dtypes"), SUPPORTED)
def test_what_a_backend_lacks_is_refused_with_those_that_have_it(
    target: str, backend_name: str, title: str, dtypes: Any, name: str, value: str
) -> None:
    asked, device = ModulePrecision(**{name: value}), get_target(target)
    backend = get_backend(backend_name)
    if value in dtypes.get(name, ()):
        check_module_precision(device, backend, asked)
        assert backend.supported_part(device, asked) == asked
        return
    assert backend.supported_part(device, asked) == ModulePrecision()
    with pytest.raises(VilaDeployError) as raised:
        check_module_precision(device, backend, asked)
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith(f"backend {title} has --{name.replace('_', '-')} fp16")
    able = [other for other in device.backends if get_backend(other).supports(device, name, value)]
    assert all(other in raised.value.fix for other in able)
    assert ("--backend" in raised.value.fix) == bool(able)


def test_files_of_older_versions_have_fp16(tmp_path: Path) -> None:
    asked = ModulePrecision("int8", "int4", "int8")
    assert ModulePrecision.from_fields(Fields({"components": asked.to_json()}, tmp_path)) == asked
    assert ModulePrecision.from_fields(Fields({}, tmp_path)) == ModulePrecision()
    with pytest.raises(VilaDeployError, match="lm_head"):
        ModulePrecision.from_fields(
            Fields({"components": {**asked.to_json(), "lm_head": "int2"}}, tmp_path)
        )


def plan(
    module_precision: ModulePrecision, target: str = "rtx4090", model: str = "VILA1.5-3b"
) -> EnginePlan:
    row = get_target(target)
    config = preset(model, "int4")
    return plan_engine(config, row, row.default_backend, "int4", LIMITS, module_precision)


def part(planned: EnginePlan, begins: str) -> Any:
    return next(part for part in planned.items.values() if part.name.startswith(begins))


def test_plan_counts_them() -> None:
    llm, plain = preset("VILA1.5-3b", "int4").llm, plan(ModulePrecision())
    table = llm.vocab_size * llm.hidden_size
    int8, int4 = (plan(ModulePrecision(lm_head=value)) for value in ("int8", "int4"))
    assert part(plain, "llm head").bytes == 2 * table
    assert part(int8, "llm head").bytes == table + 4 * table // 128
    assert part(int4, "llm head").bytes == table // 2 + 2 * table // 128
    assert int4.device_bytes < int8.device_bytes < plain.device_bytes
    cache = plan(ModulePrecision(kv_cache="int8"))
    vectors = 2 * llm.num_layers * llm.num_kv_heads * LIMITS.max_seq_len
    assert part(cache, "key").bytes == vectors * (llm.head_dim + 2)
    assert part(cache, "key").parameters == part(plain, "key").parameters


@pytest.mark.parametrize("model", ["VILA1.5-3b", "VILA1.5-40b"])
def test_plan_counts_the_tower_s_matrices(model: str) -> None:
    plain, int8 = (
        plan(value, model=model) for value in (ModulePrecision(), ModulePrecision(vision="int8"))
    )
    tensors = list(tower_tensor_specs(preset(model, "int4")))
    layers = [t for t in tensors if ".layers." in t.name and t.name.endswith(".weight")]
    matrices = [t.shape for t in layers if len(t.shape) == 2]
    saved = sum(map(math.prod, matrices)) - 2 * sum(rows for rows, _ in matrices)
    assert part(plain, "vision").bytes - part(int8, "vision").bytes == pytest.approx(saved, abs=1)
    assert saved > 0.45 * part(plain, "vision").bytes


def test_groups_of_a_head() -> None:
    assert [head_group_size(n) for n in (2560, 576, 96, 48)] == [128, 64, 32, 16]
    with pytest.raises(VilaDeployError, match="leave --lm-head out"):
        head_group_size(40)


def test_other_targets_are_planned_with_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, dtypes in ((OnnxRuntimeBackend, {}), (TensorRtBackend, CHOICES)):
        monkeypatch.setattr(backend, "supported_dtypes", lambda self, target, d=dtypes: d)
    config = preset("VILA1.5-3b", "int4")
    plain, small = (
        {fit.target: fit.device_bytes for fit in fit_everywhere(config, "int4", LIMITS, value)}
        for value in (ModulePrecision(), ModulePrecision("int8", "int4", "int8"))
    )
    assert small["cpu"] == plain["cpu"]
    assert small["a100"] < plain["a100"]


def build(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_command_refuses_in_one_line_before_any_work(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for extra in (["-o", tmp_path / "engine"], ["--plan"]):
        code, output = build(checkpoint, "--target", "rtx4090", "--kv-cache", "int8", *extra)
        assert code == 1
        assert output.count("\n") == 1
        assert "--kv-cache fp16, not int8" in output
    assert not (tmp_path / "engine").exists()


INT4 = {"quantized": True}


@pytest.mark.parametrize(
    ("checkpoint", "flags", "head", "activations"),
    [
        (INT4, [], "int8", "int8"),
        (INT4, ["--lm-head", "fp16", "--activations", "int8x2"], "fp16", "int8x2"),
        (INT4, ["--lm-head", "int4", "--activations", "fp32"], "int4", "fp32"),
        (INT4, ["--lm-head", "fp16"], "fp16", "int8"),
        ({}, [], "fp16", None),
    ],
)
def test_head_and_activations_are_chosen_by_the_backend_unless_given(
    tmp_path: Path, checkpoint: Any, flags: list[str], head: str, activations: str | None
) -> None:
    root, out = make_checkpoint(tmp_path / "c", **checkpoint), tmp_path / "engine"
    code, output = build(root, "--target", "cpu", "-o", out, *flags)
    assert code == 0, output
    manifest = load_manifest(out)
    assert (manifest.module_precision.lm_head, manifest.activations) == (head, activations)
    asked = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    chosen = {"vision", "lm_head", "activations"} if checkpoint else set()
    assert manifest.defaults.keys() == chosen - asked


def test_a_backend_says_why_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = DefaultChoice("int8", "a quarter of the memory")
    plain = DefaultChoice("fp16")
    monkeypatch.setattr(
        OnnxRuntimeBackend,
        "default_dtype",
        lambda self, module, *_: choice if module == "lm_head" else plain,
    )
    root, out = make_checkpoint(tmp_path / "c", quantized=True), tmp_path / "engine"
    code, output = build(root, "--target", "cpu", "-o", out)
    assert code == 0, output
    assert "--lm-head int8 by default: a quarter of the memory" in output
    manifest = load_manifest(out)
    assert manifest.module_precision.lm_head == "int8"
    assert manifest.defaults["lm_head"] == "a quarter of the memory"


@pytest.mark.parametrize(
    ("checkpoint", "target", "words"),
    [
        (INT4, "h100", "--activations is for backend onnxruntime, not for native; leave it out"),
        (INT4, "orin", "--activations is for backend onnxruntime, not for tensorrt; leave it out"),
        ({}, "cpu", "--activations is for 4-bit linears, this language model is fp16; leave"),
    ],
)
def test_activations_are_refused_where_there_is_no_choice(
    tmp_path: Path, checkpoint: Any, target: str, words: str
) -> None:
    root = make_checkpoint(tmp_path / "checkpoint", **checkpoint)
    code, output = build(root, "--target", target, "--activations", "int8", "--plan")
    assert code == 1
    assert words in output
    assert output.count("\n") == 1


def test_head_of_other_backends_stays_fp16(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "checkpoint", **INT4)
    shown = json.loads(build(root, "--target", "orin", "--plan", "--json")[1])
    assert shown["kept_as"]["lm_head"] == "fp16"


def test_plan_says_what_is_kept_in_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeBackend, "supported_dtypes", lambda self, target: CHOICES)
    arguments = [make_checkpoint(tmp_path / "c"), "--target", "cpu", "--plan", "--lm-head", "int8"]
    assert "lm-head int8: needs" in build(*arguments)[1]
    shown = json.loads(build(*arguments, "--json")[1])
    assert shown["kept_as"] == {"vision": "fp16", "lm_head": "int8", "kv_cache": "fp16"}
