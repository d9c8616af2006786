"""Damaged requests: no 500, no traceback, no hang, and an error has its form.

MUTATED_REQUESTS=1000 tries as many as that.
"""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.mutated_requests import Request, damaged_request, good_requests
from tests.support.serving import Running, wait_until

COUNT = int(os.environ.get("MUTATED_REQUESTS", "200"))
FOREIGN = ("Traceback", "site-packages", "/tmp", "PIL", "0x7f", "onnx", "llguidance", "regex parse")


def send(client: httpx.Client, request: Request) -> httpx.Response | None:
    """Return the answer; None where the client itself refuses to send."""
    headers = {name: value.encode("latin-1") for name, value in request.headers.items()}
    try:
        return client.request(request.method, request.path, content=request.body, headers=headers)
    except (httpx.LocalProtocolError, httpx.InvalidURL):
        return None


def check(response: httpx.Response, damage: str) -> None:
    text = response.text
    assert response.status_code < 500, (damage, text)
    for word in FOREIGN:
        assert word not in text, (damage, text)
    if text and response.headers["content-type"] == "application/json" and response.is_error:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}, damage


def test_good_requests_are_answered(server: Running) -> None:
    for path, values in good_requests():
        response = server.http().post(path, json=values)
        assert response.status_code == 200, response.text


@pytest.mark.timeout(900)
def test_damaged_requests(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    requests = [damaged_request(random.Random(seed)) for seed in range(COUNT)]
    with ThreadPoolExecutor(4) as threads, server.http() as client:
        responses = list(threads.map(lambda request: send(client, request), requests))
    statuses = [response.status_code for response in responses if response is not None]
    for request, response in zip(requests, responses, strict=True):
        if response is not None:
            check(response, request.damage)
    assert caplog.records == []
    assert statuses.count(200) > COUNT // 20, "some damage does no harm"
    assert statuses.count(400) > COUNT // 4
    wait_until(lambda: server.api.scheduler.stats().running == 0)
    assert server.api.budget.free_bytes == server.api.options.body_bytes_in_flight
    assert server.http().get("/health").status_code == 200
