"""Commands as on a board: its Python, exactly its packages, NVIDIA's own bindings, no torch.

`make test` makes the environments (tests/support/board/environments.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.board.environments import ENVIRONMENTS, FOLDER, STAMP, interpreter
from tests.support.paths import REPOSITORY
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.runtime.open_engine import open_engine

EXAMPLE = REPOSITORY / "examples" / "tiny-vila"
IMAGE = EXAMPLE / "pictures" / "three.png"
PROMPT = "Describe the image."
BOARDS = ("jetpack-6", "jetpack-7")
ABSENT = ("torch", "transformers", "onnx", "onnxruntime", "safetensors")


def python(name: str) -> Path:
    if not (FOLDER / name / STAMP).exists():
        pytest.skip(f"{FOLDER / name} is not there: `make test` makes it where it can")
    return interpreter(FOLDER, name)


def run(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "ONNX_PYTHON": sys.executable,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [python(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER)


def program(name: str, *arguments: Any) -> str:
    done = run(name, "-m", "tests.support.board.program", "8.7", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the engine for a CPU says."""
    engine = tmp_path_factory.mktemp("cpu") / "engine"
    build_engine(EXAMPLE / "checkpoint", engine, BuildOptions("cpu", max_seq_len=256))
    with open_engine(engine) as opened:
        return str(opened.chat().ask(PROMPT, images=[IMAGE]).text)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_vision_and_llm_are_finished_and_asked(name: str, tmp_path: Path, answer: str) -> None:
    """Each of TensorRT's methods is called as its signature says, or the command fails."""
    engine = tmp_path / "engine"
    jetpack = "6" if name == "jetpack-6" else "7"
    options = BuildOptions("orin-nano", max_seq_len=256, jetpack=jetpack)
    if name in BOARDS:
        assert build_engine(EXAMPLE / "checkpoint", engine, options).pending_steps
    else:
        build_engine(EXAMPLE / "checkpoint", engine, options)
    printed = json.loads(
        program(name, "vila-build-engine", engine, "--target", "orin-nano", "--json")
    )
    assert printed["needs"] == []
    assert (engine / "timing.cache").read_bytes() == b"times"
    asked = program(name, "vila-chat", engine, "--image", IMAGE, "-p", PROMPT, "--json")
    assert json.loads(asked)["text"] == answer


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_else_is_installed_there(name: str) -> None:
    code = (
        "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
    )
    assert run(name, "-c", code, *ABSENT, "click").stdout.split() == ["click"]
    version = run(name, "-c", "import sys; print(sys.version)").stdout
    assert version.startswith(ENVIRONMENTS[name].python)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_libraries_that_return_null_and_a_missing_driver_are_one_line_each(name: str) -> None:
    lines = program(name, "null").splitlines()
    fix = "start a container with --runtime nvidia"
    assert len(lines) == (3 if name in BOARDS else 2)
    assert "can't make its Builder (pybind11" in lines[0]
    assert "can't make its Runtime (pybind11" in lines[1]
    assert all(fix in line for line in lines)
    if name in BOARDS:
        assert "CUDA" in lines[2]


CONFIG = "trt.Builder(log).create_builder_config()"
CACHE = f"{CONFIG}.create_timing_cache(b'')"
MISTAKES = {
    "trt.no_such_class": "has no attribute 'no_such_class'",
    "trt.Builder(log).no_such_call()": "has no attribute 'no_such_call'",
    "trt.Builder()": "Builder.__init__ does not take",
    "trt.Builder(log).create_network(1, 2)": "create_network does not take",
    "trt.Builder(log).create_network(flag=1)": "create_network does not take",
    f"{CONFIG}.set_timing_cache({CACHE})": "set_timing_cache does not take",
    f"{CONFIG}.set_timing_cache(1, ignore_mismatch=False)": "set_timing_cache does not take",
    f"{CONFIG}.set_timing_cache({CACHE}, ignore=False)": "set_timing_cache does not take",
    "trt.OnnxParser(trt.Builder(log).create_network(0), log).parse_from_file(3)": "does not take",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_call_that_the_bindings_lack_is_found(mistake: str) -> None:
    code = f"""
import tensorrt_bindings
from tests.support.board.checked import CheckedModule
from tests.support.board.stand_in import Builder, OnnxParser
trt = CheckedModule(tensorrt_bindings, {{"Builder": Builder, "OnnxParser": OnnxParser}})
log = tensorrt_bindings.Logger()
{CONFIG}.set_timing_cache({CACHE}, ignore_mismatch=False)
print("good calls pass")
{mistake}
"""
    done = run("jetpack-6", "-c", code)
    assert done.stdout.strip() == "good calls pass", done.stderr
    assert MISTAKES[mistake] in done.stderr.splitlines()[-1]
