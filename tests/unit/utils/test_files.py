"""Folders that appear whole or not at all, whatever ends the work; JSON from hostile files."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from vila_deploy.utils import files
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import (
    canonical_json,
    new_folder,
    read_json_object,
    sha256_file,
)

BIG = 1 << 20


def fill(out: Path, work: Callable[[Path], Any]) -> None:
    with new_folder(out) as partial:
        (partial / "ours").touch()
        work(partial)


def throw(error: BaseException) -> Callable[[Path], Any]:
    def work(partial: Path) -> None:
        raise error

    return work


def test_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as partial:
        assert partial.parent == tmp_path
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        (partial / "link").symlink_to("dangling")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [out]


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "theirs").touch()


def link_to_a_folder(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", lambda partial: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_stays_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="bug"):
        fill(tmp_path / "out", throw(ValueError("bug")))
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(
    "make",
    [full_folder, Path.touch, link_to_a_folder, lambda path: path.symlink_to("nowhere")],
)
def test_existing_destination_is_refused_first(make: Callable, tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(VilaDeployError, match=r"out: output folder exists.*; remove it"):
        fill(tmp_path / "out", throw(AssertionError("the work began")))


def test_a_mount_point_names_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(VilaDeployError, match=r"mounted there.*a new folder in it, such as .*NAME"):
        fill(tmp_path / "out", throw(AssertionError("the work began")))
    fill(tmp_path / "out" / "NAME", lambda partial: None)
    assert [path.name for path in (tmp_path / "out" / "NAME").iterdir()] == ["ours"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_destination_that_appears_meanwhile_stays(kind: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def work(partial: Path) -> None:
        if kind == "folder":
            full_folder(out)
        elif kind == "file":
            out.write_text("theirs")
        else:
            out.symlink_to(elsewhere if kind == "link" else "nowhere")

    with pytest.raises(VilaDeployError, match="output folder exists"):
        fill(out, work)
    assert sorted(tmp_path.iterdir()) == [elsewhere, out]
    assert not (out / "ours").exists()
    assert kind != "folder" or (out / "theirs").exists()
    assert kind != "file" or out.read_text() == "theirs"


def test_destination_that_appears_within_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and rename(2); a folder with something in it is never replaced."""
    out = tmp_path / "out"
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        out.mkdir()
        (out / "theirs").touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(VilaDeployError, match="output folder exists"):
        fill(out, lambda partial: None)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]


def test_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match="nowhere: folder does not exist; create it"):
        fill(tmp_path / "nowhere" / "out", throw(AssertionError("the work began")))


def test_longest_legal_name(tmp_path: Path) -> None:
    with new_folder(tmp_path / ("x" * 255)) as partial:
        (partial / "file").touch()
    assert (tmp_path / ("x" * 255) / "file").exists()


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_other_exceptions_propagate_and_leave_nothing(error: Any, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught:
        fill(tmp_path / "out", throw(error))
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_errors_of_inputs_are_not_taken_for_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fill(tmp_path / "out", lambda partial: (tmp_path / "input").read_text())
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "input"))
    with pytest.raises(PermissionError):
        fill(tmp_path / "out", throw(error))
    assert list(tmp_path.iterdir()) == []


def test_permission_within_the_output_is_writing(tmp_path: Path) -> None:
    def work(partial: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(partial / "file"))

    with pytest.raises(VilaDeployError, match="out: cannot write: Permission denied; check"):
        fill(tmp_path / "out", work)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the kernel fails the write, as it does on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "python": lambda path: path.write_bytes(b"x" * BIG),
    "safetensors": lambda path: save_file({"a": torch.zeros(BIG)}, path),
    "numpy": lambda path: np.save(path, np.zeros(BIG)),
    "tokenizers": lambda path: Tokenizer(
        models.WordLevel({str(i): i for i in range(10_000)}, unk_token="0")
    ).save(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.usefixtures("small_files")
def test_write_that_fails(writer: str, tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match=r"out: cannot write: .*; .* choose another -o"):
        fill(tmp_path / "out", lambda partial: WRITERS[writer](partial / "file.npy"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path) -> None:
    """/dev/full gives the true error of a full disk."""
    with pytest.raises(VilaDeployError, match="cannot write: No space left on device; free some"):
        fill(tmp_path / "out", lambda partial: Path("/dev/full").write_text("x"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_that_a_library_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save raises a RuntimeError without a word of the disk."""
    error = RuntimeError("unexpected pos 704 vs 598")
    for free, expected in ((0, VilaDeployError), (1 << 30, RuntimeError)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(files.shutil, "disk_usage", lambda folder, usage=usage: usage)
        with pytest.raises(expected):
            fill(tmp_path / "out", throw(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_small_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this computer does not permit mounting")
    tensors = {"a": torch.zeros(BIG)}
    try:
        with pytest.raises(VilaDeployError, match="No space left on device; free some space"):
            fill(disk / "out", lambda partial: save_file(tensors, partial / "model.safetensors"))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SLEEPER = """
import sys, time, pathlib
from vila_deploy.utils.files import new_folder
with new_folder(pathlib.Path(sys.argv[1])) as partial:
    for number in range(2000):
        (partial / str(number)).touch()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGINT], -signal.SIGINT),
        ([signal.SIGTERM], 128 + signal.SIGTERM),
        ([signal.SIGHUP], 128 + signal.SIGHUP),
        ([signal.SIGINT] * 20, -signal.SIGINT),
    ],
    ids=["Ctrl-C", "TERM", "HUP", "impatient Ctrl-C"],
)
def test_signals_leave_nothing(numbers: list[int], status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.001)
        code = process.wait(300)
    assert list(tmp_path.iterdir()) == []
    if len(numbers) == 1:
        assert code == status


def test_handlers_are_as_before(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    fill(tmp_path / "out", lambda partial: None)
    with pytest.raises(SystemExit):
        fill(tmp_path / "other", lambda partial: os.kill(os.getpid(), signal.SIGTERM))
    assert [signal.getsignal(number) for number in numbers] == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_handler_of_the_program_is_asked(tmp_path: Path) -> None:
    """One that only takes note must not lose the next signal."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        fill(
            tmp_path / "out",
            lambda partial: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)],
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [signal.SIGTERM] * 2
    assert (tmp_path / "out").is_dir()


def test_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fill(tmp_path / "out", lambda partial: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (tmp_path / "out").is_dir()


def test_works_in_a_thread(tmp_path: Path) -> None:
    def work() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "file").touch()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "file").exists()


def test_sha256_and_canonical_json(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected
    assert canonical_json({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "key 'x' occurs twice"),
        (b" " * 101, "larger than 100 bytes"),
    ],
)
def test_bad_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(VilaDeployError, match=message):
        read_json_object(tmp_path / "file", limit_bytes=100)


def test_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VilaDeployError, match="pipe: is no regular file; download"):
        read_json_object(tmp_path / "pipe")


def test_killed_while_the_work_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rest has another name, so that no later run takes it for a work folder."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    work.mkdir()
    (work / "state.json").touch()
    removed: list[Path] = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: removed.append(path))
    with new_folder(out, work) as partial:
        (partial / "ours").touch()
    assert (out / "ours").exists()
    assert not work.exists()
    assert removed[-1].name.startswith(".out.partial-")
    assert (removed[-1] / "state.json").exists()
