"""A repository's name through the commands, from a stand-in of the hub on the loopback."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import BIN, assert_one_line, invoke, succeed
from tests.support.hub import Hub, serve_hub, use_hub
from tests.support.paths import TINY_VILA
from tests.support.released_configs import RELEASED, write_configs
from tests.support.serving import wait_until
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.hub import fetch_checkpoint, header_copy
from vila_deploy.checkpoint.tensor_schema import (
    llm_tensor_specs,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.formats.base import TensorSpec

NAME = "Efficient-Large-Model/tiny-vila"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serve_hub() as hub, use_hub(hub, tmp_path / "hf" / "hub"):
        hub.repositories[NAME] = TINY_VILA
        yield hub


def start(hub: Hub, *args: object) -> subprocess.Popen[str]:
    """Start a command, or Python itself, in a process that knows the hub as users' processes do."""
    return subprocess.Popen(
        [*map(str, args)], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": "hf"},
    )  # fmt: skip


def test_a_name_goes_through_plan_quantize_build_and_chat(hub: Hub, tmp_path: Path) -> None:
    plan = json.loads(succeed("vila-quantize", NAME, "--plan", "--json"))
    weights = sum(file.stat().st_size for file in TINY_VILA.rglob("*.safetensors"))
    assert plan["download"]["size_bytes"] == plan["download"]["missing_bytes"] == weights
    assert plan["download"]["fits"]
    assert hub.sent_weights() <= 3 << 16
    report = ["-o", "awq", "--algorithm", "rtn", "--json"]
    made = json.loads(succeed("vila-quantize", NAME, *report))
    source = {"repository": NAME, "commit": hub.commit(NAME)}
    assert made["source"] == source
    card = (tmp_path / "awq" / "README.md").read_text("utf-8")
    assert f"base_model: {NAME}\n" in card
    assert f"{NAME} at commit {source['commit'][:12]}" in card
    local = ["-o", "local", "--algorithm", "rtn"]
    succeed("vila-quantize", TINY_VILA, *local)
    name = "llm/model.safetensors"
    assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "awq" / name).read_bytes()

    hub.forget()
    succeed("vila-build-engine", NAME, "--target", "cpu", "-o", "fp16")
    assert not hub.sent, "a second run fetches nothing"
    manifest = json.loads((tmp_path / "fp16" / "manifest.json").read_text("utf-8"))
    assert (manifest["name"], manifest["source"]) == ("tiny-vila", source)
    succeed("vila-build-engine", "awq", "--target", "cpu", "-o", "int4")
    manifest = json.loads((tmp_path / "int4" / "manifest.json").read_text("utf-8"))
    assert manifest["source"] == source
    answer = ["-p", "What is this?", "--max-new-tokens", "4", "--json"]
    assert json.loads(succeed("vila-chat", "int4", *answer))["tokens"]


def write_holes(file: Path, specs: Iterable[TensorSpec]) -> None:
    """Write a safetensors file with the header of these tensors in float16, and holes for bytes."""
    header: dict[str, Any] = {}
    end = 0
    for spec in specs:
        begin, end = end, end + 2 * math.prod(spec.shape)
        entry = {"dtype": "F16", "shape": list(spec.shape), "data_offsets": [begin, end]}
        header[spec.name] = entry
    text = json.dumps(header).encode()
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        output.truncate(8 + len(text) + end)


def test_a_3b_is_planned_with_at_most_5_mb(hub: Hub, tmp_path: Path) -> None:
    """VILA1.5-3b's configs, every tensor at its size, and a tokenizer as large as Llama-2's."""
    root = write_configs(tmp_path / "3b", RELEASED["VILA1.5-3b"])
    config = load_config(root)
    llm = list(llm_tensor_specs(config.llm))
    halves = {"model-00001-of-00002": llm[: len(llm) // 2],
              "model-00002-of-00002": llm[len(llm) // 2 :]}  # fmt: skip
    weight_map = {}
    for name, specs in halves.items():
        write_holes(root / "llm" / f"{name}.safetensors", specs)
        weight_map |= {spec.name: f"{name}.safetensors" for spec in specs}
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "llm" / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    write_holes(root / "vision_tower" / "model.safetensors", tower_tensor_specs(config))
    write_holes(root / "mm_projector" / "model.safetensors", projector_tensor_specs(config))
    (root / "llm" / "extra.model").write_bytes(bytes(500_000))
    hub.repositories["Lab/VILA1.5-3b"] = root
    hub.lfs = False  # no digests of gigabytes of zeros
    options = ["--plan", "--json", "--text-only"]
    plan = json.loads(succeed("vila-quantize", "Lab/VILA1.5-3b", *options))
    assert plan["download"]["size_bytes"] == pytest.approx(6.2e9, rel=0.05)
    assert plan["output_bytes"] == pytest.approx(2.48e9, rel=0.05)
    assert plan["seconds"] > 60
    assert sum(hub.sent.values()) < 5e6
    succeed("vila-build-engine", "Lab/VILA1.5-3b", "--target", "orin-nano", "--plan")
    assert sum(hub.sent.values()) < 5e6


def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    """SIGKILL in the middle of a file: the next run asks for what is missing of it, and no more."""
    served = make_checkpoint(tmp_path / "served", vocab=8192, hidden=512)
    hub.repositories["Lab/Large"] = served
    size = sum(file.stat().st_size for file in served.rglob("*.safetensors"))
    hub.pause = 0.02
    fetch = "from vila_deploy.checkpoint.hub import *; fetch_checkpoint('Lab/Large')"
    process = start(hub, sys.executable, "-c", fetch)

    def begun() -> list[Path]:
        return list(Path("hf").rglob("*.incomplete"))

    # What has been sent may not have come yet: what counts lies on the disk.
    wait_until(lambda: process.poll() is not None or sum(map(_size, begun())) > size // 5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    kept = sum(map(_size, begun()))
    assert kept > size // 5
    hub.forget()
    hub.pause = 0.0
    root = fetch_checkpoint("Lab/Large")
    assert hub.sent_weights() <= size - kept + 3 * header_copy.FIRST_BYTES
    assert not list(Path("hf").rglob("*.incomplete"))
    assert open_checkpoint(root).fingerprint() == open_checkpoint(served).fingerprint()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def test_ctrl_c_says_that_what_was_fetched_is_kept(hub: Hub) -> None:
    hub.hold_after = 1 << 19
    process = start(hub, BIN / "vila-build-engine", NAME, "--target", "cpu", "-o", "out")
    assert hub.held.wait(240)
    process.send_signal(signal.SIGINT)
    # From now on so slowly that the signal comes long before the end.
    hub.pause = 0.5
    hub.released.set()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == (
        "interrupted: what was fetched is kept; the same command goes on where this one ended"
    )


def test_why_there_is_no_mmproj_is_said_of_a_repository_too(hub: Hub) -> None:
    refused = invoke("vila-convert", NAME, "--to", "mmproj", "-o", "out")
    assert "no mmproj file is written" in assert_one_line(refused)
    assert hub.sent_weights() <= 3 << 16


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("vila-quantize", ["-o", "out"]),
        ("vila-quantize", ["--plan"]),
        ("vila-build-engine", ["--target", "cpu", "-o", "out"]),
        ("vila-convert", ["--to", "awq", "-o", "out"]),
    ],
)
def test_a_missing_repository_is_one_line(hub: Hub, command: str, options: list[str]) -> None:
    line = assert_one_line(invoke(command, "Lab/Missing", *options))
    assert "Lab/Missing: is neither a folder here nor a repository" in line


def test_what_is_wrong_is_said_before_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for command, options in (
        ("vila-quantize", ["-o", "out"]),
        ("vila-quantize", ["-o", "new", "--group-size", "7"]),
        ("vila-build-engine", ["--target", "cpu", "-o", "out"]),
        ("vila-build-engine", ["--target", "cpu", "--precision", "int4", "-o", "new"]),
        ("vila-convert", ["--to", "awq", "-o", "new"]),
    ):
        assert invoke(command, NAME, *options).returncode in (1, 2)
    assert hub.sent_weights() <= 5 * 3 << 16
