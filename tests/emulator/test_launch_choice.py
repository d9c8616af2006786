"""Sessions that may choose their launch mode, of compiled kernels: proven, refused, or broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.inputs import config, random_llm
from tests.support.emulator import mutate
from tests.support.emulator.capabilities import NEWEST
from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.libcuda import PROGRAMMATIC_STREAM_SERIALIZATION
from vila_deploy.backends.native.decode_step import StepConfig
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.slotted_session import SlottedSession
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.session import OneSlot, choices_of
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import AUTOMATIC, PREFERRED, possible_modes

pytestmark = pytest.mark.slow
MAX_SEQ_LEN, SLOTS = 24, 2
PROMPT = [3, 20, 21]
Opened = NativeSession | SlottedSession


@pytest.fixture(autouse=True)
def device(emulated_device: EmulatedDevice) -> EmulatedDevice:
    emulated_device.capability = NEWEST
    return emulated_device


def open_session(*, several: bool = False, kernel_launch: str = AUTOMATIC) -> Opened:
    torch.manual_seed(0)
    sizes = replace(config("8B", "int4", small=True), num_layers=1)
    modes = possible_modes(kernel_launch, NEWEST)
    step_config = StepConfig(sizes, MAX_SEQ_LEN, NEWEST, "cuda", *modes)
    parts = step_config, random_llm(sizes, MAX_SEQ_LEN, "cuda"), torch.nn.Identity(), ALL_FP16
    if several:
        return SlottedSession.of_parts(*parts, SLOTS)  # type: ignore[arg-type]
    return NativeSession.of_parts(*parts)  # type: ignore[arg-type]


def next_token(session: Opened) -> int:
    """The token behind the one that follows the prompt, chosen by a captured step."""
    embeds = session.embed_tokens(PROMPT)
    if isinstance(session, NativeSession):
        session.prefill(embeds)
        return session.decode_greedy(1)[0]
    logits = session.prefill(1, embeds)
    (token,), _ = session.next_tokens([1], [int(logits.argmax())])
    return token


def begun_early(device: EmulatedDevice) -> set[bool]:
    """Whether launches since the records were cleared were begun before the ones before ended."""
    return {
        bool(record.attributes.get(PROGRAMMATIC_STREAM_SERIALIZATION)) for record in device.records
    }


@pytest.mark.parametrize("several", [False, True])
def test_equal_bytes_are_taken(
    several: bool, device: EmulatedDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = open_session(several=several, kernel_launch="separate")
    session = open_session(several=several)
    assert "warning" not in capsys.readouterr().err
    chosen = choices_of(OneSlot(session) if isinstance(session, NativeSession) else session)
    assert chosen["kernel_launch"]["mode"] == PREFERRED
    assert next_token(session) == next_token(plain)
    device.records.clear()
    session.decode(*(([1], [7]) if several else (7,)))  # type: ignore[arg-type]
    assert begun_early(device) == {True}


@pytest.mark.parametrize("several", [False, True])
def test_other_bytes_are_refused(
    several: bool,
    device: EmulatedDevice,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One kernel computes something else when it is begun early."""
    early = Launch.with_pdl

    def sabotaged(launch: Launch) -> Launch:
        changed = early(launch)
        if launch.name != "gate_up_kernel":
            return changed
        return replace(changed, args=changed.args | {"epsilon": 1.0})

    plain = open_session(several=several, kernel_launch="separate")
    monkeypatch.setattr(Launch, "with_pdl", sabotaged)
    capsys.readouterr()
    session = open_session(several=several)
    said = capsys.readouterr().err
    assert "separate, not in pdl-merged-attention-prefetch: its steps have other bytes" in said
    assert session.choices["kernel_launch"]["mode"] == "separate"
    assert next_token(session) == next_token(plain)
    device.records.clear()
    session.decode(*(([1], [7]) if several else (7,)))  # type: ignore[arg-type]
    assert begun_early(device) == {False}


@contextmanager
def without_waits(device: EmulatedDevice, name: str) -> Iterator[None]:
    """Kernels of that name, begun early, no longer wait for what the one before writes."""
    kept = list(device._kernels)
    for index, kernel in enumerate(kept):
        for wait in mutate.grid_waits(kernel) if kernel.name == name else ():
            device._kernels[index] = mutate.without(kernel, wait)
    assert device._kernels != kept
    yield
    device._kernels[:] = kept


@pytest.mark.parametrize("several", [False, True])
def test_what_faults_is_refused(
    several: bool, device: EmulatedDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    open_session(several=several)
    with without_waits(device, "gate_up_kernel"):
        session = open_session(several=several)
    said = capsys.readouterr().err
    assert "it can't be launched: " in said
    assert "before griddepcontrol.wait" in said
    assert session.choices["kernel_launch"]["mode"] == "separate"
    device.records.clear()
    next_token(session)
    assert begun_early(device) == {False}


def test_a_mode_that_is_named_runs_at_once(device: EmulatedDevice) -> None:
    session = open_session(kernel_launch="merged-attention")
    assert session.choices["kernel_launch"]["mode"] == "merged-attention"
    assert begun_early(device) == {False}
