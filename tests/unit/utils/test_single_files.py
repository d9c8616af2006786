"""Single files: written whole or not at all, and the errors of those that can't be."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from vila_deploy.utils import files
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json, read_json_object, write_file


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "table.md"
    write_file(file, "first\n")
    assert file.read_text() == "first\n"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replace_file", full)
    with pytest.raises(OSError, match="No space"):
        write_file(file, "second\n")
    assert file.read_text() == "first\n"
    assert list(tmp_path.iterdir()) == [file]


def test_half_characters_of_names_are_written_as_json_has_them() -> None:
    value = {"name": os.fsdecode(b"caf\xe9 \xc3\xa9")}
    text = canonical_json(value)
    assert "\\udce9 \u00e9" in text
    assert json.loads(text.encode()) == value


def test_a_read_only_folder_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The administrator may write anywhere, so the system's answer is stood in for."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for kind in ("folder", "file"):
        with pytest.raises(VilaDeployError, match="out: cannot write: its folder is read-only"):
            files.check_new(tmp_path / "out", kind)


def test_what_cannot_be_read_is_not_to_be_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(VilaDeployError, match=r"\(Permission denied\); check its permissions"):
        read_json_object(file)
