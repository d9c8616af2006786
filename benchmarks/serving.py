"""Load test of servers with OpenAI's API, in the manner of vLLM's `bench serve`.

$ python benchmarks/serving.py --vila ENGINE --llama-server PATH MODEL.gguf --data text
$ python benchmarks/serving.py --random-engine VILA1.5-3b FOLDER      # to measure true shapes

Servers are started in turn, alone, and asked the same requests; with --rounds 2 each one twice, in
alternation. One JSON line for each server, data set and concurrency: clients that each ask one
question after the other. Tokens are the servers' own counts; a wait is measured at the client.

Data: `text` (prompts that have only the template in common), `shared-prefix` (the first three
quarters of every prompt are the same), `image` (an image each), `same-image` (one image, asked
about again and again). Answers go on to --output-tokens, whatever the model says.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from vila_deploy.bench.conditions import commit, device_name, versions
from vila_deploy.engine.manifest import read_manifest

DATA = ("text", "shared-prefix", "image", "same-image")
PERCENTILES = (50, 90, 99)
WORDS = (
    *("river", "stone", "light", "garden", "window", "paper", "bridge", "winter", "market"),
    *("silver", "engine", "letter", "forest", "morning", "copper", "table", "silent", "orange"),
    *("mountain", "village", "harbor", "candle", "mirror", "velvet", "thunder"),
)
START_S, REQUEST_S = 600, 3600


@dataclass(frozen=True)
class Server:
    """A server: its name in the results, what else they say of it, its command but for the port."""

    name: str
    about: dict[str, Any]
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Answered:
    """One request as its client saw it, in seconds; `error` instead of figures if it failed."""

    first_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


def requests(
    data: str, count: int, words: int, vocabulary: Sequence[str], seed: int = 0
) -> list[Any]:
    """Return the messages of `count` requests, the same each time for one seed."""
    generator = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(generator.choices(vocabulary, k=length))

    shared = text(words * 3 // 4)
    messages = []
    for number in range(count):
        content: list[dict[str, Any]] = [{"type": "text", "text": text(words)}]
        if data == "shared-prefix":
            content = [{"type": "text", "text": f"{shared} {text(words - words * 3 // 4)}"}]
        elif data in ("image", "same-image"):
            image = _image(1000 * seed + (0 if data == "same-image" else number))
            content.insert(0, {"type": "image_url", "image_url": {"url": image}})
        messages.append([{"role": "user", "content": content}])
    return messages


def _image(seed: int) -> str:
    """Return an image of smooth noise, 320 × 240, as a data: URI."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((320, 240), Image.Resampling.BICUBIC).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


async def ask(client: httpx.AsyncClient, messages: Any, output_tokens: int) -> Answered:
    """Stream one answer."""
    body = {
        "messages": messages, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    answered, start = Answered(), time.perf_counter()
    last = start
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                answered.error = f"{response.status_code}: {(await response.aread())[:200]!r}"
                return answered
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                now = time.perf_counter()
                if "error" in event:
                    answered.error = str(event["error"])
                if event.get("usage"):
                    _count(answered, event["usage"])
                if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                    if last == start:
                        answered.first_s = now - start
                    else:
                        answered.gaps_s.append(now - last)
                    last = now
    except httpx.HTTPError as error:
        answered.error = repr(error)
    answered.total_s = time.perf_counter() - start
    return answered


def _count(answered: Answered, usage: dict[str, Any]) -> None:
    answered.prompt_tokens = usage["prompt_tokens"]
    answered.output_tokens = usage["completion_tokens"]
    details = usage.get("prompt_tokens_details") or {}
    answered.cached_tokens = details.get("cached_tokens") or 0


async def load(
    url: str, messages: Sequence[Any], concurrency: int, output_tokens: int
) -> tuple[list[Answered], float]:
    """Let `concurrency` clients ask one request after the other; return answers and seconds."""
    waiting = iter(messages)
    answers: list[Answered] = []
    # A connection for each request: llama-server closes idle ones while the next request is sent.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_S, limits=limits) as client:

        async def one_client() -> None:
            for conversation in waiting:
                answers.append(await ask(client, conversation, output_tokens))

        start = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        return answers, time.perf_counter() - start


def summary(answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """Return the figures of one load."""
    done = [answer for answer in answers if not answer.error]
    errors = sorted({answer.error for answer in answers if answer.error})
    tokens = sum(answer.output_tokens for answer in done)
    # The first token of an answer belongs to its wait for it.
    per_token = [
        (a.total_s - a.first_s) / (a.output_tokens - 1) for a in done if a.output_tokens > 1
    ]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(done),
        **({"errors": errors[:3]} if errors else {}),
        "seconds": seconds,
        "prompt_tokens": statistics.mean(a.prompt_tokens for a in done) if done else 0,
        "cached_tokens": statistics.mean(a.cached_tokens for a in done) if done else 0,
        "output_tokens_per_s": tokens / seconds,
        "requests_per_s": len(done) / seconds,
        "first_token_ms": _percentiles([a.first_s for a in done]),
        "token_ms": _percentiles(per_token),
        "between_pieces_ms": _percentiles([gap for a in done for gap in a.gaps_s]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = {f"p{share}": float(np.percentile(seconds, share)) * 1e3 for share in PERCENTILES}
    return values | {"max": max(seconds) * 1e3}


@contextmanager
def running(server: Server) -> Iterator[str]:
    """Start a server on a free port, yield its address once it answers, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, environment = f"http://127.0.0.1:{port}", {**os.environ, **server.environment}
    process = subprocess.Popen(
        [*server.command, "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        end = time.monotonic() + START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{server.name} does not start: {' '.join(server.command)}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def measure(server: Server, options: argparse.Namespace) -> None:
    """Start one server and print a line for each data set and concurrency."""
    vocabulary = WORDS
    if options.vocabulary is not None:
        vocabulary = options.vocabulary.read_text("utf-8").split()
    with running(server) as url:
        for data in options.data:
            for concurrency in options.concurrency:
                count = max(options.requests, concurrency)
                # Each load has texts and images of its own.
                messages = requests(data, count, options.input_words, vocabulary, concurrency)
                asyncio.run(load(url, requests("text", 1, 8, vocabulary), 1, 2))
                before = os.getloadavg()[0]
                answers, seconds = asyncio.run(
                    load(url, messages, concurrency, options.output_tokens)
                )
                row = {
                    "what": "load on a server",
                    "server": server.name,
                    **server.about,
                    "data": data,
                    "concurrency": concurrency,
                    "input_words": options.input_words,
                    "output_tokens": options.output_tokens,
                    **summary(answers, seconds),
                    "load": [before, os.getloadavg()[0]],
                    "label": "measured",
                    "date": time.strftime("%Y-%m-%d"),
                    "device": device_name(),
                    "versions": versions(),
                    "commit": commit(),
                }
                print(json.dumps(row), flush=True)


def servers(options: argparse.Namespace) -> Iterator[Server]:
    """Yield what is to be measured."""
    slots = str(options.slots)
    for folder in options.vila:
        command = (str(Path(sys.executable).parent / "vila-serve"), folder, "--slots", slots)
        manifest = read_manifest(Path(folder))
        about = {
            "model": manifest.name,
            "weights": manifest.weights,
            "precision": manifest.precision,
            "activations": manifest.activations,
            "lm_head": manifest.module_precision.lm_head,
            "vision": manifest.module_precision.vision,
        }
        yield Server("vila-serve", about, command)
    for program, model in options.llama_server:
        folder = str(Path(program).resolve().parent)
        context = str(options.slots * options.context)
        threads = str(options.threads)
        flags = ("-m", model, "-np", slots, "-c", context, "-t", threads, "--no-webui")
        about = {"model": Path(model).stem, "weights": "trained", "program": _version(program)}
        libraries = {"LD_LIBRARY_PATH": folder}
        yield Server("llama-server", about, (program, *flags), libraries)


def _version(program: str) -> str:
    """Return the line in which a llama.cpp program states its version."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(program).resolve().parent)}
    done = subprocess.run([program, "--version"], capture_output=True, text=True, env=environment)
    lines = f"{done.stdout}{done.stderr}".splitlines()
    return next((line for line in lines if line.startswith("version")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vila", action="append", default=[], metavar="ENGINE")
    parser.add_argument(
        "--llama-server", nargs=2, action="append", default=[], metavar=("PROGRAM", "GGUF")
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["text"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=32, help="at least one a client")
    parser.add_argument("--input-words", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a llama-server slot")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vocabulary", type=Path, help="words of the prompts")
    parser.add_argument(
        "--random-engine", nargs=2, metavar=("MODEL", "FOLDER"),
        help="write an int4 engine of a released model's shapes, and FOLDER.words",
    )  # fmt: skip
    options = parser.parse_args()
    if options.random_engine:
        write_random_engine(options.random_engine[0], Path(options.random_engine[1]))
        return
    for _ in range(options.rounds):
        for server in servers(options):
            measure(server, options)


def write_random_engine(model: str, folder: Path) -> None:
    """Write an engine with random weights and a tokenizer that has a word for every token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from vila_deploy.builder.build import build_random_engine
    from vila_deploy.engine.manifest import TOKENIZER_FOLDER, write_manifest

    manifest = build_random_engine(model, "int4", "cpu", folder)
    vocabulary = {f"w{number}": number for number in range(manifest.model.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / TOKENIZER_FOLDER).mkdir()
    tokenizer.save(str(folder / TOKENIZER_FOLDER / "tokenizer.json"))
    write_manifest(folder, manifest)
    folder.with_suffix(".words").write_text("\n".join(list(vocabulary)[10:]), "utf-8")


if __name__ == "__main__":
    main()
