"""Bits of single linears in llm/config.json that are wrong: one line each, before any weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage import edit_json, refused
from tests.support.mixed_bits import LINEAR_BITS, make_mixed_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.utils.errors import short

NAME = next(iter(LINEAR_BITS))
CONFIG = "llm/config.json"
# Names of no linear of the model, which has two layers.
STRANGERS = (
    "model.layers.2.mlp.up_proj",
    "model.layers.00.mlp.up_proj",
    "model.layers.0.mlp.q_proj",
    "lm_head.weight",
    "",
    "\n" + 999 * "x",
)
NO_BITS: tuple[Any, ...] = (
    3,
    6,
    0,
    -8,
    10**9,
    10**400,
    8.0,
    "8",
    True,
    None,
    [8],
    {},
    float("nan"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    return {
        format: make_mixed_checkpoint(folder / format, format)
        for format in ("gguf", "compressed-tensors")
    }


def changed(root: Path, tmp_path: Path, change: Callable[[Any], Any]) -> str:
    shutil.copytree(root, tmp_path / "c")
    edit_json(CONFIG, lambda values: change(values["quantization_config"]))(tmp_path / "c")
    return refused(tmp_path / "c")


@pytest.mark.parametrize("bits", NO_BITS, ids=short)
def test_gguf_of_other_bits(bits: object, made: dict[str, Path], tmp_path: Path) -> None:
    line = changed(made["gguf"], tmp_path, lambda q: q["linear_bits"].update({NAME: bits}))
    assert "linear_bits: must be one of 4, 5, 8" in line
    assert NAME in line


@pytest.mark.parametrize("name", STRANGERS, ids=short)
def test_gguf_of_unknown_linears(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    line = changed(made["gguf"], tmp_path, lambda q: q["linear_bits"].update({name: 8}))
    assert "a linear that this model lacks" in line


@pytest.mark.parametrize(
    ("bits", "message"), [(4, "has 4 bits for lm_head, which may have 8"), (8, "output.weight")]
)
def test_gguf_of_a_head_that_is_not_so(
    bits: int, message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    assert message in changed(
        made["gguf"], tmp_path, lambda q: q["linear_bits"].update({"lm_head": bits})
    )


@pytest.mark.parametrize("value", [8, [NAME], "8", True])
def test_gguf_of_no_object(value: object, made: dict[str, Path], tmp_path: Path) -> None:
    line = changed(made["gguf"], tmp_path, lambda q: q.update(linear_bits=value))
    assert "linear_bits: must be an object" in line


@pytest.mark.parametrize("bits", NO_BITS, ids=short)
def test_groups_of_other_bits(bits: object, made: dict[str, Path], tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["config_groups"]["group_1"]["weights"]["num_bits"] = bits

    assert "config_groups.group_1.weights.num_bits: " in changed(
        made["compressed-tensors"], tmp_path, change
    )


TARGETS: dict[str, tuple[object, str]] = {
    **{short(name): ([NAME, name], "lack|must be Linear or names") for name in STRANGERS},
    "a pattern for nothing": (["re:no_such_.*"], "must be Linear or names of linears"),
    "a pattern for all": (["re:.*"], "must be Linear or names of linears"),
    "a head that is not so": ([NAME, "lm_head"], "tensor lm_head.weight_packed is missing"),
    "a linear twice": ([NAME, NAME], f"names {NAME} twice"),
    "all": (["Linear"], "must be one for all linears"),
    "none": ([], "must be Linear or names of linears"),
    "null": (None, "must be Linear or names of linears"),
    "a text": (NAME, "must be Linear or names of linears"),
    "an object": ({NAME: 8}, "must be Linear or names of linears"),
    "numbers": ([3], "must be Linear or names of linears"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_groups_of_unknown_linears(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    targets, message = TARGETS[case]

    def change(config: Any) -> None:
        config["config_groups"]["group_1"]["targets"] = targets

    line = changed(made["compressed-tensors"], tmp_path, change)
    assert any(part in line for part in message.split("|")), line


def test_a_linear_in_two_groups(made: dict[str, Path], tmp_path: Path) -> None:
    def change(config: Any) -> None:
        groups = config["config_groups"]
        groups["group_2"] = {**groups["group_1"], "targets": [NAME]}

    line = changed(made["compressed-tensors"], tmp_path, change)
    assert f"names {NAME} twice" in line


def test_long_names_of_groups(made: dict[str, Path], tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["config_groups"]["\n" + 999 * "x"] = 3

    line = changed(made["compressed-tensors"], tmp_path, change)
    assert "has a name of more than 64 letters" in line


@pytest.mark.parametrize("format", ["gguf", "compressed-tensors"])
def test_bits_that_the_tensors_do_not_have(
    format: str, made: dict[str, Path], tmp_path: Path
) -> None:
    """A name left out, so that a linear in 8 bits is read as one in 4."""

    def change(config: Any) -> None:
        if format == "gguf":
            del config["linear_bits"][NAME]
        else:
            config["config_groups"]["group_1"]["targets"].remove(NAME)

    line = changed(made[format], tmp_path, change)
    assert "k_proj" in line or "attn_k" in line, line


def test_unchanged_ones_are_read(made: dict[str, Path]) -> None:
    for root in made.values():
        quantization = open_checkpoint(root).config.llm.quantization
        assert quantization is not None
        assert quantization.linear_bits.keys() == LINEAR_BITS.keys()
