"""Values and forms that released checkpoints have and that change nothing about the model."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage import refused, set_key
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.checksums import read_checksums
from vila_deploy.checkpoint.config import load_config
from vila_deploy.engine.build_request import resolve_limits
from vila_deploy.utils.errors import VilaDeployError

LLM = "llm/config.json"


@pytest.mark.parametrize("value", [1e30, int(1e30), 1 << 24, 2**63 - 1, 1e12])
@pytest.mark.parametrize("key", ["model_max_length", "tokenizer_model_max_length"])
def test_a_huge_length_is_no_limit(key: str, value: float, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    set_key(LLM, "model_max_length", None)(root)
    set_key(LLM, key, value)(root)
    assert load_config(root).model_max_length == 512


@pytest.mark.parametrize("value", [-1, 0, 1.5, "512", True, -1e30])
def test_other_lengths_are_refused(value: Any, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    set_key(LLM, "model_max_length", value)(root)
    assert "model_max_length: must be an integer" in refused(root)


@pytest.mark.parametrize(
    ("llm", "generation", "expected"),
    [
        ([2, 384], 2, (2,)),
        (2, [2, 500, 100_000], (2,)),
        (384, 400, ()),
        ([2, 383], [7], (2, 7, 383)),
    ],
)
def test_stops_beyond_the_vocabulary_never_come(
    llm: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    root = make_checkpoint(tmp_path / "c")
    set_key(LLM, "eos_token_id", llm)(root)
    set_key("llm/generation_config.json", "eos_token_id", generation)(root)
    set_key(LLM, "bos_token_id", 384)(root)
    config = open_checkpoint(root).config.llm
    assert config.eos_token_ids == expected
    assert config.bos_token_id is None


def test_sequences_may_be_as_long_as_the_positions(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    set_key(LLM, "model_max_length", 128)(root)
    config = load_config(root)
    assert resolve_limits(config).max_seq_len == 128
    assert resolve_limits(config, max_seq_len=129).max_seq_len == 129
    assert resolve_limits(config, max_seq_len=512).max_input_len == 512
    with pytest.raises(VilaDeployError, match="--max-seq-len 513 is more than the model's 512"):
        resolve_limits(config, max_seq_len=513)


def lines_of(root: Path) -> list[tuple[str, str]]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return [(d, f.relative_to(root).as_posix()) for d, f in zip(digests, files, strict=True)]


def joined(form: Callable[[str, str], str], end: str = "\n") -> Callable[[Path], str]:
    return lambda root: "".join(form(*line) + end for line in lines_of(root))


FORMS: dict[str, Callable[[Path], str]] = {
    "sha256sum of all files": joined("{}  {}".format),
    "find -exec sha256sum": joined("{}  ./{}".format),
    "binary mode": joined("{} *{}".format),
    "--tag": joined("SHA256 ({1}) = {0}".format),
    "BSD without spaces": joined("SHA256({1})= {0}".format),
    "upper case": joined(lambda digest, path: f"{digest.upper()}  {path}"),
    "Windows": joined("{}  {}".format, "\r\n"),
    "byte order mark": lambda root: "\ufeff" + joined("{}  {}".format)(root),
    "comments": lambda root: "# of the release\n\n" + joined("{}  {}".format, "\n\n")(root),
    "twice": lambda root: joined("{}  {}".format)(root) + joined("{}  ./{}".format)(root),
}


@pytest.mark.parametrize("form", FORMS)
def test_checksums_in_their_usual_forms(form: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    (root / "README.md").write_text("# a (model) = b", "utf-8")
    content = FORMS[form](root)
    (root / "SHA256SUMS").write_bytes(content.encode())
    open_checkpoint(root)
    assert set(read_checksums(root) or ()) == {
        f"{part}/model.safetensors" for part in ("llm", "vision_tower", "mm_projector")
    }
    weights = root / "llm" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)
    assert re.search("llm/model.safetensors: content has changed", refused(root))


@pytest.mark.parametrize(
    "line",
    ["0" * 63 + "  a", "0" * 64 + "  a/../b", "0" * 64 + "  .", "md5 (a) = " + "0" * 32,
     "0" * 64 + "  C:\\a", "0" * 64 + "  //a", "0" * 64, "# a\nx"],
)  # fmt: skip
def test_other_lines_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(line, "utf-8")
    with pytest.raises(VilaDeployError, match=r"SHA256SUMS: line \d: must be a SHA-256 and"):
        read_checksums(tmp_path)


def test_contradicting_checksums_are_refused(tmp_path: Path) -> None:
    lines = (digit * 64 + "  a.safetensors\n" for digit in "01")
    (tmp_path / "SHA256SUMS").write_text("".join(lines), "utf-8")
    with pytest.raises(VilaDeployError, match="line 2"):
        read_checksums(tmp_path)
