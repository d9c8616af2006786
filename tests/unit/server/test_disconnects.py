"""A client that goes away gives its place back at once, whatever it was waiting for."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.serving import ENDLESS, NAME, Running, asks, serving, wait_until

LONG: dict[str, Any] = {
    "model": NAME, "messages": [asks("Hi")], "response_format": ENDLESS, "max_tokens": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def slow(engine_folder: Path) -> Iterator[Running]:
    """A server whose answers take long."""
    with serving(engine_folder, slots=2, pause_s=0.02) as running:
        yield running


def raw(server: Running, body: bytes, declared: int | None = None) -> socket.socket:
    """Send a request and return its connection."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {declared or len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def running(server: Running) -> int:
    return server.api.scheduler.stats().running


def waiting(server: Running) -> int:
    return server.api.scheduler.stats().waiting


def aborts(server: Running) -> int:
    return server.api.scheduler.stats().ended.get("cancelled", 0)


def is_idle(server: Running) -> bool:
    """Nothing runs, waits, or holds bytes."""
    budget = server.api.budget.free_bytes == server.api.options.body_bytes_in_flight
    return running(server) == waiting(server) == 0 and budget


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_while_it_is_answered(slow: Running, stream: bool) -> None:
    before = aborts(slow)
    with raw(slow, json.dumps({**LONG, "stream": stream}).encode()):
        wait_until(lambda: running(slow) == 1)
    wait_until(lambda: is_idle(slow))
    assert aborts(slow) == before + 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_while_it_waits_for_a_slot(slow: Running, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    slots, before = slow.engine.session.slots, aborts(slow)
    others = [raw(slow, body) for _ in range(slots)]
    wait_until(lambda: running(slow) == slots)
    with raw(slow, body):
        wait_until(lambda: waiting(slow) == 1)
    wait_until(lambda: waiting(slow) == 0)
    assert aborts(slow) == before + 1, "the others go on"
    for other in others:
        other.close()
    wait_until(lambda: is_idle(slow))
    assert aborts(slow) == before + 1 + slots


def test_in_the_middle_of_its_body(slow: Running) -> None:
    with raw(slow, b'{"messages": ', declared=1000):
        wait_until(lambda: not is_idle(slow))
    wait_until(lambda: is_idle(slow))


def test_a_client_that_only_closes_its_sending_half_is_gone(slow: Running) -> None:
    before = aborts(slow)
    with raw(slow, json.dumps(LONG).encode()) as connection:
        wait_until(lambda: running(slow) == 1)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: is_idle(slow))
    assert aborts(slow) == before + 1


def test_the_body_takes_no_room_while_it_is_answered(slow: Running) -> None:
    with raw(slow, json.dumps(LONG).encode()):
        wait_until(lambda: running(slow) == 1)
        assert slow.api.budget.free_bytes == slow.api.options.body_bytes_in_flight
    wait_until(lambda: is_idle(slow))


def test_many_that_come_and_go(slow: Running) -> None:
    """Of forty clients at any stage none leaves anything behind."""
    body = json.dumps({**LONG, "stream": True}).encode()
    started = threading.Barrier(40)

    def visit(number: int) -> None:
        started.wait(30)
        with raw(slow, body if number % 4 else body[:-5], declared=len(body)) as connection:
            connection.settimeout(0.02 * (number % 9) + 0.01)
            try:
                connection.recv(100)
            except TimeoutError:
                return

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    wait_until(lambda: is_idle(slow))
    stats = slow.api.scheduler.stats()
    assert stats.ended.get("error", 0) == 0
    assert slow.http().get("/health").status_code == 200
