"""The folder of finished layers where something is unusual: names, disks, memory, moved data."""

import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.support.interruptions import interrupt_at
from tests.support.resuming import (
    PARTIAL,
    SCHEME,
    SIZES,
    TEXT,
    contents,
    flip_a_bit,
    interrupted,
    layer_files,
)
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.cli.quantize import main
from vila_deploy.data.examples import load_examples
from vila_deploy.quantize import layer_files as saved_layers
from vila_deploy.quantize import pipeline
from vila_deploy.quantize.algorithms import awq_gptq
from vila_deploy.quantize.calibrate import calibrate
from vila_deploy.quantize.estimate.plan import work_path
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A checkpoint and a text."""
    folder = tmp_path_factory.mktemp("data")
    make_checkpoint(folder / "root", **SIZES)
    (folder / "texts.txt").write_text(TEXT, "utf-8")
    return folder


@pytest.fixture(scope="module")
def options(data):
    return QuantizeOptions(SCHEME, calib=data / "texts.txt", text_only=True, evaluate=False)


def refused(root, out, options, **flags):
    with pytest.raises(VilaDeployError) as caught:
        pipeline.quantize(root, out, options, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("checksums", [False, True])
def test_weights_that_no_finished_layer_has_seen_may_change(options, tmp_path, checksums):
    root = make_checkpoint(tmp_path / "root", **SIZES, shards=4, checksums=checksums)
    interrupted(root, tmp_path / "out", options)
    shards = sorted((root / "llm").glob("*.safetensors"))
    assert b"model.layers.2.mlp.down_proj" in shards[-1].read_bytes()
    assert b"model.layers.1." not in shards[-1].read_bytes()

    def change(shard):
        flip_a_bit(shard)
        if checksums:
            (root / "SHA256SUMS").unlink()
            write_checksums(root)

    change(shards[-1])
    pipeline.quantize(root, tmp_path / "whole", options)
    pipeline.quantize(root, tmp_path / "out", options, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    interrupted(root, tmp_path / "out", options)
    change(shards[1])
    assert "the checkpoint has changed" in refused(root, tmp_path / "out", options, resume=True)
    assert len(layer_files(tmp_path)) == 2


def test_names_without_room_for_a_suffix(data, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "output folder exists" in refused(data / "root", Path(), options)
    out = tmp_path / ("é" * 127)
    assert len(work_path(out).name) < 255
    assert work_path(out) != work_path(tmp_path / ("é" * 126 + "e"))
    pipeline.quantize(data / "root", out, options)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_rounding_to_nearest_does_not_pass_by_finished_layers(data, options, tmp_path):
    interrupted(data / "root", tmp_path / "out", options)
    line = refused(data / "root", tmp_path / "out", QuantizeOptions(SCHEME, "rtn"))
    assert "out.partial: holds 2 finished layers" in line


def test_a_layer_that_cannot_be_read_stays(data, options, tmp_path, monkeypatch):
    interrupted(data / "root", tmp_path / "out", options)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(saved_layers, "sha256_file", forbidden)
    with pytest.raises(PermissionError):
        pipeline.quantize(data / "root", tmp_path / "out", options, resume=True)
    assert len(layer_files(tmp_path)) == 2


def test_finished_layers_are_as_readable_as_other_files(data, options, tmp_path):
    interrupted(data / "root", tmp_path / "out", options)
    (tmp_path / "other").touch()
    modes = {file.stat().st_mode for file in (*layer_files(tmp_path), tmp_path / "other")}
    assert len(modes) == 1


def test_images_may_have_moved(data, tmp_path):
    checkpoint, found = open_checkpoint(data / "root"), []
    for name, colour in (("here", "red"), ("there", "red"), ("other", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (50, 40), colour).save(tmp_path / name / "a.png")
        examples = load_examples(data / "texts.txt", tmp_path / name)
        found.append(calibrate(checkpoint, examples, 0).sha256)
    assert found[0] == found[1] != found[2]


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"


@pytest.mark.parametrize("error", [RuntimeError(NO_MEMORY), MemoryError()])
def test_out_of_memory_says_that_layers_are_kept(data, options, tmp_path, monkeypatch, error):
    quantize_layer, calls = awq_gptq.quantize_layer, []

    def too_large(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return quantize_layer(*args)

    monkeypatch.setattr(awq_gptq, "quantize_layer", too_large)
    line = refused(data / "root", tmp_path / "out", options)
    assert line.startswith("out of memory; close other programs")
    assert line.endswith("--resume goes on from there, unless their weights change")


def test_out_of_memory_is_one_line(data, tmp_path, monkeypatch):
    def too_large(*args):
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(pipeline, "_write_layers", too_large)
    command = [str(data / "root"), "-o", str(tmp_path / "out"), "--algorithm", "rtn"]
    done = CliRunner().invoke(main, [*command, "--group-size", "64"])
    assert done.exit_code == 1
    assert "out of memory; close other programs" in done.stderr.splitlines()[-1]


def test_a_full_disk_says_what_is_for_finished_layers(data, options, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    line = refused(data / "root", tmp_path / "out", options)
    assert "MB for finished layers until it is done, 0.0 MB are free" in line
    line = refused(data / "root", tmp_path / "out", QuantizeOptions(SCHEME, "rtn"))
    assert "finished layers" not in line


def test_a_disk_too_small_for_activations_says_so_before_the_layers(
    data, options, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "scratch_bytes", lambda config, options, tokens: tokens << 50)
    monkeypatch.setattr(pipeline, "_write_layers", lambda *args: pytest.fail("layers were begun"))
    line = refused(data / "root", tmp_path / "out", options)
    assert "MB for activations while it runs" in line
    assert not (tmp_path / "out").exists()


def test_nothing_to_go_on_from_is_said(data, options, tmp_path, capsys):
    pipeline.quantize(data / "root", tmp_path / "out", options, resume=True)
    assert f"{PARTIAL}: no finished layers found" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [False, True])
def test_ctrl_c_says_how_to_go_on(data, tmp_path, monkeypatch, resume):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(pipeline, "build_report", interrupt_at(pipeline.build_report, 1))
    flags = (
        ["--algorithm", "rtn"] if resume else ["--calib", str(data / "texts.txt"), "--text-only"]
    )
    command = [str(data / "root"), "-o", str(tmp_path / "out"), "--group-size", "64", *flags]
    done = CliRunner().invoke(main, [*command, "--resume"] if resume else [*command, "--no-eval"])
    assert done.exit_code == 130
    go_on = "the same command goes on" if resume else "--resume goes on from there"
    said = f"finished layers are kept in {tmp_path / PARTIAL}; {go_on}"
    assert done.stderr.splitlines()[-1] == f"interrupted: {said}"
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
    again = CliRunner().invoke(main, [*command, "--resume"])
    assert again.exit_code == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
