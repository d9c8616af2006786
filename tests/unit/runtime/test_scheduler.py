"""Many requests at once on one engine: the same answers as one after the other."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny import make_checkpoint
from vila_deploy import SamplingParams, build_engine, open_engine, quantize
from vila_deploy.runtime.open_engine import OpenedEngine
from vila_deploy.runtime.prompt import Message, Prompt, prepare_prompt
from vila_deploy.runtime.request import Event, Failed, Finished, GenerationRequest, TextPiece
from vila_deploy.runtime.scheduler import QueueFull, Scheduler, ShuttingDown
from vila_deploy.utils.errors import VilaDeployError

# `make test-serve` asks 1000.
REQUESTS = int(os.environ.get("MIXED_REQUESTS", "96"))
WORDS = ("rain", "sun", "the", "river", "a fox", "wood", "house", "light")


@dataclass
class Collected:
    """All events of a request, and the wait for its last one."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.done.set()

    def finished(self) -> Finished:
        assert self.done.wait(120)
        last = self.events[-1]
        assert isinstance(last, Finished), last
        assert "".join(e.text for e in self.events if isinstance(e, TextPiece)) == last.text
        return last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scheduler")
    make_checkpoint(root / "c")
    quantize(str(root / "c"), root / "q", algorithm="rtn", group_size=64)
    # With two int8 terms answers don't depend on what else runs, bit for bit.
    exact = {"activations": "int8x2", "vision": "fp16", "lm_head": "fp16"}
    build_engine(root / "q", str(root / "e"), "cpu", max_seq_len=320, **exact)
    return root / "e"


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[OpenedEngine]:
    with open_engine(folder) as opened:
        yield opened


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return Image.fromarray(values)


def prompt_of(engine: OpenedEngine, *content: object) -> Prompt:
    assert engine.tokenizer is not None
    return prepare_prompt([Message("user", content)], engine.model, engine.tokenizer)  # type: ignore[arg-type]


def questions(count: int) -> list[tuple[object, ...]]:
    return [
        (noise(number % 3), f"What is the {WORDS[number % len(WORDS)]}?")
        if number % 2
        else (f"Tell of {WORDS[number % len(WORDS)]} and {WORDS[(number // 3) % len(WORDS)]}",)
        for number in range(count)
    ]


def submit_all(
    scheduler: Scheduler, engine: OpenedEngine, asked: Sequence[tuple[object, ...]], **options: int
) -> list[Collected]:
    answers = [Collected() for _ in asked]
    for content, answer in zip(asked, answers, strict=True):
        request = GenerationRequest(
            prompt_of(engine, *content), SamplingParams(options.get("tokens", 8))
        )
        scheduler.submit(request, answer)
    return answers


def test_answers_are_those_of_a_conversation(engine: OpenedEngine) -> None:
    asked = questions(8)
    expected = [
        engine.chat().ask(content[-1], content[:-1], SamplingParams(8)).tokens  # type: ignore[arg-type]
        for content in asked
    ]
    scheduler = Scheduler(engine)
    try:
        answers = submit_all(scheduler, engine, asked)
        found = [answer.finished() for answer in answers]
        stats = scheduler.stats()
    finally:
        scheduler.close()
    assert [list(finished.tokens) for finished in found] == expected
    assert stats.ended == {"length": 8}
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.image_hits > 0 < stats.prefix_hits


def test_a_full_queue_and_a_closed_scheduler_refuse(engine: OpenedEngine) -> None:
    scheduler = Scheduler(engine, queue_size=1)
    slots = engine.session.slots
    answers = submit_all(scheduler, engine, questions(slots + 1), tokens=40)
    with pytest.raises(QueueFull) as refused:
        submit_all(scheduler, engine, questions(1))
    assert 1 <= refused.value.retry_after_s <= 60
    assert scheduler.drain(60)
    assert all(answer.finished().finish_reason == "length" for answer in answers)
    with pytest.raises(ShuttingDown):
        submit_all(scheduler, engine, questions(1))
    scheduler.close()
    assert not scheduler.alive


def test_too_long_a_prompt_is_refused_at_once(engine: OpenedEngine) -> None:
    scheduler = Scheduler(engine)
    with pytest.raises(VilaDeployError, match="the prompt takes"):
        submit_all(scheduler, engine, [("long " * 400,)])
    scheduler.close()


def test_cancelled_and_late_requests_end(engine: OpenedEngine) -> None:
    scheduler = Scheduler(engine)
    running, waiting, late = Collected(), Collected(), Collected()
    long = GenerationRequest(prompt_of(engine, "Hi"), SamplingParams(200))
    first = scheduler.submit(long, running)
    second = scheduler.submit(long, waiting)
    scheduler.submit(
        GenerationRequest(prompt_of(engine, "Hi"), SamplingParams(200), deadline_s=0.0), late
    )
    second.cancel()
    assert waiting.finished().finish_reason == "cancelled"
    assert late.finished().finish_reason == "timeout"
    first.cancel()
    assert running.finished().finish_reason in ("cancelled", "length")
    assert first.done
    scheduler.close()


def mixed_prompts(engine: OpenedEngine, count: int) -> list[Prompt]:
    """Conversations that begin alike: few images, few first questions, turns that go on."""
    generator = random.Random(5)
    images = [noise(seed) for seed in range(4)]
    prompts = []
    for _ in range(count):
        messages = []
        for turn in range(generator.choice((1, 1, 2, 3))):
            words = " ".join(generator.choices(WORDS[:3], k=generator.choice((1, 2, 9))))
            content: tuple[object, ...] = (words,)
            if generator.random() < (0.6 if not turn else 0.1):
                content = (generator.choice(images), words)
            messages += [Message("user", content), Message("assistant", (WORDS[turn],))]  # type: ignore[arg-type]
        assert engine.tokenizer is not None
        prompts.append(prepare_prompt(messages[:-1], engine.model, engine.tokenizer))
    return prompts


def tokens_of(
    engine: OpenedEngine, prompts: Sequence[Prompt], **options: bool
) -> tuple[list[tuple[int, ...]], Scheduler]:
    scheduler = Scheduler(engine, queue_size=len(prompts), **options)  # type: ignore[arg-type]
    answers = [Collected() for _ in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        scheduler.submit(GenerationRequest(prompt, SamplingParams(6)), answer)
    tokens = [answer.finished().tokens for answer in answers]
    scheduler.close()
    return tokens, scheduler


@pytest.mark.parametrize("slots", [1, 8])
def test_cached_prefixes_change_no_token(folder: Path, slots: int) -> None:
    """Two int8 terms: alone and with 7 others, with the cache and without, bit for bit."""
    with open_engine(folder) as alone:
        prompts = mixed_prompts(alone, REQUESTS)
        expected, _ = tokens_of(alone, prompts, reuse_prefixes=False)
    with open_engine(folder, slots) as engine:
        found, scheduler = tokens_of(engine, prompts)
        stats = scheduler.stats()
        held = [engine.session.length(slot) for slot in range(slots)]
    assert found == expected
    assert len(set(expected)) > 12
    assert stats.prefix_hits > 0.5 * stats.prefix_queries
    assert stats.image_hits > 0
    assert stats.ended == {"length": REQUESTS}
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.cache_usage == pytest.approx(sum(held) / (slots * engine.session.max_seq_len))
    if slots == 8:
        assert stats.decoded_rows > 2 * stats.decode_steps


def test_sampled_answers_repeat_whoever_else_is_served(folder: Path) -> None:
    """Draws come from each request's own seed."""
    with open_engine(folder, 4) as engine:
        prompts = mixed_prompts(engine, 4)
        draws = SamplingParams(12, 1.0, 0.9, seed=7, top_k=50, repetition_penalty=1.1)
        scheduler = Scheduler(engine)

        def ask(chosen: Sequence[Prompt]) -> list[tuple[int, ...]]:
            answers = [Collected() for _ in chosen]
            for prompt, answer in zip(chosen, answers, strict=True):
                scheduler.submit(GenerationRequest(prompt, draws), answer)
            return [answer.finished().tokens for answer in answers]

        together = ask(prompts)
        assert [ask([prompt])[0] for prompt in prompts] == together
        scheduler.close()
