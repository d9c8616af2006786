"""A server inside the test's process, on a free port, and its unmodified OpenAI client."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from PIL import Image

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine
from vila_deploy.runtime.scheduler import Scheduler
from vila_deploy.server.api import Api
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.remote_images import Network
from vila_deploy.server.run_server import Server, bind, url

NAME = "tiny-vila"
Case = tuple[str, list[Image.Image]]  # a question and its images
KEY = "correct horse battery".replace(" ", "-")


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    api: Api
    server: Server

    @property
    def engine(self) -> OpenedEngine:
        return self.api.engine

    def openai(self, **options: Any) -> OpenAI:
        """Return OpenAI's client for this server; it asks once."""
        options = {"api_key": KEY, "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the labels that aren't given."""
        total = 0.0
        for line in self.http().get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            shown = [f'{label}="{text}"' for label, text in labels.items()]
            if head.split("{")[0] == f"vila:{name}" and all(item in head for item in shown):
                total += float(value)
        return total


@contextmanager
def serving(
    folder: Path,
    network: Network | None = None,
    slots: int = 8,
    queue_size: int = 64,
    options: ServerOptions | None = None,
    pause_s: float = 0.0,
) -> Iterator[Running]:
    """Serve the engine in `folder` until the block ends.

    Args:
        pause_s: before each decode step, for what has to happen while answers run.
    """
    with open_engine(folder, slots) as engine:
        if pause_s:
            _slow_down(engine.session, pause_s)
        scheduler = Scheduler(engine, queue_size)
        api = Api(engine, scheduler, options or ServerOptions((NAME,)), network)
        listener, started = bind("127.0.0.1", 0), threading.Event()
        address = url(listener, secure=False)
        server = Server(api, on_start=started.set)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert started.wait(30)
        try:
            yield Running(address, api, server)
        finally:
            server.stop()
            thread.join(60)
            scheduler.close()
            api.close()


def _slow_down(session: Any, pause_s: float) -> None:
    decode = session.decode

    def slowly(*args: Any) -> Any:
        time.sleep(pause_s)
        return decode(*args)

    session.decode = slowly


def wait_until(condition: Callable[[], object], timeout_s: float = 300) -> None:
    """Wait for a condition to hold; the limit is only reached where something is wrong."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    """Return an image as a data: URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(image: Image.Image) -> dict[str, Any]:
    """Return the part of a message that holds an image."""
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


# An answer of this schema has as many tokens as it may.
ENDLESS = {
    "type": "json_schema",
    "json_schema": {"name": "endless", "schema": {"type": "array", "minItems": 10**6}},
}


def asks(text: str, *images: Image.Image) -> dict[str, Any]:
    """Return a user's message: images, then text."""
    parts = [*map(image_part, images), {"type": "text", "text": text}]
    return {"role": "user", "content": parts if images else text}


def chat_answers(folder: Path, cases: Sequence[Case], max_tokens: int) -> list[tuple[str, int]]:
    """Return text and number of tokens that an engine's own conversation gives, as vila-chat's."""
    sampling = SamplingParams(max_new_tokens=max_tokens)
    with open_engine(folder) as engine:
        answers = [engine.chat().ask(text, images, sampling) for text, images in cases]
    return [(answer.text, len(answer.tokens)) for answer in answers]


def served_answers(
    server: Running, cases: Sequence[Case], max_tokens: int, at_once: int, timeout_s: float = 60
) -> list[tuple[str, int]]:
    """Return the same of a server, which is asked `at_once` questions at a time."""
    client = server.openai(timeout=timeout_s)

    def ask(case: Case) -> tuple[str, int]:
        text, images = case
        answer = client.chat.completions.create(
            model=NAME, messages=[asks(text, *images)], max_tokens=max_tokens
        )
        return answer.choices[0].message.content, answer.usage.completion_tokens

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(ask, cases))
