"""benchmarks/cpu_baselines: what is missing is said in one line, and what is there is timed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from benchmarks.cpu_baselines import environments, llamacpp, products, random_gguf
from benchmarks.cpu_baselines.environments import Unavailable, environment
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint

# Answers as llama-bench does for the tests that it is asked for.
LLAMA_BENCH = """\
#!/bin/sh
case "$*" in
  *"-p 256"*) echo '{"n_prompt": 256, "n_gen": 0, "avg_ns": 5000000000, "build_number": 7}';;
  *) echo '{"n_prompt": 0, "n_gen": 8, "n_depth": 0, "avg_ns": 400000000, "build_number": 7}'
     echo '{"n_prompt": 0, "n_gen": 8, "n_depth": 64, "avg_ns": 480000000, "build_number": 7}';;
esac
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "baselines")
    monkeypatch.setattr(environments, "_unavailable", {})
    return tmp_path / "baselines"


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_without_a_compiler_llamacpp_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"no C/C\+\+ compiler \(cc\)"):
        llamacpp.find_llama_bench()
    program(tmp_path / "gcc", "")
    with pytest.raises(Unavailable, match=r"no C/C\+\+ compiler \(c\+\+\)"):
        llamacpp.find_llama_bench()


@pytest.mark.parametrize(
    ("code", "messages", "reason"),
    [
        (-9, "", "its process died of SIGKILL; Linux ends programs so when memory runs out"),
        (-11, "half a line", "its process died of SIGSEGV"),
        (1, "warning\nValueError: no\n", "ValueError: no"),
        (0, "", "it says nothing"),
    ],
)
def test_why_a_program_ended(code: int, messages: str, reason: str) -> None:
    assert environments.why_ended(code, messages) == reason


def test_a_compiler_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's build would start one for each file otherwise."""
    found: dict[str, str] = {}

    def make(name: str, packages: list[str], variables: dict[str, str]) -> Path:
        found.update(variables)
        raise Unavailable("far enough")

    monkeypatch.setattr(llamacpp, "environment", make)
    monkeypatch.setattr(llamacpp.shutil, "which", lambda name: name if "llama" not in name else "")
    with pytest.raises(Unavailable, match="far enough"):
        llamacpp.find_llama_bench()
    assert int(found["LLAMA_CPP_BUILD_JOBS"]) == len(os.sched_getaffinity(0))


def test_without_a_network_an_environment_is_unavailable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(environments, "PIP_OPTIONS", ("--quiet", "--retries", "0"))
    with pytest.raises(Unavailable, match="index has not been reached") as caught:
        environment("openvino", ["openvino"])
    assert "\n" not in str(caught.value)
    assert not (folder / "openvino").exists()
    monkeypatch.setattr(environments, "_run", lambda *_: pytest.fail("is not tried again"))
    with pytest.raises(Unavailable, match="index has not been reached"):
        environment("openvino", ["openvino"])


def test_an_environment_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def run(command: list[str], *_: object) -> None:
        made.append(command)
        (folder / "name").mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "_run", run)
    assert environment("name", ["package"]) == environment("name", ["package"]) == folder / "name"
    assert [command[1:3] for command in made] == [["-m", "venv"], ["-m", "pip"]]


def test_libraries_of_a_wheel_are_linked(tmp_path: Path) -> None:
    (tmp_path / "libllama.so.0.6.0").touch()
    llamacpp._link_libraries(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"libllama.so", "libllama.so.0", "libllama.so.0.6.0"} <= names


def test_figures_of_llama_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = program(tmp_path / "llama-bench", LLAMA_BENCH)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert llamacpp.find_llama_bench() == bench.resolve()
    row = llamacpp.llama_rows(bench, tmp_path / "model.gguf", "int4", (0, 64), True)
    assert row["prefill_256_s"] == 5.0
    assert row["decode_0_ms"] == 50.0
    assert row["decode_64_ms"] == 60.0
    assert row["versions"] == {"llama.cpp": "b7"}
    assert row["flash_attention"] is True
    program(bench, "#!/bin/sh\necho 'error: unable to load model' >&2; exit 1\n")
    with pytest.raises(Unavailable, match="fails: error: unable to load model"):
        llamacpp.llama_rows(bench, tmp_path / "model.gguf", "int4", (0,), False)


@pytest.mark.parametrize(
    ("precision", "types"),
    [("int4", {"Q4_0", "Q6_K", "F32"}), ("fp16", {"F16", "F32"})],
)
def test_a_random_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, types: set[str]
) -> None:
    root = make_checkpoint(
        tmp_path / "tiny", quantized=precision == "int4", hidden=256, intermediate=512
    )
    config = open_checkpoint(root).config
    monkeypatch.setattr(random_gguf, "preset", lambda *_: config)
    file = random_gguf.write_random_gguf(tmp_path, "tiny", precision)
    tensors = GGUFReader(file).tensors
    assert {tensor.tensor_type.name for tensor in tensors} == types
    assert len(tensors) == 3 + 9 * config.llm.num_layers


def test_products_are_timed_and_a_broken_library_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(96, 128), (128, 256)]
    monkeypatch.setattr(products, "linear_shapes", lambda _: shapes)
    monkeypatch.setattr(products, "LAYERS", 1)
    monkeypatch.setattr(products, "TOKENS", (1, 4))
    monkeypatch.setattr(products, "ROUNDS", 1)
    broken = products.Library("broken", "missing.py", "int4")
    found = list(products.product_rows("VILA1.5-3b", tmp_path, [broken]))
    skipped, ours = found
    assert skipped["label"] == "skipped"
    assert "missing.py" in skipped["reason"]
    assert ours["what"] == "vila-deploy, int4"
    assert ours["products_4_ms"] > 0
    json.dumps(found)


def test_shapes_of_a_layer() -> None:
    found: Any = products.linear_shapes("VILA1.5-3b")
    assert found == [(3 * 2560, 2560), (2560, 2560), (2 * 6912, 2560), (2560, 6912)]
