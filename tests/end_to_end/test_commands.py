"""How the commands behave: quick help, one line for every problem, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.commands import BIN, assert_one_line, invoke, run, succeed
from tests.support.interrupted_command import COUNTED
from tests.support.paths import REPOSITORY
from tests.support.tiny import make_checkpoint

COMMANDS = (
    "vila-quantize", "vila-build-engine", "vila-chat", "vila-bench", "vila-convert", "vila-eval",
    "vila-serve",
)  # fmt: skip
# Modules that Python, click and ours are; it takes a fifth of a second on a processor of 2020.
MOST_MODULES = 220
HELP = """
import importlib, sys
try:
    importlib.import_module(f"vila_deploy.cli.{sys.argv[1]}").main(["--help"])
finally:
    heavy = {"torch", "numpy", "transformers", "onnxruntime", "PIL", "rich", "asyncio", "httpx"}
    print(len(sys.modules), *heavy & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_little(command: str) -> None:
    """So that it answers in under half a second, whose modules a test can count on any computer."""
    module = command.removeprefix("vila-").replace("-", "_")
    done = subprocess.run(
        [sys.executable, "-c", HELP, module], capture_output=True, text=True, check=True
    )
    assert "Usage:" in done.stdout
    count, *heavy = done.stderr.split()
    assert int(count) < MOST_MODULES
    assert heavy == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flags", [["--no-such-flag"], []])
def test_wrong_usage_ends_with_2(command: str, flags: list[str]) -> None:
    done = run(command, *flags)
    assert done.returncode == 2
    assert "Usage:" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [["--seed", "-1"], ["--temperature", "nan"], ["--top-p", "nan"], ["--video-frames", "0"]],
)
def test_numbers_out_of_range_are_wrong_usage(flags: list[str]) -> None:
    done = run("vila-chat", "engine", "-p", "What?", *flags)
    assert done.returncode == 2
    assert flags[0] in done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("commands") / "checkpoint")


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Path:
    out = checkpoint.parent / "quantized"
    succeed("vila-quantize", checkpoint, "-o", out, "--algorithm", "rtn")
    return out


@pytest.fixture(scope="module")
def engine(quantized: Path) -> Path:
    out = quantized.parent / "engine"
    succeed("vila-build-engine", quantized, "--target", "cpu", "-o", out)
    return out


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _poison(tensors: dict, value: float) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value


def _shard_out_of_index(root: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"},
    }
    (root / "llm" / "model.safetensors").unlink()
    (root / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))


def _parent_in_index(root: Path) -> None:
    names = load_file(root / "llm" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../llm/model.safetensors")}
    (root / "llm" / "model.safetensors").rename(root / "llm" / "model-00001-of-00001.safetensors")
    (root / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))


LLM = Path("llm", "model.safetensors")
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing part": (lambda r: shutil.rmtree(r / "mm_projector"), "mm_projector"),
    "missing config": (lambda r: (r / "llm" / "config.json").unlink(), "llm/config.json"),
    "truncated": (lambda r: os.truncate(r / LLM, (r / LLM).stat().st_size // 2), str(LLM)),
    "oversized header": (
        lambda r: (r / LLM).write_bytes(b"\xff" * 7 + b"\x7f" + (r / LLM).read_bytes()[8:]),
        str(LLM),
    ),
    "shard not there": (_shard_out_of_index, "model-00001-of-00002.safetensors"),
    "parent in index": (_parent_in_index, "../llm/model.safetensors"),
    "wrong shape": (
        lambda r: edit_tensor(
            r / LLM, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()})
        ),
        "model.norm.weight",
    ),
    "wrong dtype": (
        lambda r: edit_tensor(
            r / LLM, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()})
        ),
        "model.norm.weight",
    ),
    "NaN": (lambda r: edit_tensor(r / LLM, lambda t: _poison(t, float("nan"))), "layers.1.mlp.up"),
    "Inf": (lambda r: edit_tensor(r / LLM, lambda t: _poison(t, float("inf"))), "layers.1.mlp.up"),
    "unknown projector": (
        lambda r: edit_json(r / "mm_projector" / "config.json", mm_projector_type="q_former"),
        "q_former",
    ),
    "unknown tower": (
        lambda r: edit_json(r / "vision_tower" / "config.json", model_type="dino"), "dino",
    ),
    "unknown LLM": (
        lambda r: edit_json(r / "llm" / "config.json", architectures=["MambaForCausalLM"]),
        "MambaForCausalLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["vila-quantize", "vila-build-engine"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(checkpoint: Path, tmp_path: Path, command: str, damage: str) -> None:
    root, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(checkpoint, root)
    change, named = DAMAGE[damage]
    change(root)
    target = ["--target", "cpu"] if command == "vila-build-engine" else ["--algorithm", "rtn"]
    line = assert_one_line(invoke(command, root, "-o", out, *target))
    assert named in line
    assert ";" in line, "no remedy"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_bit_flip_is_found_through_checksums(quantized: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(quantized, root)
    file = next((root / "llm").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    out = tmp_path / "out"
    line = assert_one_line(invoke("vila-build-engine", root, "--target", "cpu", "-o", out))
    assert file.name in line
    assert not out.exists()


def test_group_size_that_does_not_divide(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = assert_one_line(invoke("vila-quantize", checkpoint, "-o", out, "--group-size", 96))
    assert "96" in line
    root = make_checkpoint(tmp_path / "narrow", intermediate=320)
    line = assert_one_line(invoke("vila-quantize", root, "-o", out, "--group-size", 128))
    assert "down_proj" in line
    assert "64" in line
    assert not out.exists()


@pytest.mark.parametrize("command", ["vila-quantize", "vila-build-engine"])
def test_existing_output_is_not_touched(checkpoint: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    target = ["--target", "cpu"] if command == "vila-build-engine" else []
    assert str(out) in assert_one_line(invoke(command, checkpoint, "-o", out, *target))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_not_a_picture(engine: Path, tmp_path: Path) -> None:
    Image.effect_noise((300, 300), 90).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 5000)
    (tmp_path / "text.png").write_text("not an image")
    for name in ("cut.png", "text.png", "absent.png"):
        line = assert_one_line(
            invoke("vila-chat", engine, "--image", tmp_path / name, "-p", "What?")
        )
        assert name in line


def test_every_file_of_an_engine_is_guarded(engine: Path, tmp_path: Path) -> None:
    files = [p.relative_to(engine) for p in engine.rglob("*") if p.is_file()]
    assert Path("manifest.json") in files
    chance = random.Random(0)
    root = tmp_path / "engine"
    shutil.copytree(engine, root)
    for file in files:
        whole = (root / file).read_bytes()
        altered = bytearray(whole)
        altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
        (root / file).write_bytes(altered)
        assert file.name in assert_one_line(invoke("vila-chat", root, "-p", "Hello?"))
        (root / file).write_bytes(whole)
    assert invoke("vila-chat", root, "-p", "Hello?", "--max-new-tokens", 1).returncode == 0


@pytest.mark.parametrize("command", ["vila-quantize", "vila-build-engine"])
def test_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, command: str) -> None:
    """A limit on file size stands for the full disk: writing fails in the same places."""
    flags = ["--target", "cpu"] if command == "vila-build-engine" else ["--algorithm", "rtn"]

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [BIN / command, checkpoint, "-o", tmp_path / "out", *flags],
        capture_output=True, text=True, preexec_fn=limit_file_size, check=False,
    )  # fmt: skip
    assert "space" in assert_one_line(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "signal_number"),
    [("vila-quantize", signal.SIGINT), ("vila-build-engine", signal.SIGTERM)],
)
def test_interrupt_leaves_nothing_or_all(
    checkpoint: Path, tmp_path: Path, command: str, signal_number: int
) -> None:
    """The signal comes as the first thing is written, the last one, and one between."""
    flags = ["--target", "cpu"] if command == "vila-build-engine" else ["--algorithm", "rtn"]

    def interrupted(out: Path, at: int) -> subprocess.CompletedProcess[str]:
        words = [tmp_path, int(signal_number), at, command, checkpoint, "-o", out, *flags]
        return subprocess.run(
            [sys.executable, "-m", "tests.support.interrupted_command", *map(str, words)],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    done = interrupted(tmp_path / "whole", 0)
    assert done.returncode == 0, done.stderr
    whole = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))
    changes = int(done.stderr.rpartition(COUNTED)[2])
    between = random.Random(signal_number).randrange(2, changes)
    codes = {}
    for at in (1, between, changes):
        out = tmp_path / f"out{at}"
        done = interrupted(out, at)
        codes[at] = done.returncode
        if out.exists():
            assert sorted(p.relative_to(out) for p in out.rglob("*")) == whole
        assert done.returncode == 130 or out.exists(), done.stderr
        assert [p for p in tmp_path.iterdir() if ".partial" in p.name] == [], done.stderr
    assert codes[1] == 130


def test_json_output_is_one_document(checkpoint: Path, engine: Path) -> None:
    for arguments in (
        ["vila-quantize", checkpoint, "--plan", "--json"],
        ["vila-build-engine", checkpoint, "--target", "cpu", "--plan", "--json"],
    ):
        plan = json.loads(succeed(*map(str, arguments)))
        assert isinstance(plan["fits"], bool)
        assert {"device_bytes", "limit_bytes", "components", "stages"} <= plan.keys()
        assert {"name", "parameters", "bits", "bytes"} <= plan["components"][0].keys()
    answer = json.loads(succeed("vila-chat", engine, "-p", "Hi", "--json", "--max-new-tokens", "3"))
    assert len(answer["tokens"]) <= 3


def test_chat_does_without_torch(engine: Path) -> None:
    """The start of a chat must not wait for torch, and small boards may not have it."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from vila_deploy.cli.chat import main\n"
        f"main([{str(engine)!r}, '-p', 'Hello?', '--max-new-tokens', '2'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
