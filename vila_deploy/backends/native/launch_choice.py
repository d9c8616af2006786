"""The launch mode that a session runs in: the preferred one where it gives equal bytes here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vila_deploy.backends.native.decode_step import DecodeStep, StepConfig
from vila_deploy.kernels.launch_mode import mode_name
from vila_deploy.utils.errors import VilaDeployError, printable

# Steps of each graph that are compared, one behind the other; the second goes on from the first.
TRIED_STEPS = 2
# Some steps take milliseconds; one that takes so long doesn't end.
LIMIT_S, POLL_S = 20.0, 1e-3

Steps = TypeVar("Steps")


class EndlessStep(VilaDeployError):
    """Kernels that were launched don't end; nobody can take them from the GPU again."""


@dataclass(frozen=True)
class LaunchChoice:
    """A name in LAUNCH_MODES, why it is that one, and the seconds that it took to find out."""

    mode: str
    reason: str
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the row of a session's `choices`."""
        return asdict(self)


def choose_launch_mode(
    config: StepConfig,
    prepare: Callable[[StepConfig], Steps],
    outputs: Callable[[Steps], Sequence[Tensor]],
) -> tuple[Steps, LaunchChoice]:
    """Return captured steps, in the preferred mode if they give the same bytes.

    If they give others, or can't be launched, a line on stderr says so.

    Args:
        prepare: makes steps and captures them.
        outputs: what some of them leave, each time from the same inputs.

    Raises:
        VilaDeployError: the preferred mode left the GPU in a state in which nothing runs, or
            nothing as before.
    """
    steps, usual = prepare(config), mode_name(config.launch_mode)
    if config.preferred_mode is None:
        return steps, LaunchChoice(usual, "no other was to be tried")
    preferred, begun = mode_name(config.preferred_mode), time.perf_counter()

    def chosen(mode: str, reason: str) -> LaunchChoice:
        return LaunchChoice(mode, reason, time.perf_counter() - begun)

    expected = outputs(steps)
    wait_for_device()
    try:
        others = prepare(replace(config, launch_mode=config.preferred_mode))
        found = outputs(others)
        wait_for_device()
        if equal_bytes(found, expected):
            return others, chosen(preferred, f"its steps have the bytes of {usual}")
        reason = f"its steps have other bytes than those of {usual}"
    except EndlessStep as error:
        raise _unusable(preferred, error.what) from error
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"it can't be launched: {printable(lines[0])}"
    _check_still_the_same(outputs, steps, expected, preferred)
    print(
        f"warning: kernels run in launch mode {usual}, not in {preferred}: {reason}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return steps, chosen(usual, f"{preferred}: {reason}")


def equal_bytes(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal bit by bit, numbers that are none included."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def captured(step: DecodeStep, *, sampled: bool) -> torch.cuda.CUDAGraph:
    """Return the step as a graph, behind a run that loads its kernels."""
    step(sampled=sampled)
    wait_for_device()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(sampled=sampled)
    return graph


def wait_for_device() -> None:
    """Wait for all that was launched.

    Raises:
        EndlessStep: it doesn't end.
    """
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + LIMIT_S
    while not done.query():
        if time.monotonic() > deadline:
            raise EndlessStep(
                f"a decoding step doesn't end within {LIMIT_S:.0f} s",
                fix="look at the GPU with nvidia-smi: another program may hold it",
            )
        time.sleep(POLL_S)


def _check_still_the_same(
    outputs: Callable[[Steps], Sequence[Tensor]],
    steps: Steps,
    expected: Sequence[Tensor],
    tried: str,
) -> None:
    """Raise VilaDeployError unless the steps give what they gave before `tried` was tried."""
    try:
        again = outputs(steps)
        wait_for_device()
    except Exception as error:
        raise _unusable(tried, "nothing runs on the GPU any more") from error
    if not equal_bytes(again, expected):
        raise _unusable(tried, "other launch modes give other bytes since then")


def _unusable(tried: str, problem: str) -> VilaDeployError:
    return VilaDeployError(
        f"the kernel launch mode {tried} fails on this GPU: {problem}",
        fix="build the engine again with --kernel-launch separate",
    )
