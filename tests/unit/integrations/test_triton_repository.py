"""vila-convert --to triton-repository: what is written, and what becomes of input tensors."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.support.paths import TINY_VILA
from vila_deploy import build_engine, open_engine
from vila_deploy.cli.convert import main
from vila_deploy.integrations.triton.python_model import TritonPythonModel
from vila_deploy.integrations.triton.repository import model_config
from vila_deploy.integrations.triton.request import parse_request
from vila_deploy.utils.errors import VilaDeployError

IMAGE = TINY_VILA.parent / "pictures" / "three.png"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "tiny"
    build_engine(TINY_VILA, out, target="cpu", precision="fp16")
    return out


def strings(*values: str | bytes) -> Any:
    return np.array([v.encode() if isinstance(v, str) else v for v in values], object)


def test_the_command_writes_a_repository(engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    done = CliRunner().invoke(main, [str(engine), "--to", "triton-repository", "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    assert f"--model-repository {out}" in done.stdout
    config = (out / "vila" / "config.pbtxt").read_text()
    assert f'key: "engine" value: {{ string_value: "{engine}" }}' in config
    compile((out / "vila" / "1" / "model.py").read_text(), "model.py", "exec")


def test_a_name_with_quotes_stays_one_string() -> None:
    assert r'"/a \"b\""' in model_config(Path('/a "b"'), 8, "KIND_CPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--to", "triton-repository"], "nothing: no such folder"),
        (["nothing", "--to", "awq,triton-repository"], "is of an engine, the formats of a"),
        (["nothing", "--to", "triton"], "triton-repository"),
    ],
)
def test_what_is_no_engine_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": strings("a", "b")}, "text_input has 2 values; give one"),
        ({"text_input": strings(b"\xff")}, "text_input is no UTF-8"),
        ({"text_input": strings("<image>")}, "marks the place of an image"),
        ({"image": strings("?")}, "image 0: is neither an image file nor base64"),
        ({"image": strings(*["x"] * 65)}, "neither an image"),
        ({"max_tokens": np.array([0], np.int32)}, "max_new_tokens is 0"),
        ({"top_p": np.array([np.nan], np.float32)}, "top_p is nan"),
        ({"stop": strings("")}, "stop is empty"),
    ],
)
def test_a_bad_request_gets_one_line(engine: Path, inputs: dict[str, Any], message: str) -> None:
    with open_engine(engine) as opened, pytest.raises(VilaDeployError, match=message) as caught:
        parse_request(
            {"text_input": strings("Hi"), **inputs}, opened.model, opened.require_tokenizer()
        )
    assert "\n" not in str(caught.value)


def test_image_bytes_and_base64_are_the_same(engine: Path) -> None:
    content = IMAGE.read_bytes()
    with open_engine(engine) as opened:
        first, second = (
            parse_request(
                {"text_input": strings("Hi"), "image": strings(value)},
                opened.model,
                opened.require_tokenizer(),
            )
            for value in (content, base64.b64encode(content))
        )
    assert first.request.prompt.keys == second.request.prompt.keys
    assert first.streams


class Sender:
    """Collects responses, as Triton's response sender takes them."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.final = 0

    def send(self, response: Any, flags: int = 0) -> None:
        self.sent.append(response)
        self.final += flags

    def is_cancelled(self) -> bool:
        return False


class Request:
    """A request with input tensors."""

    def __init__(self, **inputs: Any):
        self.inputs, self.sender = inputs, Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


def fake_triton() -> Any:
    """The few names of triton_python_backend_utils that the model uses."""

    def tensor_of(request: Request, name: str) -> Any:
        value = request.inputs.get(name)
        return None if value is None else SimpleNamespace(as_numpy=lambda: value)

    return SimpleNamespace(
        get_input_tensor_by_name=tensor_of,
        Tensor=lambda name, values: (name, values[0].decode()),
        InferenceResponse=lambda tensors, error=None: error or dict(tensors),
        TritonError=str,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )


def test_each_request_gets_its_answer_and_one_end(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton())
    parameters = {"engine": {"string_value": str(engine)}, "slots": {"string_value": "2"}}
    model = TritonPythonModel()
    model.initialize(
        {"model_config": json.dumps({"parameters": parameters}), "model_repository": "/"}
    )
    asked: dict[str, Any] = {"text_input": strings("Describe the picture.")}
    asked["image"] = strings(IMAGE.read_bytes())
    streamed = Request(**asked)
    whole = Request(**asked, stream=np.array([False]))
    wrong = Request(text_input=strings("<image>"))
    model.execute([streamed, whole, wrong])
    model._scheduler.drain()
    model.finalize()
    assert [request.sender.final for request in (streamed, whole, wrong)] == [1, 1, 1]
    (answer,) = whole.sender.sent
    pieces = [piece["text_output"] for piece in streamed.sender.sent]
    assert len(pieces) > 2
    assert "".join(pieces) == answer["text_output"] != ""
    assert streamed.sender.sent[-1]["finish_reason"] == answer["finish_reason"] == "stop"
    assert "marks the place of an image" in wrong.sender.sent[0]
