"""vila-serve with vLLM behind it as processes, and our own engines' answers to compare with."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.commands import BIN
from tests.support.openai_messages import as_openai
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.runtime.prompt import Message

START_S = 900.0
NEW_TOKENS = 96
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


class Served:
    """A command that serves at `url`."""

    def __init__(self, words: Sequence[object], port: int, log: Path):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                [*map(str, words)], stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT}
            )

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.popen.poll() is None, self.log.read_text("utf-8", "replace")[-4000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1)
        raise AssertionError(self.log.read_text("utf-8", "replace")[-4000:])

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(120)


@contextmanager
def serve(words: Sequence[object], port: int, log: Path, ready: bool = True) -> Iterator[Served]:
    """Run a command until the block ends."""
    served = Served(words, port, log)
    try:
        if ready:
            served.wait_until_ready()
        yield served
    finally:
        if served.popen.poll() is None:
            served.stop()


def vila_serve(checkpoint: Path, port: int, *options: object) -> list[object]:
    return [BIN / "vila-serve", checkpoint, "--backend", "vllm", "--port", port, *options]


def ask(url: str, messages: Sequence[Message], retries: int = 0) -> str:
    """Return the greedy answer of a server; a router answers 5xx where a replica has gone."""
    body: dict[str, Any] = {
        "messages": as_openai(messages), "temperature": 0, "max_tokens": NEW_TOKENS,
        "model": "m",
    }  # fmt: skip
    for attempt in range(retries + 1):
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
        if response.status_code < 500 or attempt == retries:
            break
        time.sleep(1)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"]).strip()


def ask_all(url: str, conversations: Sequence[Sequence[Message]], at_once: int = 8) -> list[str]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda messages: ask(url, messages), conversations))


def own_answers(engine: Path, questions: Sequence[Any]) -> list[str]:
    """Return what vila-chat answers to questions of tiny-vila."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
    with open_engine(engine) as opened:
        return [
            opened.chat().ask(question.prompt, list(question.images), sampling).text
            for question in questions
        ]


def as_messages(question: Any) -> list[Message]:
    """Return a question of tiny-vila with its images where its text marks them."""
    if "<image>" not in question.prompt:
        return [Message("user", (*question.images, question.prompt))]
    pieces = question.prompt.split("<image>\n")
    parts: list[Any] = [pieces[0]] if pieces[0] else []
    for image, piece in zip(question.images, pieces[1:], strict=True):
        parts += [image, piece]
    return [Message("user", tuple(parts))]
