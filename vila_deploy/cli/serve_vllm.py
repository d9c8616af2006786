"""vila-serve --backend vllm: vLLM runs the checkpoint, this process has the page and the API."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vila_deploy.cli.serve_run import run_announced
from vila_deploy.utils.errors import VilaDeployError, short

if TYPE_CHECKING:
    import socket

    from vila_deploy.integrations.served_model import ServedModel
    from vila_deploy.integrations.vllm.command import Command, Installed
    from vila_deploy.integrations.vllm.parallel import Parallel
    from vila_deploy.server.options import ServerOptions

GIGABYTE = 1e9
# Of our own engines: vLLM queues, decodes and caches by itself.
OWN_FLAGS = ("queue_size", "image_cache_mb")
VLLM_FLAGS = {"tp": 1, "pp": 1, "nnodes": 1, "node_rank": 0, "master": None, "plan": False}


@dataclass(frozen=True)
class VllmOptions:
    """What concerns vLLM of the command line; `extra` are words behind --."""

    parallel: Parallel
    plan: bool
    extra: tuple[str, ...]


def vllm_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add vLLM's options to a command, which gets them as `vllm`; None without --backend vllm."""

    @click.option("--backend", type=click.Choice(["vllm"]), help="Have vLLM run a checkpoint.")
    @click.option(
        "--tp", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="vllm: processes that share each layer (tensor parallel).",
    )  # fmt: skip
    @click.option(
        "--pp", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="vllm: stages of layers behind one another (pipeline parallel).",
    )  # fmt: skip
    @click.option(
        "--nnodes", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="vllm: computers that share the model, each with tp × pp / nnodes processes.",
    )  # fmt: skip
    @click.option(
        "--node-rank", type=click.IntRange(0, 1023), default=0, show_default=True,
        help="vllm: which of them this is; 0 has the page and the API.",
    )  # fmt: skip
    @click.option("--master", help="vllm: HOST:PORT of node 0, where the nodes meet.")
    @click.option(
        "--plan", is_flag=True,
        help="vllm: print the command and the memory of each process, and end.",
    )  # fmt: skip
    @click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_OPTIONS]")
    @wraps(function)
    def run(*args: Any, backend: str | None, extra: tuple[str, ...], **values: Any) -> None:
        given = {name: values.pop(name) for name in VLLM_FLAGS}
        vllm = None
        if backend is None:
            _refuse_without_backend(given, extra)
        else:
            _refuse_with_backend()
            from vila_deploy.integrations.vllm.parallel import Parallel

            master = _master(given["master"]) if given["master"] else None
            parallel = Parallel(
                given["tp"], given["pp"], given["nnodes"], given["node_rank"], master
            )
            parallel.check()
            vllm = VllmOptions(parallel, given["plan"], extra)
        function(*args, vllm=vllm, **values)

    return run


def without_server(checkpoint: Path, vllm: VllmOptions) -> bool:
    """Print the plan, or run a node that answers no requests; False if neither is asked for."""
    from vila_deploy.integrations.vllm.process import running

    if vllm.plan:
        _show_plan(checkpoint, vllm)
        return True
    if vllm.parallel.node_rank == 0:
        return False
    model, installed = _checked(checkpoint, vllm)
    command = _command(model, model.layout.root.absolute(), vllm, installed)
    click.echo(str(command))
    with running(command) as process:
        if process.wait() != 0:
            process.check_running()
    return True


def _show_plan(checkpoint: Path, vllm: VllmOptions) -> None:
    """Print command and memory; of a repository on the hub only config files are fetched."""
    from vila_deploy.checkpoint.hub import planned_checkpoint
    from vila_deploy.integrations.served_model import read_served_model
    from vila_deploy.integrations.vllm.command import Installed
    from vila_deploy.integrations.vllm.parallel import check_divides

    # A plan needs no vLLM; a GPU's is the one to plan for.
    installed = Installed("", False, True)
    with planned_checkpoint(checkpoint) as (folder, download):
        model = read_served_model(folder)
        check_divides(model.config.llm, vllm.parallel, installed.on_cpu)
        # What a repository is downloaded to is known when it has been.
        root = checkpoint if download else folder.absolute()
        click.echo(str(_command(model, root, vllm, installed)))
        _show_memory(model, vllm.parallel)


def serve_with_vllm(
    checkpoint: Path,
    listener: socket.socket,
    options: ServerOptions,
    tls: tuple[Path, Path] | None,
    slots: int | None,
    vllm: VllmOptions,
) -> None:
    """Start vLLM, and answer in front of it until a signal comes or it ends."""
    from vila_deploy.integrations.vllm.process import running
    from vila_deploy.server.forwarding import ForwardingApi
    from vila_deploy.server.run_server import bind

    model, installed = _checked(checkpoint, vllm)
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    command = _command(model, model.layout.root.absolute(), vllm, installed, port, options, slots)
    click.echo(str(command))
    inner = f"http://127.0.0.1:{port}"
    # Others on this computer reach its port too.
    key = secrets.token_urlsafe()
    with running(command, {"VLLM_API_KEY": key}) as process:
        process.wait_until_ready(inner)
        api = ForwardingApi(inner, options, _max_model_len(inner, key), upstream_key=key)
        process.on_end(lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_announced(api, listener, tls, f"by vLLM at {inner}")
        process.check_running()


def _checked(checkpoint: Path, vllm: VllmOptions) -> tuple[ServedModel, Installed]:
    from vila_deploy.checkpoint.hub import fetch_checkpoint
    from vila_deploy.integrations.served_model import read_served_model
    from vila_deploy.integrations.vllm.command import find_vllm
    from vila_deploy.integrations.vllm.parallel import check_divides

    installed = find_vllm()
    model = read_served_model(fetch_checkpoint(checkpoint))
    _ = model.weight_pattern
    check_divides(model.config.llm, vllm.parallel, installed.on_cpu)
    if not installed.supported:
        click.echo(f"note: not tried with vLLM {installed.version}", err=True)
    return model, installed


def _command(
    model: ServedModel,
    root: Path,
    vllm: VllmOptions,
    installed: Installed,
    port: int = 8000,
    options: ServerOptions | None = None,
    slots: int | None = None,
) -> Command:
    from vila_deploy.integrations.vllm.command import vllm_command

    places = None
    if options is not None:
        tiles = model.info.tiling.max_tiles + 1 if model.info.tiling.mode == "dynamic" else 1
        places = options.limits.images * tiles
    return vllm_command(
        root,
        root if model.layout.flat else root / "llm",
        vllm.parallel,
        installed,
        port=port,
        names=options.model_names if options is not None else (),
        max_places=places,
        slots=slots,
        extra=vllm.extra,
    )


def _show_memory(model: ServedModel, parallel: Parallel) -> None:
    from vila_deploy.integrations.vllm.memory import rank_memory

    stages = rank_memory(model.config, parallel)
    several = parallel.tensor > 1
    for rank in stages:
        processes = f"each of {parallel.tensor} processes" if several else "one process"
        stage = f"stage {rank.stage + 1} of {len(stages)}, " if len(stages) > 1 else ""
        whole = " (whole in each)" if several else ""
        click.echo(
            f"{stage}{processes}: {rank.layers} layers, LLM {_size(rank.llm_bytes)}, "
            f"vision {_size(rank.vision_bytes)}{whole}, "
            f"weights {_size(rank.llm_bytes + rank.vision_bytes)} in all, "
            f"cache {rank.cache_bytes_per_token / 1000:.1f} kB a token"
        )


def _size(size_bytes: int) -> str:
    if size_bytes < GIGABYTE / 10:
        return f"{size_bytes / 1e6:.1f} MB"
    return f"{size_bytes / GIGABYTE:.2f} GB"


def _max_model_len(url: str, key: str) -> int:
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return int(json.load(response)["data"][0]["max_model_len"])


def _master(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise VilaDeployError(
            f"--master {short(value)} is no HOST:PORT", fix="give one such as 10.0.0.1:29501"
        )
    return host, int(port)


def _refuse_with_backend() -> None:
    """Refuse options that nothing would look at where vLLM runs."""
    context = click.get_current_context()
    for name in OWN_FLAGS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{_flag(name)} does nothing with --backend vllm; leave it out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_without_backend(given: dict[str, Any], extra: tuple[str, ...]) -> None:
    """Refuse options of vLLM where our own engines run."""
    changed = [name for name, default in VLLM_FLAGS.items() if given[name] != default]
    if changed:
        raise click.UsageError(f"{_flag(changed[0])} goes with --backend vllm")
    if extra:
        raise click.UsageError(f"unexpected argument {extra[0]!r}")
