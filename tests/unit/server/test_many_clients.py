"""Many clients, a third of whose requests are left: nothing leaks, and the metrics add up.

CLIENTS=200 SECONDS=120 is the long run, which also watches memory; with -s it prints what it saw.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from tests.support.load import Totals, run_clients
from tests.support.served_process import process
from tests.support.serving import wait_until

CLIENTS, SECONDS = int(os.environ.get("CLIENTS", "40")), float(os.environ.get("SECONDS", "4"))


class Metrics:
    """What /metrics says."""

    def __init__(self, url: str):
        self._lines = httpx.get(f"{url}/metrics").text.splitlines()

    def __call__(self, name: str, label: str = "") -> float:
        """Return the sum of a metric over all labels, or over those with `label` in them."""
        rows = [line.rpartition(" ") for line in self._lines if label in line]
        return sum(float(value) for head, _, value in rows if head.split("{")[0] == f"vila:{name}")


def memory_bytes(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


async def load_with_memory(
    url: str, pid: int, images: list[Image.Image]
) -> tuple[Totals, list[int]]:
    """Return what the clients saw, and the server's memory from a quarter of the time on."""
    running = asyncio.create_task(run_clients(url, CLIENTS, SECONDS, images, fewest=CLIENTS // 4))
    samples: list[int] = []
    begin = time.monotonic() + SECONDS / 4
    while not running.done():
        await asyncio.sleep(min(1.0, SECONDS / 20))
        if time.monotonic() > begin:
            samples.append(memory_bytes(pid))
    return await running, samples


@pytest.mark.timeout(900)
def test_many_clients(engine_folder: Path, images: list[Image.Image]) -> None:
    with process(engine_folder) as server:
        pid = server.popen.pid
        totals, memory = asyncio.run(load_with_memory(server.url, pid, images))
        wait_until(lambda: idle(server.url))
        metrics = Metrics(server.url)
        files = psutil.Process(pid).num_fds()
        print(totals, [size >> 20 for size in memory[:: max(1, len(memory) // 10)]])
        assert server.stop() == 0
        assert server.stderr == ""
    assert totals.problems == []
    assert set(totals.statuses) <= {200, 429}
    if SECONDS >= 60:
        assert totals.left > totals.answered // 4
        quarter = len(memory) // 4
        assert max(memory[-quarter:]) < 1.05 * max(memory[:quarter]), "memory grows"
    assert files < 64, "connections are left open"
    check_metrics(metrics, totals)


def idle(url: str) -> bool:
    metrics = Metrics(url)
    return metrics("num_requests_running") == metrics("num_requests_waiting") == 0


def check_metrics(metrics: Metrics, totals: Totals) -> None:
    ended = {
        reason: metrics("request_success_total", f'finished_reason="{reason}"')
        for reason in ("stop", "length", "abort", "timeout", "error")
    }
    complete, all_ended = ended["stop"] + ended["length"], sum(ended.values())
    assert ended["error"] == ended["timeout"] == 0
    # A client may leave behind the last token, before it has read it.
    assert totals.answered <= complete <= totals.answered + totals.left
    assert ended["abort"] <= totals.left
    assert all_ended <= totals.answered + totals.left
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_prompt_tokens", "request_generation_tokens"):  # fmt: skip
        assert metrics(f"{name}_count") == all_ended
    generated, first = metrics("generation_tokens_total"), "time_to_first_token_seconds_count"
    assert metrics("request_generation_tokens_sum") == generated >= totals.tokens
    assert complete <= metrics(first) <= all_ended
    assert metrics("inter_token_latency_seconds_count") == generated - metrics(first)
    assert metrics("prompt_tokens_total") >= totals.prompt_tokens
    assert metrics("prompt_tokens_total") <= metrics("prefix_cache_queries_total")
    assert metrics("prefix_cache_hits_total") <= metrics("prefix_cache_queries_total")
    assert metrics("mm_cache_hits_total") <= metrics("mm_cache_queries_total")
    refused = metrics("http_responses_total", 'status="429"')
    assert refused >= totals.statuses[429]
    answered = metrics("http_responses_total", 'path="/v1/chat/completions",status="200"')
    assert totals.answered <= answered <= all_ended
