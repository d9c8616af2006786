"""What all commands have in common, and what they still accept of version 0.1.0."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import vila_deploy
from vila_deploy.cli.common import command_errors
from vila_deploy.cli.quantize import _unknown_texts
from vila_deploy.formats.registry import FORMATS
from vila_deploy.quantize.options import ALGORITHMS, DEVICES, QuantizeOptions, quantize_options
from vila_deploy.utils.errors import VilaDeployError

COMMANDS = {
    name: import_module(f"vila_deploy.cli.{name}").main
    for name in ("quantize", "convert", "build_engine", "chat", "bench", "eval", "serve")
}


def options_of(name: str) -> dict[str, click.Option]:
    return {
        flag: option
        for option in COMMANDS[name].params
        if isinstance(option, click.Option)
        for flag in option.opts
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_version_and_json(name: str) -> None:
    assert "--version" in options_of(name)
    assert "--json" in options_of(name) or name == "serve"
    printed = CliRunner().invoke(COMMANDS[name], ["--version"]).stdout
    assert printed == f"vila-{name.replace('_', '-')} {vila_deploy.__version__}\n"


@pytest.mark.parametrize("name", ["quantize", "convert", "build_engine", "bench"])
def test_out_is_always_a_path(name: str) -> None:
    out = options_of(name)
    assert out["-o"] is out["--out"]
    assert isinstance(out["-o"].type, click.Path)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_path_is_not_this_folder(name: str) -> None:
    """As that of an unset variable in a script."""
    paths = [param for param in COMMANDS[name].params if isinstance(param.type, click.Path)]
    assert paths
    for param in paths:
        with pytest.raises(click.BadParameter, match="is empty"):
            param.type.convert("", param, None)


def test_choices_are_the_lists_that_the_package_has() -> None:
    quantize = options_of("quantize")
    assert tuple(quantize["--algorithm"].type.choices) == ALGORITHMS
    assert tuple(quantize["--device"].type.choices) == DEVICES
    for option in (quantize["--format"], options_of("convert")["--to"]):
        assert f": {', '.join(FORMATS)};" in (option.help or "")


def test_precision_is_an_ordinary_choice() -> None:
    done = CliRunner().invoke(
        COMMANDS["build_engine"], ["c", "--target", "cpu", "--precision", "fp8", "--plan"]
    )
    assert done.exit_code == 2
    assert "'int4', 'fp16'" in done.stderr


def options(**changes: object) -> QuantizeOptions:
    defaults = {
        "algorithm": "awq", "group_size": 128, "symmetric": False, "calib": None,
        "calib_images": None, "text_only": False, "eval": None, "no_eval": False,
        "formats": ("awq",), "device": "auto", "prompt_template": None, "seed": 0, "lora": None,
    }  # fmt: skip
    return quantize_options(**{**defaults, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["builtin", "shipped"])
def test_built_in_data_has_a_word_and_an_older_one(word: str) -> None:
    asked = options(algorithm="rtn", eval=word)
    assert asked.eval is None
    assert asked.evaluates
    assert word == "builtin" or word not in CliRunner().invoke(COMMANDS["quantize"], ["-h"]).stdout


def test_own_data_is_a_path() -> None:
    assert options(eval="mine.txt").eval == Path("mine.txt")
    assert not options(no_eval=True).evaluates
    assert options().evaluates
    assert not options(algorithm="rtn").evaluates


@pytest.mark.parametrize("name", ["toaster", "", "a10"])
def test_unknown_target_is_one_line(name: str) -> None:
    result = CliRunner().invoke(COMMANDS["build_engine"], ["c", "--target", name, "--plan"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: unknown target {name!r}; choose from a100")
    assert result.stderr.count("\n") == 1


def scores(perplexity: float) -> dict[str, dict[str, float]]:
    return {"perplexity_original": perplexity}


@pytest.mark.parametrize(
    ("quality", "kinds"),
    [
        ({"text": scores(5.9e8), "image": scores(3.0), "all": scores(1e6)}, ["text"]),
        ({"text": scores(367.9), "image": scores(368.1)}, ["answers about images"]),
        ({"text": scores(float("inf")), "image": None}, ["text"]),
        ({"text": scores(float("nan"))}, ["text"]),
        ({"text": scores(8.0), "image": scores(368.0), "all": scores(20.0)}, []),
    ],
)
def test_perplexity_above_guessing_is_said(quality: dict, kinds: list[str]) -> None:
    lines = list(_unknown_texts({"evaluation": {"quality": quality}}, 368))
    assert [line.partition(":")[0] for line in lines] == kinds
    assert all("above the 368 of guessing" in line and "--eval" in line for line in lines)
    assert list(_unknown_texts({"evaluation": None}, 368)) == []


def test_a_missing_package_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command_errors
    def fails(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    with pytest.raises(SystemExit) as ended:
        fails("onnxruntime.capi")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the Python package onnxruntime is missing in ")
    with pytest.raises(ModuleNotFoundError):
        fails("vila_deploy.nothing")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("chat", ("engine", "-p", "What?", "--slots", "2")),
        ("build_engine", ("c", "--target", "metal", "--memory", "nan")),
        ("build_engine", ("c", "--target", "metal", "--memory", "inf")),
        ("build_engine", ("c", "--target", "cpu", "--gpu-layers", "9" * 5000)),
        ("build_engine", ("c", "--target", "cpu", "--gpu-layers", "²")),
        ("bench", ("--table", "--contexts", "0," + "9" * 5000)),
    ],
)
def test_an_option_that_does_nothing_or_is_no_number_is_wrong_usage(
    name: str, flags: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(COMMANDS[name], list(flags))
    assert done.exit_code == 2
    assert flags[-2] in done.stderr


def test_python_refuses_infinite_numbers() -> None:
    with pytest.raises(VilaDeployError, match="--memory is inf"):
        vila_deploy.build_engine("c", "out", "metal", memory=float("inf"))
