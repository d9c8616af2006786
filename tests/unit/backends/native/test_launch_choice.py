"""The preferred launch mode is taken for equal bytes alone; what else happens is said in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vila_deploy.backends.native import launch_choice
from vila_deploy.backends.native.decode_step import StepConfig
from vila_deploy.backends.native.launch_choice import LaunchChoice, choose_launch_mode, equal_bytes
from vila_deploy.checkpoint.presets import preset
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import AUTOMATIC, LAUNCH_MODES, PREFERRED, possible_modes
from vila_deploy.utils.errors import VilaDeployError

H200 = ComputeCapability(9, 0)
LLM = preset("VILA1.5-3b", "int4").llm
OPEN = StepConfig(LLM, 64, H200, "cuda", *possible_modes(AUTOMATIC, H200))


def usual_outputs() -> list[Tensor]:
    return [torch.tensor([1.0, float("nan")]), torch.tensor([3], dtype=torch.int32)]


class Device:
    """Says what it was asked for, and stops in the middle of what doesn't end."""

    def __init__(self) -> None:
        self.ends = True

    def event(self) -> Any:
        return SimpleNamespace(record=lambda: None, query=lambda: self.ends)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(launch_choice, "LIMIT_S", 0.0)
    return device


def choose(
    of_preferred: Callable[[], Sequence[Tensor]],
    of_usual: Callable[[], Sequence[Tensor]] = usual_outputs,
) -> tuple[StepConfig, LaunchChoice]:
    """Prepared steps are their config here."""

    def outputs(steps: StepConfig) -> Sequence[Tensor]:
        preferred = steps.launch_mode == LAUNCH_MODES[PREFERRED]
        return of_preferred() if preferred else of_usual()

    return choose_launch_mode(OPEN, lambda config: config, outputs)


def test_equal_bytes_are_taken_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    steps, choice = choose(usual_outputs)
    assert steps.launch_mode == LAUNCH_MODES[PREFERRED]
    assert choice.mode == PREFERRED
    assert choice.reason == "its steps have the bytes of separate"
    assert choice.to_json().keys() == {"mode", "reason", "seconds"}
    assert capsys.readouterr().err == ""


def test_other_bytes_are_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    steps, choice = choose(lambda: [usual_outputs()[0], torch.tensor([4], dtype=torch.int32)])
    assert steps is OPEN
    assert choice.mode == "separate"
    said = capsys.readouterr().err
    assert said == (
        "warning: kernels run in launch mode separate, not in pdl-merged-attention-prefetch: "
        "its steps have other bytes than those of separate\n"
    )
    assert choice.reason in said


def test_what_can_not_be_launched_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Sequence[Tensor]:
        raise RuntimeError("CUDA error: operation not supported\nCompile with …")

    steps, choice = choose(fail)
    assert steps is OPEN
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "it can't be launched: CUDA error: operation not supported\n" in said
    assert choice.mode == "separate"


def test_a_mode_that_is_named_is_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    named = replace(OPEN, launch_mode=LAUNCH_MODES["pdl"], preferred_mode=None)
    steps, choice = choose_launch_mode(named, lambda config: config, lambda _: pytest.fail("tried"))
    assert steps is named
    assert choice == LaunchChoice("pdl", "no other was to be tried")
    assert capsys.readouterr().err == ""


def test_a_step_that_does_not_end_is_an_error(device: Device) -> None:
    def hang() -> Sequence[Tensor]:
        device.ends = False
        return usual_outputs()

    with pytest.raises(VilaDeployError, match=r"prefetch fails .* doesn't end.*launch separate"):
        choose(hang)


def test_a_gpu_that_runs_nothing_any_more_is_an_error(device: Device) -> None:
    def break_device() -> Sequence[Tensor]:
        device.ends = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(VilaDeployError, match=r"nothing runs .* any more.*--kernel-launch sep"):
        choose(break_device)


def test_what_it_destroys_is_an_error() -> None:
    weights = torch.tensor([1.0])

    def overwrite() -> Sequence[Tensor]:
        weights.zero_()
        return [weights.clone()]

    with pytest.raises(VilaDeployError, match="other bytes since then"):
        choose(overwrite, lambda: [weights.clone()])


def test_bytes_are_compared_not_numbers() -> None:
    assert equal_bytes([torch.tensor([float("nan")])], [torch.tensor([float("nan")])])
    assert not equal_bytes([torch.tensor([0.0])], [torch.tensor([-0.0])])
