"""Quantizing on a GPU: which device is taken, and that nothing is left on the wrong one."""

import json

import pytest
import torch
from PIL import Image

from tests.support.pretend_gpu import PretendGpu
from tests.support.tiny import make_checkpoint
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize import pipeline
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.device import choose_device
from vila_deploy.utils.errors import VilaDeployError

GB = 10**9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def gpu(monkeypatch):
    """One with 8 GB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GB, 16 * GB))
    yield
    torch.use_deterministic_algorithms(False)


def test_takes_the_gpu_where_it_has_room(gpu, capsys):
    assert choose_device("auto", 7 * GB).type == "cuda"
    assert choose_device("cpu", 7 * GB).type == "cpu"
    assert capsys.readouterr().err == ""
    assert choose_device("auto", 9 * GB).type == "cpu"
    assert "on the CPU: the GPU has 8.0 GB free, 9.0 GB are needed" in capsys.readouterr().err
    with pytest.raises(VilaDeployError, match=r"--device cuda.* has 8.0 GB free.*--device cpu"):
        choose_device("cuda", 9 * GB)


def test_without_a_gpu_the_cpu_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 1).type == "cpu"
    assert capsys.readouterr().err == ""
    with pytest.raises(VilaDeployError, match="finds no GPU"):
        choose_device("cuda", 1)


def files_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("report.json", "report.md", "README.md")
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text and a question about an image."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (60, 40), "red").save(folder / "red.png")
    asked = {"text": "What colour is it?", "image": "red.png", "answer": "Red."}
    rows = [{"text": "the king saw the red house on the hill. " * 20}, asked]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


@pytest.mark.parametrize("algorithm", ["awq-gptq", "awq", "rtn"])
def test_every_operation_has_its_tensors_in_one_place(root, data, tmp_path, gpu, algorithm):
    """The same arithmetic, so the same bytes; and a mixture of devices would raise."""
    options = {"scheme": QuantScheme(64), "algorithm": algorithm, "evaluate": True, "eval": data}
    if algorithm != "rtn":
        options["calib"] = data
    pipeline.quantize(root, tmp_path / "cpu", QuantizeOptions(**options, device="cpu"))
    pretended = PretendGpu()
    with pretended:
        pipeline.quantize(root, tmp_path / "gpu", QuantizeOptions(**options, device="cuda"))
    assert pretended.operations > 1000
    assert files_of(tmp_path / "gpu") == files_of(tmp_path / "cpu")
    reports = [json.loads((tmp_path / f / "report.json").read_text()) for f in ("cpu", "gpu")]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]


def test_the_pretended_gpu_refuses_mixtures():
    with PretendGpu():
        here, there = torch.ones(2, device="cuda"), torch.ones(2)
        assert here.device.type == "cuda"
        assert (here + 1).device.type == "cuda"
        assert here.cpu().device.type == there.device.type == "cpu"
        with pytest.raises(RuntimeError, match="two devices"):
            here + there
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        there[:] = here
        assert there.device.type == "cpu"
