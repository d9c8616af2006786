"""Repositories looked at and fetched from a stand-in of the hub on the loopback."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.support.hub import Hub
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.hub import (
    HubSource,
    download,
    fetch_checkpoint,
    header_copy,
    hub_source,
    planned_checkpoint,
    repository,
)
from vila_deploy.checkpoint.hub.name import HubName
from vila_deploy.utils.errors import VilaDeployError

NAME = "Lab/Tiny"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)


def refused(name: str = NAME) -> str:
    """The one line that fetching ends with."""
    repository.find_repository.cache_clear()
    with pytest.raises(VilaDeployError) as raised:
        fetch_checkpoint(name)
    return str(raised.value)


def fetched_again(name: str = NAME) -> Path:
    """The folder as a new process finds it."""
    repository.find_repository.cache_clear()
    return fetch_checkpoint(name)


def weight_bytes(root: Path) -> int:
    return sum(file.stat().st_size for file in root.rglob("*.safetensors"))


def break_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_fetched_checkpoint_is_the_served_one(hub: Hub, served: Path) -> None:
    root = fetch_checkpoint(NAME)
    assert hub_source(root) == HubSource(NAME, hub.commit(NAME))
    assert open_checkpoint(root).fingerprint() == open_checkpoint(served).fingerprint()
    assert hub.sent_weights() < 1.5 * weight_bytes(served)  # once, and the headers
    hub.forget()
    assert fetched_again() == root
    assert not hub.sent
    for revision in ("v1", "refs/pr/1", hub.commit(NAME), "main"):
        assert fetched_again(f"{NAME}@{revision}") == root
    assert not hub.sent


def test_planning_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["Lab/Large"] = make_checkpoint(tmp_path / "large", vocab=8192, hidden=512)
    size = weight_bytes(tmp_path / "large")
    with planned_checkpoint("Lab/Large") as (root, planned):
        assert planned is not None
        assert (planned.size_bytes, planned.missing_bytes, planned.files) == (size, size, 3)
        assert planned.fits
        assert root.name == "Large"
        assert open_checkpoint(root).llm.shape("lm_head.weight") == (8192, 512)
    assert not root.exists()
    assert hub.sent_weights() <= 3 * header_copy.FIRST_BYTES < size / 10
    before = hub.sent_weights()
    fetch_checkpoint("Lab/Large")
    assert hub.sent_weights() == before + size
    with planned_checkpoint("Lab/Large") as (root, planned):
        assert planned is not None
        assert (planned.missing_bytes, planned.summary()[-11:]) == (0, "hub's cache")


def test_headers_longer_than_the_first_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_copy, "FIRST_BYTES", 100)
    with planned_checkpoint(NAME) as (root, _):
        assert len(open_checkpoint(root).llm.names()) == 21
    hub.ranges = False
    header_copy._pieces.cache_clear()
    with planned_checkpoint(NAME) as (root, _):
        assert len(open_checkpoint(root).llm.names()) == 21


def test_wrong_tensors_are_found_before_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "wrong", llm_config={"intermediate_size": 128})
    hub.repositories["Lab/Wrong"] = root
    line = refused("Lab/Wrong")
    assert line.startswith("Lab/Wrong/llm/model.safetensors: ")
    assert hub.sent_weights() <= 3 * header_copy.FIRST_BYTES
    hub.repositories["Lab/Empty"] = make_checkpoint(tmp_path / "empty")
    (root / "config.json").unlink()
    assert "holds no config.json" in refused("Lab/Wrong")
    (tmp_path / "empty" / "llm" / "model.safetensors").unlink()
    assert "Lab/Empty/llm/model.safetensors: is missing" in refused("Lab/Empty")


def test_a_check_that_fails_stops_before_the_weights(hub: Hub) -> None:
    def check(folder: Path) -> None:
        assert (folder / "llm" / "tokenizer.json").exists()
        raise VilaDeployError("does not fit", where=folder)

    with pytest.raises(VilaDeployError, match=r"^Lab/Tiny: does not fit$"):
        fetch_checkpoint(NAME, check)
    assert hub.sent_weights() <= 4 * header_copy.FIRST_BYTES


def test_files_that_nothing_reads_stay_there(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["Lab/Extra"] = extra = make_checkpoint(tmp_path / "extra")
    for name in ("trainer_state.json", "pytorch_model.bin", "llm/optimizer.pt", "assets/a.png"):
        (extra / name).parent.mkdir(exist_ok=True)
        (extra / name).write_bytes(b"x" * 1000)
    fetched = fetch_checkpoint("Lab/Extra")
    assert not any((fetched / name).exists() for name in ("trainer_state.json", "assets"))
    assert set(hub.sent) & {"pytorch_model.bin", "llm/optimizer.pt", "assets/a.png"} == set()
    comparison = filecmp.dircmp(extra / "llm", fetched / "llm")
    assert comparison.left_only == ["optimizer.pt"]
    assert not comparison.diff_files


def test_an_interrupted_file_goes_on(hub: Hub, served: Path) -> None:
    """Each answer breaks off: what has arrived stays, and in the end nothing came twice."""
    hub.break_after = 128 << 10
    root = fetch_checkpoint(NAME)
    assert open_checkpoint(root).fingerprint() == open_checkpoint(served).fingerprint()
    assert hub.sent_weights() < weight_bytes(served) + 4 * header_copy.FIRST_BYTES + 1
    ranges = [asked for _, path, asked in hub.requests if path.startswith("lfs/") and asked]
    assert "bytes=131072-" in ranges


def test_a_connection_that_brings_nothing_is_given_up(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planned_checkpoint(NAME):
        hub.break_after = 0
        line = refused()
    assert line.startswith("Lab/Tiny: ")
    assert "what was fetched before is kept" in line


def test_what_an_earlier_run_left_is_used(hub: Hub, served: Path) -> None:
    name = "llm/model-00001-of-00002.safetensors"
    with planned_checkpoint(NAME):
        folder = repository.find_repository(HubName(NAME)).folder
    content = (served / name).read_bytes()
    blob = folder.parent.parent / "blobs" / f"{hashlib.sha256(content).hexdigest()}.incomplete"
    blob.write_bytes(content[:300_000])
    hub.forget()
    fetch_checkpoint(NAME)
    assert hub.sent[name] == len(content) - 300_000
    assert not blob.exists()


def test_other_bytes_than_announced_are_refused_and_forgotten(hub: Hub, served: Path) -> None:
    name = "llm/model-00001-of-00002.safetensors"
    with planned_checkpoint(NAME):
        folder = repository.find_repository(HubName(NAME)).folder
    content = (served / name).read_bytes()
    blob = folder.parent.parent / "blobs" / f"{hashlib.sha256(content).hexdigest()}.incomplete"
    blob.write_bytes(bytes(300_000))
    assert "other bytes than the hub announces" in refused()
    assert not blob.exists()
    root = fetched_again()
    assert open_checkpoint(root).fingerprint() == open_checkpoint(served).fingerprint()


def test_without_a_connection_the_cache_is_used(
    hub: Hub, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fetch_checkpoint(NAME)
    hub.status = 503
    assert fetched_again() == root
    hub.status = None
    break_network(monkeypatch)
    assert fetched_again() == root
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched_again() == root
    assert fetched_again(f"{NAME}@{root.name}") == root
    assert "HF_HUB_OFFLINE is set" in refused("Lab/Other")


def test_a_half_fetched_checkpoint_says_so_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planned_checkpoint(NAME):
        pass
    break_network(monkeypatch)
    line = refused()
    assert "is not in the hub's cache, and there is no connection" in line
    assert "cannot be reached" in refused("Lab/Other")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Lab/Missing", "neither a folder here nor a repository of the hub that you may read"),
        (f"{NAME}@v9", "has no revision 'v9'"),
        (f"{NAME}@{'0' * 40}", "has no revision"),
        ("Lab/Gated", "is gated; accept its conditions on "),
    ],
)
def test_problems_are_one_line(hub: Hub, served: Path, name: str, line: str) -> None:
    hub.repositories["Lab/Gated"] = served
    hub.gated.add("Lab/Gated")
    assert line in refused(name)
    assert not hub.sent


@pytest.mark.parametrize("status", [401, 403, 404, 418, 429, 500, 503])
def test_other_answers_are_one_line(hub: Hub, status: int) -> None:
    hub.status = status
    assert refused().startswith("Lab/Tiny: ")


def test_a_renamed_repository_is_followed(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.renamed["Old/Name"] = NAME
    root = fetch_checkpoint("Old/Name")
    assert "Old/Name is now called Lab/Tiny" in capsys.readouterr().err
    break_network(monkeypatch)
    assert fetched_again("Old/Name") == root


def test_a_full_disk_is_said_before_anything_large_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    line = refused()
    assert "needs 1.3 MB here, 0.0 MB are free; free some space, or set HF_HOME" in line
    with planned_checkpoint(NAME) as (_, planned):
        assert planned is not None
        assert not planned.fits


def test_nothing_in_a_repository_is_executed_or_leaves_the_cache(hub: Hub, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "evil", shards=2)
    index = root / "llm" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../../model-00001-of"))
    hub.repositories["Lab/Evil"] = root
    assert "must be the name of a .safetensors file in this folder" in refused("Lab/Evil")
    large = make_checkpoint(tmp_path / "large")
    with (large / "llm" / "tokenizer.json").open("ab") as file:
        file.truncate(100 << 20)
    hub.repositories["Lab/LargeConfig"] = large
    assert "which no config file has" in refused("Lab/LargeConfig")
    pickled = make_checkpoint(tmp_path / "pickled")
    torch.save({"x": torch.zeros(2)}, pickled / "llm" / "pytorch_model.bin")
    (pickled / "llm" / "model.safetensors").unlink()
    hub.repositories["Lab/Pickled"] = pickled
    assert "is a pickle, which can run code and is never read" in refused("Lab/Pickled")
    assert "llm/pytorch_model.bin" not in hub.sent
