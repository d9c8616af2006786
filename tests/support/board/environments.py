"""Make the Python environments of boards: exactly the packages of docs/orin.md, NVIDIA's bindings.

The bindings are the real ones from PyPI; in place of TensorRT's libraries lies one whose functions
return null. What can't be made here, for want of a Python or of a compiler, is named in a line.

    python -m tests.support.board.environments FOLDER
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
GUIDE = REPOSITORY / "docs" / "orin.md"
STAMP = "made-of.txt"
FOLDER = REPOSITORY / ".venv" / "boards"
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# Loads the stand-ins under the names that the bindings ask for.
LOADER = """import ctypes
from pathlib import Path

for name in {names}:
    ctypes.CDLL(str(Path(__file__).with_name(name)), ctypes.RTLD_GLOBAL)
"""


@dataclass(frozen=True)
class Environment:
    """A Python with NVIDIA's bindings.

    Args:
        python: its version; "" is the one that runs the tests.
        bindings: requirement of TensorRT's Python bindings.
        cuda_bindings: begin of the version whose line of docs/orin.md is installed; "" for none.
    """

    python: str
    bindings: str
    cuda_bindings: str = ""

    @property
    def major(self) -> str:
        return self.bindings.partition("==")[2].split(".")[0]

    def requirements(self) -> list[str]:
        """Return what the guide tells to install for this JetPack."""
        if not self.cuda_bindings:
            return []
        lines = re.findall(r"^pip install -U (.*)$", GUIDE.read_text("utf-8"), re.M)
        (line,) = (each for each in lines if f"cuda-bindings=={self.cuda_bindings}" in each)
        return shlex.split(line)


ENVIRONMENTS = {
    "jetpack-6": Environment("3.10", "tensorrt-cu12-bindings==10.3.0", "12."),
    "jetpack-7": Environment("3.12", "tensorrt-cu13-bindings==10.16.1.11", "13."),
    "tensorrt-10.15": Environment("", "tensorrt-cu12-bindings==10.15.1.29"),
    "tensorrt-11": Environment("", "tensorrt-cu13-bindings==11.4.0.106"),
}


def interpreter(folder: Path, name: str) -> Path:
    """Return the Python of an environment in `folder`."""
    return folder / name / "bin" / "python"


def make(folder: Path, name: str) -> str:
    """Make an environment unless it is there already; return what is missing, or ""."""
    row, home = ENVIRONMENTS[name], folder / name
    wanted = "\n".join([row.python, row.bindings, *row.requirements()])
    stamp = home / STAMP
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return ""
    python, compiler = _find_python(row.python), shutil.which("cc")
    if python is None or compiler is None:
        return f"no Python {row.python} is here" if compiler else "no C compiler is here"
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([python, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/python3*/site-packages")
    if not row.python:
        # The packages that run the tests, as on a PC or server.
        paths = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "others.pth").write_text("\n".join(paths))
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter(folder, name)), "install"]
    pip += ["--quiet", "--disable-pip-version-check"]
    for arguments in (["--no-deps", row.bindings], row.requirements()):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if arguments and done.returncode:
            return f"pip can't install {' '.join(arguments)}: {done.stderr.strip()[-300:]}"
    _make_libraries(packages / "tensorrt_libs", row.major, compiler)
    stamp.write_text(wanted, "utf-8")
    return ""


def _make_libraries(folder: Path, major: str, compiler: str) -> None:
    folder.mkdir()
    names = [f"lib{library}.so.{major}" for library in LIBRARIES]
    source = folder / "null.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in names:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)
    (folder / "__init__.py").write_text(LOADER.format(names=tuple(names)))


def _find_python(version: str) -> str | None:
    """Return the path of a Python that starts; a shim for one that is not installed doesn't."""
    if not version:
        return sys.executable
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for path in filter(None, candidates):
        done = subprocess.run([path, "-c", "import venv"], capture_output=True)
        if done.returncode == 0:
            return path
    return None


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    for name in ENVIRONMENTS:
        missing = make(folder, name)
        if missing:
            print(f"{name}: {missing}; its tests are skipped", file=sys.stderr)


if __name__ == "__main__":
    main()
