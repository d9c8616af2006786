"""--kl-bound: the head in the fewest bits that cost no more than the bound, by one rule."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.paths import TINY_VILA
from vila_deploy.builder import accuracy_impact, build_engine, head_choice
from vila_deploy.builder.head_choice import choice, reason
from vila_deploy.cli.build_engine import main
from vila_deploy.utils.errors import VilaDeployError

KL = {"int4": 2e-2, "int8": 3e-4}


@pytest.mark.parametrize(
    ("bound", "dtype"), [(1.0, "int4"), (2e-2, "int4"), (1e-3, "int8"), (1e-5, "fp16"), (0, "fp16")]
)
def test_the_fewest_bits_within_the_bound(bound: float, dtype: str) -> None:
    assert choice(KL, bound) == dtype
    assert f"int8 0.0003; --kl-bound {bound:g}" in reason(KL, bound)
    assert choice({}, bound) == "fp16"


def build(out: Path, *flags: str) -> Result:
    arguments = [TINY_VILA, "-o", out, "--target", "cpu", "--max-seq-len", "64", *flags]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_measures_until_one_is_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measured(checkpoint: Any, modules: Any, dialect: str, data: Any, scratch: Path) -> Any:
        asked.append((modules.lm_head, dialect, data))
        return SimpleNamespace(kl_mean=KL[modules.lm_head])

    monkeypatch.setattr(accuracy_impact, "measure_accuracy_impact", measured)
    done = build(tmp_path / "engine", "--kl-bound", "0.001", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["components"]["lm_head"] == "int8"
    assert said["defaults"]["lm_head"].endswith("int4 0.02, int8 0.0003; --kl-bound 0.001")
    assert asked == [("int4", head_choice.DIALECT, None), ("int8", head_choice.DIALECT, None)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kl-bound", "-1"), "--kl-bound is -1.0; give nats"),
        (("--kl-bound", "nan"), "--kl-bound is nan; give nats"),
        (("--kl-bound", "0.1", "--lm-head", "int8"), "chooses the output head, and --lm-head int8"),
        (("--kl-bound", "0.1", "--plan"), "--kl-bound reads the weights"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = build(tmp_path / "engine", *flags)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert not (tmp_path / "engine").exists()


def test_python_takes_it_too(tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match="give nats"):
        build_engine(TINY_VILA, tmp_path / "engine", "cpu", kl_bound=-1.0)
