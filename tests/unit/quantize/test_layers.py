"""vila-quantize --layers: several programs do a part each, joined to the bytes of one."""

import fcntl
import os
import shutil
import signal

import pytest
from click.testing import CliRunner

from tests.support.interruptions import die_at, exit_code_of
from tests.support.resuming import PARTIAL, SCHEME, SIZES, TEXT, contents, layer_files
from tests.support.tiny import make_checkpoint
from vila_deploy.cli.quantize import main
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize import layer_files as saved_layers
from vila_deploy.quantize import pipeline, quantize_checkpoint
from vila_deploy.quantize.layer_range import LayerRange, layers_text, ranges_text
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.work_locks import CLAIM_FILE, claims
from vila_deploy.utils.errors import VilaDeployError

PRELOADED = ["vila_deploy.quantize.pipeline", "transformers.models.llama.modeling_llama"]
ALGORITHMS = ("awq", "rtn")


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A checkpoint of three layers and texts."""
    folder = tmp_path_factory.mktemp("data")
    make_checkpoint(folder / "root", **SIZES)
    (folder / "texts.txt").write_text(TEXT, "utf-8")
    return folder


@pytest.fixture(scope="module")
def options(data):
    """By algorithm, those of the run that joins."""

    def of(algorithm):
        own = {"calib": data / "texts.txt", "text_only": True} if algorithm == "awq" else {}
        return QuantizeOptions(SCHEME, algorithm, evaluate=False, **own)

    return {name: of(name) for name in ALGORITHMS}


def with_layers(options, text, **changes):
    return QuantizeOptions(**{**vars(options), "layers": LayerRange.parse(text), **changes})


def quantize_layers(data, tmp_path, options, text, resume=False, root="root", **changes):
    chosen = with_layers(options, text, **changes)
    return pipeline.quantize_layers(data / root, tmp_path / "out", chosen, resume=resume)


def refused(data, tmp_path, *args, **changes):
    """The message of a run that changes nothing."""

    def layers():
        return {p: p.read_bytes() for p in layer_files(tmp_path)}

    before = layers()
    with pytest.raises(VilaDeployError) as caught:
        quantize_layers(data, tmp_path, *args, **changes)
    assert layers() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def killed_after_a_layer(root, out, options):
    """In a process of its own."""
    os.fsync = lambda descriptor: None
    die_at(saved_layers, "replace_file", 1, "after")
    pipeline.quantize_layers(root, out, options)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_programs_one_killed_give_the_bytes_of_one(data, options, tmp_path, algorithm):
    chosen = options[algorithm]
    pipeline.quantize(data / "root", tmp_path / "whole", chosen)
    args = (data / "root", tmp_path / "out", with_layers(chosen, "1:3"))
    assert exit_code_of(killed_after_a_layer, args, PRELOADED) == -signal.SIGKILL
    assert len(layer_files(tmp_path)) == 1
    first = quantize_layers(data, tmp_path, chosen, "0:1")
    assert (first["layers"], first["remaining"]) == ([0], [2])
    assert "layer 1 finished before; --resume goes on" in refused(data, tmp_path, chosen, "1:3")
    second = quantize_layers(data, tmp_path, chosen, "1:", resume=True)
    assert (second["layers"], second["remaining"]) == ([1, 2], [])
    pipeline.quantize(data / "root", tmp_path / "out", chosen, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_programs_at_the_same_time(data, options, tmp_path, monkeypatch):
    """The second runs while the first has a layer to do; its layers don't overlap."""
    save = saved_layers.save_layer
    seen = []

    def meanwhile(path, index, layer, sources):
        if not seen:
            seen.append(refused(data, tmp_path, options["rtn"], "1:3"))
            seen.append(quantize_layers(data, tmp_path, options["rtn"], "2:3")["remaining"])
            with pytest.raises(VilaDeployError, match="another program is at work in it"):
                pipeline.quantize(data / "root", tmp_path / "out", options["rtn"], resume=True)
        return save(path, index, layer, sources)

    monkeypatch.setattr("vila_deploy.quantize.resume.save_layer", meanwhile)
    quantize_layers(data, tmp_path, options["rtn"], "0:2")
    assert f"process {os.getpid()} on " in seen[0]
    assert " is quantizing layer 1; give other --layers" in seen[0]
    assert seen[1] == [0, 1]
    assert pipeline.quantize(data / "root", tmp_path / "out", options["rtn"], resume=True)


def test_missing_layers_are_named_when_joining(data, options, tmp_path):
    quantize_layers(data, tmp_path, options["rtn"], "1:2")
    with pytest.raises(VilaDeployError) as caught:
        pipeline.quantize(data / "root", tmp_path / "out", options["rtn"], resume=True)
    line = "layers 0, 2 are not finished; run the command with --layers 0:1 and 2:3 first; or"
    assert line in str(caught.value)
    assert len(layer_files(tmp_path)) == 1
    with pytest.raises(VilaDeployError, match="holds 1 finished layers"):
        pipeline.quantize(data / "root", tmp_path / "out", options["rtn"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scheme": QuantScheme(32)}, "--group-size was 64 and is 32 now"),
        ({"seed": 1}, "--seed was 0 and is 1 now"),
        ({"root": "other"}, "the checkpoint has changed since this was begun"),
        ({"root": "wider"}, "the checkpoint has changed since this was begun"),
    ],
)
def test_another_configuration_or_checkpoint_is_refused(data, options, tmp_path, changed, message):
    for name, sizes in (("other", {"seed": 1}), ("wider", {"intermediate": 256})):
        if not (data / name).exists():
            make_checkpoint(data / name, **{**SIZES, **sizes})
    quantize_layers(data, tmp_path, options["rtn"], "0:1")
    assert message in refused(data, tmp_path, options["rtn"], "1:2", **changed)
    assert quantize_layers(data, tmp_path, options["rtn"], "1:2")["remaining"] == [2]


def test_other_calibration_data_is_refused(data, options, tmp_path):
    (tmp_path / "other.txt").write_text("no kings in here.\n\n" * 20, "utf-8")
    quantize_layers(data, tmp_path, options["awq"], "0:1")
    line = refused(data, tmp_path, options["awq"], "1:2", calib=tmp_path / "other.txt")
    assert "the calibration data has changed since this was begun" in line


def test_other_weights_are_found_at_the_next_layer(data, options, tmp_path, monkeypatch):
    """Two programs with different weights, begun before either has finished a layer."""
    if not (data / "other").exists():
        make_checkpoint(data / "other", **SIZES, seed=1)
    finish = pipeline._finish_layers
    seen = []

    def other_meanwhile(*args):
        if not seen:
            seen.append(True)
            quantize_layers(data, tmp_path, options["rtn"], "2:3", root="other")
        finish(*args)

    monkeypatch.setattr(pipeline, "_finish_layers", other_meanwhile)
    with pytest.raises(VilaDeployError, match=r"was made from another .* than this checkpoint's"):
        quantize_layers(data, tmp_path, options["rtn"], "0:1")


def test_nothing_is_left_while_no_layer_is_finished(data, options, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    line = refused(data, tmp_path, options["rtn"], "0:1")
    assert "MB for finished layers, 0.0 MB are free" in line
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(data, options, tmp_path, monkeypatch):
    def no_locks(descriptor, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    quantize_layers(data, tmp_path, options["rtn"], "0:2")
    assert quantize_layers(data, tmp_path, options["rtn"], "2:3")["remaining"] == []


def test_an_ended_program_holds_no_claim(data, options, tmp_path):
    quantize_layers(data, tmp_path, options["rtn"], "0:1")
    (claim,) = claims(tmp_path / PARTIAL)
    assert CLAIM_FILE.fullmatch(claim.file.name)
    assert not claim.is_held()
    claim.file.write_text("{}")
    assert claim.holder() == "another program"
    shutil.rmtree(tmp_path / PARTIAL)
    assert not claim.is_held()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0:1"], "--layers can't divide awq-gptq, which feeds each layer what"),
        (["--layers", "1-2", "--algorithm", "rtn"], "'1-2' is no range; give A:B"),
        (["--layers", "2:2", "--algorithm", "rtn"], "--layers 2:2 is empty"),
        (["--layers", "0:1", "--algorithm", "rtn", "--eval", "builtin"], "writes no checkpoint to"),
        (["--layers", "0:1", "--algorithm", "rtn", "--max-kl", "1"], "leave nothing for --max-kl"),
        (["--layers", "2:4", "--algorithm", "rtn"], "--layers 2:4 is outside the model's 3 layers"),
        (["--layers", "3:", "--algorithm", "rtn"], "--layers 3: is outside the model's 3 layers"),
    ],
)
def test_wrong_ranges_get_one_line(data, tmp_path, flags, message):
    command = [str(data / "root"), "-o", str(tmp_path / "out"), "--group-size", "64"]
    done = CliRunner().invoke(main, [*command, *flags])
    assert done.exit_code in (1, 2)
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_left(data, tmp_path):
    command = [str(data / "root"), "-o", str(tmp_path / "out"), "--group-size", "64"]
    command += ["--algorithm", "rtn"]
    done = CliRunner().invoke(main, [*command, "--layers", ":2"])
    assert done.stdout.endswith("layers 0-1 finished; still to do, here or elsewhere: layer 2\n")
    done = CliRunner().invoke(main, [*command, "--layers", "2:"])
    said = f"all are: the command with --resume and without --layers writes {tmp_path / 'out'}\n"
    assert done.stdout.endswith(said)
    again = CliRunner().invoke(main, [*command, "--layers", "2:", "--resume", "--json"])
    assert again.exit_code == 0, again.stderr
    assert CliRunner().invoke(main, [*command, "--resume"]).exit_code == 0


def test_a_plan_of_some_layers(data):
    command = [str(data / "root"), "--group-size", "64", "--algorithm", "rtn", "--plan"]
    done = CliRunner().invoke(main, [*command, "--layers", "0:1"])
    assert done.exit_code == 0
    assert "output:" not in done.stdout
    assert "MB of finished layers" in done.stdout


def test_from_python(data, tmp_path):
    out, own = tmp_path / "out", {"algorithm": "rtn", "group_size": 64}
    done = quantize_checkpoint(data / "root", out, layers="0:2", **own)
    assert done["remaining"] == [2]


def test_names_of_layers():
    assert layers_text({3}) == "layer 3"
    assert layers_text([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
    assert ranges_text([0, 1, 5]) == "0:2 and 5:6"
    assert LayerRange.parse(":").of(4) == range(4)
