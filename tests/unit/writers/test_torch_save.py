"""Files of torch.save written tensor by tensor, as torch itself and we read them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from vila_deploy.checkpoint.torch_load import PickledFile
from vila_deploy.writers.torch_save import ALIGNMENT, TorchFile

TENSORS = {
    "a": torch.randn(3, 5).half(),
    "b.weight": torch.arange(40, dtype=torch.int16).view(10, 4),
    "ö": torch.randn(2, 3, 4).bfloat16(),
    "last": torch.randn(7),
}


def write(path: Path) -> Path:
    file = TorchFile(path)
    for name, tensor in TENSORS.items():
        file.add(name, tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor)
    file.finish()
    return path


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_it(mapped: bool, tmp_path: Path) -> None:
    found = torch.load(write(tmp_path / "t.pt"), weights_only=True, mmap=mapped)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() % ALIGNMENT == 0


def test_it_is_what_we_accept_and_the_same_each_time(tmp_path: Path) -> None:
    file = write(tmp_path / "t.pt")
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    reader = PickledFile(file)
    assert all(torch.equal(reader.get_tensor(name), t) for name, t in TENSORS.items())
    assert write(tmp_path / "u.pt").read_bytes() == file.read_bytes()
