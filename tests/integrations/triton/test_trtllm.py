"""A TensorRT-LLM engine in Triton's own server, its backend for TensorRT-LLM stood in for.

The server reads our configs as they are written, but for the name of that backend, and checks every
tensor that goes to it against them; the stand-in checks what the tensors hold.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import subprocess
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import TINY_VILA
from tests.support.triton_server import VENV, Server, joined, needs_triton, triton_server
from vila_deploy import SamplingParams, open_engine
from vila_deploy.engine.manifest import MANIFEST, TOKENIZER_FOLDER, read_manifest
from vila_deploy.integrations.triton.repository import MODEL_PY, write_models

PICTURES = TINY_VILA.parent / "pictures"
IMAGES = [PICTURES / "three.png", *sorted(PICTURES.glob("*.png"))[:1]]
QUESTION, PADDED = "Describe the picture.", 64
pytestmark = needs_triton


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    first_row_id = make_trtllm_folder(engine, folder / "engine")
    manifest = dataclasses.replace(read_manifest(engine), backend="tensorrt-llm", target="a100")
    models = folder / "models"
    write_models(folder / "engine", manifest, models, 8)
    for name in ("tensorrt_llm", "vila"):
        code = MODEL_PY.format(module=f"tests.integrations.triton.stand_in.{name}")
        (models / name / "1" / "model.py").write_text(code)
    on_cpu(models / "vila" / "config.pbtxt", "KIND_GPU", "KIND_CPU")
    config = models / "tensorrt_llm" / "config.pbtxt"
    on_cpu(config, '"tensorrtllm"', '"python"')
    more = {"stand_in_engine": str(engine), "first_row_id": str(first_row_id)}
    for name, value in more.items():
        with config.open("a") as file:
            file.write(
                f"parameters {{ key: {json.dumps(name)} "
                f"value: {{ string_value: {json.dumps(value)} }} }}\n"
            )
    with triton_server(folder, models, {"STAND_IN_ENGINE": str(engine)}) as found:
        yield found


def make_trtllm_folder(engine: Path, out: Path) -> int:
    """Write what our model reads of an engine folder; return the first id behind its vocabulary."""
    (out / "llm").mkdir(parents=True)
    shutil.copy(engine / MANIFEST, out / MANIFEST)
    shutil.copytree(engine / TOKENIZER_FOLDER, out / TOKENIZER_FOLDER)
    size = read_manifest(engine).model.vocab_size + PADDED
    config = {"pretrained_config": {"vocab_size": size, "mapping": {"world_size": 1}}}
    (out / "llm" / "config.json").write_text(json.dumps(config))
    return size


def on_cpu(config: Path, gpu: str, cpu: str) -> None:
    text = config.read_text()
    assert gpu in text
    config.write_text(text.replace(gpu, cpu))


def expected(engine: Path, images: list[Path], tokens: int) -> str:
    with open_engine(engine) as opened:
        answer = opened.chat().ask(QUESTION, images=images, sampling=SamplingParams(tokens))
    return answer.text


def body(images: list[Path], **more: Any) -> dict[str, Any]:
    encoded = [base64.b64encode(image.read_bytes()).decode() for image in images]
    given = {} if not encoded else {"image": encoded}
    return {"text_input": QUESTION, "max_tokens": 64, **given, **more}


def test_configs_fit_tritons_own_schema(engine: Path, tmp_path: Path) -> None:
    """As they are written: the server here has no GPU, and not that backend."""
    manifest = dataclasses.replace(read_manifest(engine), backend="tensorrt-llm", target="a100")
    write_models(engine, manifest, tmp_path, 8)
    parse = (
        "import sys; from google.protobuf import text_format;"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig;"
        "print(text_format.Parse(open(sys.argv[1]).read(), ModelConfig()).backend)"
    )
    for model, backend in (("vila", "python"), ("tensorrt_llm", "tensorrtllm")):
        command = [VENV / "bin" / "python", "-c", parse, tmp_path / model / "config.pbtxt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == backend, done.stderr


@pytest.mark.parametrize("count", [0, 1, 2])
def test_streams_equal_our_answers(server: Server, engine: Path, count: int) -> None:
    responses = server.generate(**body(IMAGES[:count]))
    assert joined(responses).strip() == expected(engine, IMAGES[:count], 64)
    assert len(responses) > 2
    assert responses[-1]["finish_reason"] in ("stop", "length")


def test_one_response_and_its_length(server: Server, engine: Path) -> None:
    (whole,) = server.generate("generate", **body(IMAGES[:1], stream=False, max_tokens=3))
    assert whole["text_output"].strip() == expected(engine, IMAGES[:1], 3)
    assert whole["finish_reason"] == "length"


def test_stop_strings(server: Server, engine: Path) -> None:
    answer = expected(engine, IMAGES[:1], 64)
    stop = answer[len(answer) // 2 :][:3]
    (whole,) = server.generate("generate", **body(IMAGES[:1], stream=False, stop=[stop]))
    assert whole["text_output"].strip() == answer[: answer.index(stop)].strip()
    assert whole["finish_reason"] == "stop"


def test_many_at_once(server: Server, engine: Path) -> None:
    before = server.requests_done("tensorrt_llm")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: joined(server.generate(**body(IMAGES[:1]))), range(16)))
    assert {text.strip() for text in found} == {expected(engine, IMAGES[:1], 64)}
    assert server.requests_done("tensorrt_llm") == before + 16


def test_a_bad_request_gets_one_line(server: Server) -> None:
    long = " ".join(["word"] * 5000)
    for changes, message in (
        ({"text_input": "What is <image>?"}, "which marks the place of an image"),
        ({"text_input": long}, "this engine takes"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.generate("generate", **body([], stream=False, **changes))
        assert message in json.loads(caught.value.read())["error"]
