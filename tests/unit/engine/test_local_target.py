"""Which target a computer is: by compute capability and memory, else the nearest."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.tiny import make_checkpoint
from vila_deploy.cli.build_engine import main
from vila_deploy.engine import local_target as module
from vila_deploy.engine.local_target import LocalDevice, find_device, nearest_target, target_name


def device(title: str, capability: str, gibibytes: float, jetson: bool = False) -> LocalDevice:
    return LocalDevice(title, capability, int(gibibytes * 2**30), jetson)


@pytest.mark.parametrize(
    ("local", "target"),
    [
        (LocalDevice("processor"), "cpu"),
        (device("A100-PCIE-40GB", "8.0", 39.6), "a100"),
        (device("RTX 4090", "8.9", 23.99), "rtx4090"),
        (device("H100 80GB HBM3", "9.0", 79.6), "h100"),
        (device("H200", "9.0", 140.4), "h200"),
        (device("AGX Orin", "8.7", 61.4, jetson=True), "orin"),
        (device("AGX Orin 32GB", "8.7", 29.9, jetson=True), "orin-32gb"),
        (device("Orin NX", "8.7", 15.3, jetson=True), "orin-nx"),
        (device("Orin Nano", "8.7", 7.4, jetson=True), "orin-nano"),
    ],
)
def test_a_device_with_a_row_is_that_row(local: LocalDevice, target: str) -> None:
    found = nearest_target(local)
    assert (found.target.name, found.note) == (target, "")


@pytest.mark.parametrize(
    ("local", "target"),
    [
        (device("A100-SXM4-80GB", "8.0", 79.2), "a100"),
        (device("RTX 3090", "8.6", 24), "a100"),
        (device("RTX 4060", "8.9", 8), "rtx4090"),
        (device("B200", "10.0", 179), "h200"),
    ],
)
def test_another_is_taken_as_the_nearest_and_that_is_said(local: LocalDevice, target: str) -> None:
    found = nearest_target(local)
    assert found.target.name == target
    assert local.title in found.note
    assert f"taken as the nearest, {target} (" in found.note


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, "NVIDIA H200, 9.0, 143771\n", "")

    monkeypatch.setattr(module, "JETSON_MODEL", tmp_path / "none")
    monkeypatch.setattr(module.subprocess, "run", run)
    assert find_device() == LocalDevice("NVIDIA H200", "9.0", 143771 << 20)
    assert target_name("auto") == ("h200", "this computer is target h200")
    assert target_name("cpu") == ("cpu", "")


def test_a_jetson_is_known_by_its_device_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(module, "JETSON_MODEL", tmp_path / "model")
    found = find_device()
    assert found.jetson
    assert found.compute_capability == "8.7"


@pytest.mark.parametrize("printed", ["", "No devices were found\n", "NVIDIA X, [N/A], [N/A]\n"])
def test_a_driver_that_says_nothing_means_the_processor(
    printed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "JETSON_MODEL", tmp_path / "none")
    monkeypatch.setattr(module, "_gpu_by_torch", lambda: None)
    done = subprocess.CompletedProcess((), 0, printed, "")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: done)
    assert find_device() == LocalDevice("processor")


def test_commands_take_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_device", lambda: device("RTX 3090", "8.6", 24))
    make_checkpoint(tmp_path / "c")
    arguments = [str(tmp_path / "c"), "--target", "auto", "--plan", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "a100"
    assert done.stderr.startswith("RTX 3090 (compute capability 8.6, 24 GiB) has no row in engines")
