"""Sessions of compiled kernels: sequences decoded together have the bits of each one alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from benchmarks.gpu.inputs import config, random_llm
from tests.support.emulator.capabilities import emulated_capabilities
from tests.support.emulator.device import EmulatedDevice
from vila_deploy.backends.native.decode_step import StepConfig
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.slotted_session import SlottedSession
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.kernels.launch_mode import get_launch_mode

pytestmark = pytest.mark.slow
MAX_SEQ_LEN, MOST = 80, 8
GREEDY = SamplingParams(4)
DRAWN = SamplingParams(4, temperature=1.5, top_p=0.9, seed=3)


@dataclass(frozen=True)
class Sessions:
    """One session that holds a sequence and one that holds eight, of the same weights."""

    lone: NativeSession
    several: SlottedSession

    def alone(self, prompt: list[int], sampling: SamplingParams = GREEDY) -> list[int]:
        self.lone.truncate(0)
        self.lone.prefill(self.lone.embed_tokens(prompt))
        return list(self.lone.stream((), sampling))

    def begin(self, slot: int, prompt: list[int], sampling: SamplingParams = GREEDY) -> int:
        self.several.keep(slot, 0)
        self.several.prefill(slot, self.several.embed_tokens(prompt))
        return self.several.first_token(slot, sampling)

    def go_on(self, answers: dict[int, list[int]], steps: int) -> None:
        """Append so many tokens to the answer of each slot."""
        for _ in range(steps):
            last = [answer[-1] for answer in answers.values()]
            chosen, _ = self.several.next_tokens(list(answers), last)
            for answer, token in zip(answers.values(), chosen, strict=True):
                answer.append(token)


@pytest.fixture(scope="module", params=emulated_capabilities(), ids=str)
def sessions(request: pytest.FixtureRequest) -> Iterator[Sessions]:
    """In turn over both precisions of the cache, with what the newest can besides."""
    from tests.support.emulator.plugin import DEVICE

    DEVICE.capability = request.param
    torch.manual_seed(0)
    llm_config = replace(config("8B", "int4", small=True), num_layers=1)
    mode = get_launch_mode("pdl-merged-attention" if request.param >= (9, 0) else "separate")
    step_config = StepConfig(llm_config, MAX_SEQ_LEN, request.param, "cuda", mode)
    parts = step_config, random_llm(llm_config, MAX_SEQ_LEN, "cuda"), torch.nn.Identity()
    modules = ModulePrecision(kv_cache="int8" if request.param == (8, 0) else "fp16")
    lone = NativeSession.of_parts(*parts, modules)  # type: ignore[arg-type]
    several = SlottedSession.of_parts(*parts, modules, MOST)  # type: ignore[arg-type]
    yield Sessions(lone, several)
    lone.close()
    several.close()


@pytest.fixture(autouse=True)
def device(sessions: Sessions, emulated_device: EmulatedDevice) -> EmulatedDevice:
    emulated_device.capability = sessions.lone._config.capability
    return emulated_device


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths, one of them behind the first block of attention."""
    return [[3 + index, *range(20, 22 + (67 if index == 1 else index))] for index in range(count)]


@pytest.mark.parametrize("count", [2, 8])
def test_each_one_answers_as_alone(sessions: Sessions, count: int) -> None:
    answers = {i: [sessions.begin(i, prompt)] for i, prompt in enumerate(prompts(count))}
    sessions.go_on(answers, 3)
    assert list(answers.values()) == [sessions.alone(prompt) for prompt in prompts(count)]


def test_logits_are_those_of_a_lone_step(sessions: Sessions) -> None:
    first, second = prompts(2)
    lone, several = sessions.lone, sessions.several
    for slot, prompt in ((4, first), (2, second)):
        sessions.begin(slot, prompt)
    rows = several.decode([4, 2], [7, 8])
    for row, prompt, token in zip(rows, (first, second), (7, 8), strict=True):
        lone.truncate(0)
        lone.prefill(lone.embed_tokens(prompt))
        np.testing.assert_array_equal(row, lone.decode(token))


def test_a_finished_ones_room_is_used_again(sessions: Sessions) -> None:
    """The step that ran ahead of both is forgotten, the other's answer is its own."""
    first, second, third = prompts(3)
    answers = {0: [sessions.begin(0, first)], 1: [sessions.begin(1, second)]}
    sessions.go_on(answers, 1)
    assert sessions.several._ahead is not None
    answers[1] = [sessions.begin(1, third)]
    sessions.go_on(answers, 2)
    assert answers[0] == sessions.alone(first)
    assert answers[1] == sessions.alone(third)[:3]
    assert [sessions.several.length(slot) for slot in (0, 1)] == [len(first) + 3, len(third) + 2]


def test_a_step_that_ran_ahead_serves_those_that_go_on(sessions: Sessions) -> None:
    first, second = prompts(2)
    answers = {0: [sessions.begin(0, first)], 1: [sessions.begin(1, second)]}
    sessions.go_on(answers, 2)
    ahead = sessions.several._ahead
    del answers[1]
    steps = []
    launch, sessions.several._launch = sessions.several._launch, lambda *a: steps.append(a)  # type: ignore
    sessions.go_on(answers, 1)
    sessions.several._launch = launch  # type: ignore[method-assign]
    assert ahead is not None
    assert not steps
    assert answers[0] == sessions.alone(first)


def test_what_is_drawn_depends_on_its_own_seed_alone(sessions: Sessions) -> None:
    first, second, third = prompts(3)
    expected = sessions.alone(first, DRAWN), sessions.alone(second), sessions.alone(third, DRAWN)
    answers = {6: [sessions.begin(6, first, DRAWN)], 1: [sessions.begin(1, second)]}
    sessions.go_on(answers, 1)
    answers[0] = [sessions.begin(0, third, DRAWN)]
    sessions.go_on(answers, 2)
    assert (answers[6], answers[1], answers[0]) == (*expected[:2], expected[2][:3])
    # Beside one that is drawn, the next prompt in a slot is greedy again.
    sessions.several.prefill(6, sessions.several.embed_tokens(second))
    chosen, (logits,) = sessions.several.next_tokens([0, 6], [answers[0][-1], 7], logits_of=[1])
    assert chosen[1] == int(logits.argmax())


def test_a_copied_slot_goes_on_like_its_source(sessions: Sessions) -> None:
    _, prompt = prompts(2)
    several = sessions.several
    token = sessions.begin(3, prompt)
    sessions.begin(5, [9, 9])
    several.copy(3, 5, len(prompt))
    rows = several.decode([5, 3], [token, token])
    np.testing.assert_array_equal(rows[0], rows[1])
