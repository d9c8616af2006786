"""vila-quantize --resume: killed anywhere, it goes on to the bytes of an uninterrupted run."""

import errno
import fcntl
import gc
import json
import os
import random
import resource
import shutil
import signal
import weakref

import pytest
import torch
from PIL import Image

from tests.support.interruptions import die_at, exit_code_of, interrupt_at
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
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize import layer_files as saved_layers
from vila_deploy.quantize import pipeline, resume
from vila_deploy.quantize.algorithms import awq_gptq, base
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.work_locks import LOCK_FILE
from vila_deploy.quantize.work_state import STATE_FILE
from vila_deploy.utils import files
from vila_deploy.utils.errors import VilaDeployError

PRELOADED = ["vila_deploy.quantize.pipeline", "transformers.models.llama.modeling_llama"]
MODULES = {
    "awq_gptq": awq_gptq, "files": files, "pipeline": pipeline, "base": base,
    "saved_layers": saved_layers,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """Tests can't cut the power, and syncing takes longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True, scope="module")
def _little_garbage():
    """A job collects garbage at each layer, which takes long with all of torch among it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A checkpoint, texts and an image."""
    folder = tmp_path_factory.mktemp("data")
    make_checkpoint(folder / "root", **SIZES)
    (folder / "texts.txt").write_text(TEXT, "utf-8")
    (folder / "held_out.txt").write_text("a queen came to the river.\n\n" * 6, "utf-8")
    (folder / "images").mkdir()
    Image.new("RGB", (50, 40), "red").save(folder / "images" / "a.png")
    return folder


@pytest.fixture(scope="module")
def options(data):
    own = {"calib_images": data / "images", "eval": data / "held_out.txt"}
    return QuantizeOptions(SCHEME, calib=data / "texts.txt", **own)


@pytest.fixture(scope="module")
def whole_out(data, options, tmp_path_factory):
    """The output of an uninterrupted run without --resume."""
    out = tmp_path_factory.mktemp("whole") / "out"
    pipeline.quantize(data / "root", out, options)
    return out


@pytest.fixture(scope="module")
def whole(whole_out):
    return contents(whole_out)


@pytest.fixture(scope="module")
def begun(data, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    interrupted(data / "root", folder / "out", options)
    return folder / PARTIAL


@pytest.fixture
def here(begun, tmp_path):
    shutil.copytree(begun, tmp_path / PARTIAL)
    return tmp_path


def assert_finishes(data, options, here, whole):
    pipeline.quantize(data / "root", here / "out", options, resume=True)
    assert contents(here / "out") == whole
    assert [path.name for path in here.iterdir()] == ["out"]


def quantize_and_die(root, out, options, threads, death):
    """In a process of its own: `death` is a place in the program, or seconds from its start."""
    torch.set_num_threads(threads)
    gc.freeze()
    os.fsync = lambda descriptor: None
    if isinstance(death, float):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a program on the spot
        signal.setitimer(signal.ITIMER_REAL, death)
    else:
        die_at(MODULES[death[0]], *death[1:])
    pipeline.quantize(root, out, options, resume=True)


def exit_code(root, out, options, death):
    """Of a program that dies there."""
    args = (root, out, options, torch.get_num_threads(), death)
    return exit_code_of(quantize_and_die, args, PRELOADED)


DEATHS = [
    (
        ("saved_layers", "save_tensors", 1, "after"),
        0,
    ),  # the first layer, without its name yet
    (("saved_layers", "save_tensors", 2, "before"), 1),  # at the end of a layer
    (("awq_gptq", "gptq_quantize", 5, "after"), 1),  # within a layer
    (("awq_gptq", "quantize_layer", 2, "before"), 2),  # between two layers
    (("pipeline", "build_report", 1, "before"), 3),  # all layers finished, shards written
    (("pipeline", "evaluate", 1, "after"), 3),  # all but the report
    (("files", "_publish", 1, "before"), 3),  # the output whole, but in the work folder
]


def test_killed_at_every_stage(data, options, whole, tmp_path):
    for death, finished in DEATHS:
        assert exit_code(data / "root", tmp_path / "out", options, death) == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
        assert len(layer_files(tmp_path)) == finished, death
    assert_finishes(data, options, tmp_path, whole)


def test_killed_at_random_times(data, options, whole_out, whole, tmp_path):
    chance = random.Random(0)
    takes_s = json.loads((whole_out / "report.json").read_text())["seconds"]
    for _ in range(3):
        delay_s = chance.uniform(0.1, 1.0) * takes_s
        code = exit_code(data / "root", tmp_path / "out", options, delay_s)
        assert code in (0, -signal.SIGALRM)
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == whole
            shutil.rmtree(tmp_path / "out")
    # Only the making of the work folder itself goes through a folder of a random name.
    for path in tmp_path.glob(".out.partial*"):
        shutil.rmtree(path)
    assert_finishes(data, options, tmp_path, whole)


def test_killed_between_publishing_and_cleaning_up(here, data, options, whole):
    die = ("files", "_publish", 1, "after")
    assert exit_code(data / "root", here / "out", options, die) == -signal.SIGKILL
    assert contents(here / "out") == whole
    with pytest.raises(VilaDeployError, match=r"exists, and so does out\.partial; remove the la"):
        pipeline.quantize(data / "root", here / "out", options, resume=True)
    assert contents(here / "out") == whole


def test_time_is_summed_and_finished_layers_are_not_searched_again(
    here, data, options, whole, monkeypatch, capsys
):
    for index, file in enumerate(layer_files(here)):
        layer, _ = saved_layers.read_layer(file)
        file.unlink()
        slow = saved_layers.FinishedLayer(layer.tensors, layer.entry, 1000.0)
        resume.WorkFolder(here / PARTIAL, {}, {}, open_checkpoint(data / "root")).save(index, slow)
    searched, alive = [], []
    quantize_layer, load = awq_gptq.quantize_layer, base.load_decoder_layer

    def counting(layer, fp, quantized, scheme, where, *rest):
        searched.append(where)
        return quantize_layer(layer, fp, quantized, scheme, where, *rest)

    def one_at_a_time(*args):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        layer = load(*args)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(awq_gptq, "quantize_layer", counting)
    for module in (base, awq_gptq):
        monkeypatch.setattr(module, "load_decoder_layer", one_at_a_time)
    report = pipeline.quantize(data / "root", here / "out", options, resume=True)
    assert searched == ["model.layers.2"]
    assert len(alive) == 5  # two finished layers advance fp and quantized states
    assert 2000 < report["seconds"] < 2900
    assert contents(here / "out") == whole
    assert "2 finished layers found" in capsys.readouterr().err


def truncate(first, second):
    os.truncate(first, first.stat().st_size // 2)


def flip_one(first, second):
    flip_a_bit(first)


def swap_names(first, second):
    first.rename(first.with_name(first.name.replace("layer-00000", "layer-00007")))
    second.rename(second.with_name(second.name.replace("layer-00001", "layer-00000")))


@pytest.mark.parametrize("damage", [truncate, flip_one, swap_names])
def test_a_damaged_layer_is_computed_again(here, data, options, whole, damage, capsys):
    damage(*layer_files(here))
    assert_finishes(data, options, here, whole)
    assert "damaged, is computed again" in capsys.readouterr().err


def refused(data, out, options, root="root", resume=True):
    """The message, after which nothing has changed."""
    before = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()}
    with pytest.raises(VilaDeployError) as caught:
        pipeline.quantize(data / root, out, options, resume=resume)
    assert {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "--seed was 0 and is 1 now"),
        ({"scheme": QuantScheme(32)}, "--group-size was 64 and is 32 now"),
        ({"scheme": QuantScheme(64, True)}, "--symmetric was False and is True now"),
        ({"algorithm": "rtn", "calib": None, "calib_images": None}, "--algorithm was 'awq-gptq'"),
        ({"prompt_template": "llama_3"}, "--prompt-template was None and is 'llama_3' now"),
        ({"calib": "other.txt"}, "the calibration data has changed since this was begun; go back"),
    ],
)
def test_refuses_other_options(here, data, options, changed, message):
    (here / "other.txt").write_text("no kings in here.\n\n" * 20, "utf-8")
    changed = {k: here / v if v == "other.txt" else v for k, v in changed.items()}
    line = refused(data, here / "out", QuantizeOptions(**{**vars(options), **changed}))
    assert line.startswith(f"{here / PARTIAL}: {message}")


def test_another_number_of_cores_gives_the_same_bytes(here, data, options, whole, capfd):
    usual = torch.get_num_threads()
    torch.set_num_threads(usual + 2)
    try:
        assert_finishes(data, options, here, whole)
        assert torch.get_num_threads() == usual + 2
    finally:
        torch.set_num_threads(usual)
    line = f"begun with {usual} threads and goes on with as many, not with this computer's"
    assert line in capfd.readouterr().err


def test_refuses_another_checkpoint(here, data, options):
    make_checkpoint(here / "other", **SIZES, seed=1)
    line = refused(here, here / "out", options, "other")
    assert "the checkpoint has changed since this was begun" in line


def test_finished_layers_are_not_overlooked(here, data, options, whole):
    line = refused(data, here / "out", options, resume=False)
    assert "holds 2 finished layers of a run that ended early; --resume goes on from" in line
    assert_finishes(data, options, here, whole)


def test_refuses_other_versions_and_threads(here, data, options, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "versions", lambda: {"vila-deploy": "9.9"})
        assert " now since this was begun" in refused(data, here / "out", options)


def test_refuses_a_damaged_state_and_a_foreign_folder(here, data, options):
    state = here / PARTIAL / STATE_FILE
    content = state.read_bytes()
    for damaged in (content[:50], content.replace(b'seed": 0', b'seed": 1'), b"[]", b""):
        state.write_bytes(damaged)
        line = refused(data, here / "out", options)
        assert line.startswith(f"{state}: ")
        assert "remove this folder to begin again" in line
    state.unlink()
    assert "is missing" in refused(data, here / "out", options)
    shutil.rmtree(here / PARTIAL)
    (here / PARTIAL).write_text("mine")
    assert "remove this folder" in refused(data, here / "out", options)


def test_refuses_a_folder_that_is_in_use(here, data, options):
    descriptor = os.open(here / PARTIAL / LOCK_FILE, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another program is at work in it" in refused(data, here / "out", options)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("place", "finished"), [("save_tensors", 2), ("finish", 3)])
def test_goes_on_when_the_disk_was_full(here, data, options, whole, monkeypatch, place, finished):
    owner = saved_layers if place == "save_tensors" else pipeline.CheckpointWriter
    write = getattr(owner, place)

    def full(*args):
        """A limit on file size stands for the full disk: writing fails in the same places."""
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    monkeypatch.setattr(owner, place, full)
    message = f"{os.strerror(errno.EFBIG)}; free some space.*; finished layers are kept: --resume"
    with pytest.raises(VilaDeployError, match=message):
        pipeline.quantize(data / "root", here / "out", options, resume=True)
    assert len(layer_files(here)) == finished
    assert not (here / PARTIAL / "output").exists()
    monkeypatch.undo()
    assert_finishes(data, options, here, whole)


def test_nothing_is_left_while_no_layer_is_finished(data, options, tmp_path, monkeypatch):
    assert "output folder exists" in refused(data, data / "images", options)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(VilaDeployError, match="are free; free some space"):
            pipeline.quantize(data / "root", tmp_path / "out", options, resume=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(awq_gptq, "quantize_layer", interrupt_at(awq_gptq.quantize_layer, 1))
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(data / "root", tmp_path / "out", options, resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", ["awq-gptq", "awq", "rtn"])
def test_qwen2_goes_on_too(data, tmp_path, algorithm):
    """Biases and shared value heads; every algorithm."""
    root = make_checkpoint(tmp_path / "root", **SIZES, qwen2=True, kv_heads=2, dtype=torch.float32)
    texts = None if algorithm == "rtn" else data / "texts.txt"
    chosen = QuantizeOptions(SCHEME, algorithm, texts, evaluate=False, text_only=texts is not None)
    pipeline.quantize(root, tmp_path / "whole", chosen)
    # Rounding to nearest keeps its layers only if asked to.
    flags = {"resume": True} if algorithm == "rtn" else {}
    interrupted(root, tmp_path / "out", chosen, **flags)
    pipeline.quantize(root, tmp_path / "out", chosen, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
