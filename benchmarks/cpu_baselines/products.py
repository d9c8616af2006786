"""The products of a decoding step in other libraries, in turn with ours."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cpu_baselines.environments import Unavailable, environment, why_ended
from vila_deploy.checkpoint.presets import preset

WORKERS = Path(__file__).parent / "workers"
# Of a few layers, whose weights no cache holds; the figures are for all layers.
LAYERS, GROUP_SIZE = 4, 128
TOKENS = (1, 256)
ROUNDS = 3
OPENVINO = "openvino"


@dataclass(frozen=True)
class Library:
    """What is timed: a worker program, the environment that it runs in, and its kind of weights.

    Args:
        package: of the environment, which is made for it; empty for this project's own.
    """

    title: str
    worker: str
    kind: str
    package: str = ""

    def python(self) -> str:
        """Return the Python that runs it.

        Raises:
            Unavailable: its environment can't be made.
        """
        if not self.package:
            return sys.executable
        return str(environment(self.package, [self.package, "numpy"]) / "bin" / "python")


OURS = Library("vila-deploy, int4", "onnxruntime_products.py", "int4")
OTHERS = (
    Library("PyTorch's int4 operator", "torch_products.py", "int4"),
    Library("OpenVINO, int4", "openvino_products.py", "int4", OPENVINO),
    Library("OpenVINO, int8", "openvino_products.py", "int8", OPENVINO),
    Library("OpenVINO, bf16", "openvino_products.py", "bf16", OPENVINO),
)


def linear_shapes(model: str) -> list[tuple[int, int]]:
    """Return [out, in] of a decoder layer's linears, those that share an input as one."""
    linears = preset(model, "int4").llm.linears
    merged = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    shapes = []
    for names in merged:
        found = [shape for name, shape in linears.items() if name.rpartition(".")[2] in names]
        shapes.append((sum(rows for rows, _ in found), found[0][1]))
    return shapes


def product_rows(
    model: str, folder: Path, libraries: Sequence[Library]
) -> Iterator[dict[str, Any]]:
    """Yield a row for ours and for each of `libraries`, or the reason why it can't run.

    Args:
        folder: for files while they are in use.
    """
    spec = {
        "layers": LAYERS,
        "shapes": linear_shapes(model),
        "group": GROUP_SIZE,
        "folder": str(folder),
    }
    scale = preset(model, "int4").llm.num_layers / LAYERS
    with ExitStack() as stack:
        workers: list[tuple[Library, Worker]] = []
        for library in (OURS, *libraries):
            try:
                workers.append((library, stack.enter_context(Worker(library, spec))))
            except Unavailable as error:
                yield {"what": library.title, "label": "skipped", "reason": str(error)}
        times: dict[tuple[str, int], list[float]] = {}
        failed: dict[str, str] = {}
        for _ in range(ROUNDS):
            for library, worker in workers:
                for tokens in TOKENS if library.title not in failed else ():
                    try:
                        found = worker.milliseconds(tokens) * scale
                        times.setdefault((library.title, tokens), []).append(found)
                    except Unavailable as error:
                        failed[library.title] = str(error)
                        break
        for library, worker in workers:
            if library.title in failed:
                yield {"what": library.title, "label": "skipped", "reason": failed[library.title]}
                continue
            medians = {
                f"products_{tokens}_ms": statistics.median(times[library.title, tokens])
                for tokens in TOKENS
            }
            versions = {Path(library.worker).stem.partition("_")[0]: worker.version}
            yield {"what": library.title, "model": model, **medians, "versions": versions}


class Worker:
    """A process that keeps a library's products and times them when it is asked to."""

    def __init__(self, library: Library, spec: dict[str, Any]):
        command = [library.python(), str(WORKERS / library.worker), json.dumps(spec), library.kind]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self.version: str = self._answer()["version"]
        except BaseException:
            self._process.kill()
            self._process.communicate()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def milliseconds(self, tokens: int) -> float:
        """Return the time of the products of `tokens` tokens in the layers that are kept.

        Raises:
            Unavailable: the process has ended.
        """
        assert self._process.stdin is not None
        # Where the process has ended, what it said before that is read below.
        with suppress(BrokenPipeError):
            print(tokens, file=self._process.stdin, flush=True)
        found: float = self._answer()["ms"]
        return found

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            messages = self._process.stderr.read()
            raise Unavailable(why_ended(self._process.wait(), messages))
        answer: dict[str, Any] = json.loads(line)
        return answer
