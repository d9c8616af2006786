"""Many clients at once, some of whom lose patience."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from tests.support.serving import asks

CHAT = "/v1/chat/completions"


@dataclass
class Totals:
    """What the clients have seen.

    Args:
        answered: whole answers; `tokens` are theirs by their usage, `prompt_tokens` too, and
            `seconds` what their clients waited in all.
        left: requests whose client closed the connection first.
    """

    answered: int = 0
    left: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def patience(self) -> float:
        """Return about how long an answer takes: those who leave do so within it."""
        return self.seconds / self.answered if self.answered else 0.2


def request(rng: random.Random, images: list[Image.Image]) -> bytes:
    """Return a question about an image or none, with an earlier turn or none."""
    shown = rng.sample(images, rng.choice((0, 1, 1, 2)))
    messages = [asks(rng.choice(("What is at the left?", "Describe the image.")), *shown)]
    if rng.random() < 0.4:
        messages += [{"role": "assistant", "content": "A red circle."}, asks("And now?")]
    body: dict[str, Any] = {"messages": messages, "max_tokens": rng.randint(1, 40)}
    if rng.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


async def run_clients(
    url: str,
    clients: int,
    seconds: float,
    images: list[Image.Image],
    seed: int = 0,
    fewest: int = 0,
) -> Totals:
    """Let clients ask one thing after the other; a third of requests is left at any time.

    Args:
        fewest: whole answers, and requests that were left, which slow computers need longer for.
    """
    rng, totals = random.Random(seed), Totals()
    bodies = [request(rng, images) for _ in range(100)]
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
        await asyncio.gather(
            *(
                _client(http, random.Random(seed + n), bodies, totals, end, fewest)
                for n in range(clients)
            )
        )
    return totals


async def _client(
    http: httpx.AsyncClient,
    rng: random.Random,
    bodies: list[bytes],
    totals: Totals,
    end: float,
    fewest: int,
) -> None:
    while not totals.problems and (
        time.monotonic() < end or min(totals.answered, totals.left) < fewest
    ):
        body = rng.choice(bodies)
        leaves = rng.random() < 1 / 3
        try:
            async with asyncio.timeout(rng.uniform(0, totals.patience()) if leaves else None):
                await _ask(http, body, totals)
        except TimeoutError:
            totals.left += 1
        await asyncio.sleep(rng.uniform(0, 0.2))


async def _ask(http: httpx.AsyncClient, body: bytes, totals: Totals) -> None:
    begin = time.monotonic()
    response = await http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    totals.statuses[response.status_code] += 1
    if response.status_code == 429:
        await asyncio.sleep(0.5)
        return
    if response.status_code != 200:
        totals.problems.append(response.text)
        return
    usage = _usage(response)
    totals.answered += 1
    totals.seconds += time.monotonic() - begin
    totals.tokens += usage["completion_tokens"]
    totals.prompt_tokens += usage["prompt_tokens"]


def _usage(response: httpx.Response) -> dict[str, int]:
    if response.headers["content-type"] == "application/json":
        usage: dict[str, int] = response.json()["usage"]
        return usage
    *_, last, done = [line for line in response.text.splitlines() if line]
    assert done == "data: [DONE]", response.text[-300:]
    streamed: dict[str, int] = json.loads(last.removeprefix("data: "))["usage"]
    return streamed
