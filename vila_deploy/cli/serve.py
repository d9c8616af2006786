"""vila-serve: answer over HTTP, in OpenAI's API and on a page."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vila_deploy.cli.common import FilePath, command, no_nan
from vila_deploy.cli.serve_run import run_announced
from vila_deploy.cli.serve_vllm import (
    VllmOptions,
    serve_with_vllm,
    vllm_options,
    without_server,
)
from vila_deploy.utils.errors import VilaDeployError, printable, short
from vila_deploy.utils.extras import install_extra

if TYPE_CHECKING:
    import socket

    from vila_deploy.server.options import ServerOptions

PACKAGES = ("starlette", "uvicorn", "prometheus_client", "llguidance")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MIN_KEY_CHARACTERS, MAX_KEY_FILE_BYTES = 8, 1 << 20


@command("vila-serve")
@click.argument("engine", type=FilePath())
@click.option(
    "--host", default="127.0.0.1", show_default=True,
    help="Address to listen on; any but this computer's own needs an API key.",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free."
)
@click.option(
    "--api-key", "api_keys", multiple=True, envvar="VILA_API_KEY",
    help="Key that clients must send; repeatable. Also from VILA_API_KEY.",
)  # fmt: skip
@click.option("--api-key-file", type=FilePath(), help="File with a key in each line.")
@click.option(
    "--model-name", "model_names", multiple=True,
    help="What clients call the model; repeatable. The folder's name if left out.",
)  # fmt: skip
@click.option(
    "--slots", type=click.IntRange(1, 64),
    help="Answers at once, where the engine can; 8 if left out, or as many as fit into memory.",
)  # fmt: skip
@click.option(
    "--queue-size", type=click.IntRange(0, 100_000), default=64, show_default=True,
    help="Requests that may wait; more are told to come back.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1, 86_400), default=600.0, show_default=True,
    callback=no_nan, help="Seconds for a request, from its arrival to the end of the answer.",
)  # fmt: skip
@click.option(
    "--drain-timeout", "drain_timeout_s", type=click.FloatRange(0, 86_400), default=30.0,
    show_default=True, callback=no_nan,
    help="Seconds for running answers to end after SIGTERM or Ctrl-C.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Most tokens of an answer; as many as fit."
)
@click.option(
    "--max-images", type=click.IntRange(0, 4096), default=16, show_default=True,
    help="Images and video frames of a request.",
)  # fmt: skip
@click.option(
    "--max-image-megapixels", type=click.FloatRange(0.01, 100), default=50.0, show_default=True,
    callback=no_nan, help="Of one image; a request may have twice as many in all.",
)  # fmt: skip
@click.option(
    "--max-body-mb", type=click.FloatRange(0.001, 1024), default=32.0, show_default=True,
    callback=no_nan, help="Of one request, images in base64 included.",
)  # fmt: skip
@click.option(
    "--image-cache-mb", type=click.FloatRange(0, 1_000_000), default=256.0, show_default=True,
    callback=no_nan, help="Features of images that are kept for further questions.",
)  # fmt: skip
@click.option(
    "--allow-image-urls", is_flag=True,
    help="Fetch images from public http(s) addresses; only data: URIs are read without it.",
)  # fmt: skip
@click.option(
    "--ignore-tools", is_flag=True,
    help="Answer requests that offer tools, as Open WebUI's do, in words; refused without it.",
)  # fmt: skip
@click.option(
    "--cors-origin", "cors_origins", multiple=True,
    help="Origin of web pages that may use this server, e.g. https://chat.example; repeatable.",
)  # fmt: skip
@click.option("--tls-cert", type=FilePath(), help="Certificate chain, PEM.")
@click.option("--tls-key", type=FilePath(), help="Its key, PEM.")
@vllm_options
def main(
    engine: Path,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    model_names: tuple[str, ...],
    slots: int | None,
    queue_size: int,
    timeout_s: float,
    drain_timeout_s: float,
    max_tokens: int | None,
    max_images: int,
    max_image_megapixels: float,
    max_body_mb: float,
    image_cache_mb: float,
    allow_image_urls: bool,
    ignore_tools: bool,
    cors_origins: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    vllm: VllmOptions | None,
) -> None:
    """Serve ENGINE, a folder made by vila-build-engine, in OpenAI's API and on a page.

    With --backend vllm it is a checkpoint, plain or quantized; words behind -- go to vLLM.

    \b
    vila-serve ENGINE
    vila-serve ENGINE --host 0.0.0.0 --api-key-file keys.txt --tls-cert c.pem --tls-key k.pem
    vila-serve CHECKPOINT --backend vllm --tp 2 -- --gpu-memory-utilization 0.8
    """
    if vllm is not None and without_server(engine, vllm):
        return
    _check_installed()
    from vila_deploy.server.options import MEGABYTE, RequestLimits, ServerOptions
    from vila_deploy.server.run_server import bind

    tls = _tls(tls_cert, tls_key)
    listener = bind(host, port)
    keys = _keys(api_keys, api_key_file, listener, encrypted=tls is not None)
    options = ServerOptions(
        model_names=_names(model_names, engine),
        api_keys=keys,
        hosts=() if keys else tuple({*LOCAL_HOSTS, host.lower()}),
        cors_origins=tuple(map(_origin, cors_origins)),
        allow_image_urls=allow_image_urls,
        ignore_tools=ignore_tools,
        drain_timeout_s=drain_timeout_s,
        limits=RequestLimits(
            int(max_body_mb * MEGABYTE), int(max_image_megapixels * MEGABYTE), max_images,
            max_tokens, timeout_s,
        ),
    )  # fmt: skip
    if vllm is None:
        _serve(engine, listener, options, tls, slots, queue_size, int(image_cache_mb * MEGABYTE))
    else:
        serve_with_vllm(engine, listener, options, tls, slots, vllm)


def _serve(
    engine: Path,
    listener: socket.socket,
    options: ServerOptions,
    tls: tuple[Path, Path] | None,
    slots: int | None,
    queue_size: int,
    image_cache_bytes: int,
) -> None:
    from vila_deploy.runtime.open_engine import open_engine, slots_that_fit
    from vila_deploy.runtime.scheduler import Scheduler
    from vila_deploy.server.api import Api

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    # asyncio warns of every client that leaves in the middle of its answer.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if slots is None:
        slots = slots_that_fit(engine) if engine.is_dir() else 1
    with open_engine(engine, slots) as opened:
        scheduler = Scheduler(opened, queue_size, image_cache_bytes)
        try:
            api = Api(opened, scheduler, options)
            run_announced(api, listener, tls, f"{opened.session.slots} at once")
        finally:
            scheduler.close()


def _check_installed() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise VilaDeployError(f"vila-serve needs {', '.join(missing)}", fix=install_extra("serve"))


def _tls(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    from vila_deploy.server.run_server import check_tls

    if (certificate is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if certificate is None or key is None:
        return None
    check_tls(certificate, key)
    return certificate, key


def _keys(
    given: tuple[str, ...], file: Path | None, listener: socket.socket, encrypted: bool
) -> tuple[str, ...]:
    from vila_deploy.server.run_server import is_private

    keys = (*given, *(_read_keys(file) if file else ()))
    private = is_private(listener)
    _check_keys(keys, needed=not private)
    if not encrypted and not private:
        click.echo("note: nothing is encrypted without --tls-cert or a proxy in front", err=True)
    return keys


def _read_keys(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:  # a pipe will do, too
            content = file.read(MAX_KEY_FILE_BYTES + 1)
        if len(content) > MAX_KEY_FILE_BYTES:
            what = f"is larger than {MAX_KEY_FILE_BYTES} bytes"
            raise VilaDeployError(what, where=path, fix="one key a line")
        lines = content.decode("utf-8").splitlines()
    except FileNotFoundError:
        raise VilaDeployError("no such file", where=path, fix="give --api-key-file") from None
    except UnicodeDecodeError:
        raise VilaDeployError("is not UTF-8 text", where=path, fix="one key a line") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise VilaDeployError("holds no key", where=path, fix="write one key a line")
    return keys


def _check_keys(keys: tuple[str, ...], needed: bool) -> None:
    if needed and not keys:
        raise VilaDeployError(
            "an address that others reach needs an API key",
            fix="give --api-key-file, --api-key or VILA_API_KEY, or leave --host out",
        )
    if any(len(key) < MIN_KEY_CHARACTERS or not key.isascii() or " " in key for key in keys):
        raise VilaDeployError(
            f"an API key has fewer than {MIN_KEY_CHARACTERS} characters, or others than ASCII's",
            fix="make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )


def _names(given: tuple[str, ...], engine: Path) -> tuple[str, ...]:
    """Return what the model is called: as given, or as its folder."""
    for name in given:
        if not name.strip() or printable(name) != name:
            raise VilaDeployError(
                f"--model-name {short(name)} is no name", fix="give one of printable characters"
            )
    # Path.resolve raises where links go in a circle.
    return given or (printable(os.path.basename(os.path.realpath(engine))) or "vila",)  # noqa: PTH119


def _origin(value: str) -> str:
    scheme, separator, host = value.rstrip("/").lower().partition("://")
    if scheme not in ("http", "https") or not separator or not host or "/" in host or "*" in host:
        raise VilaDeployError(
            f"--cors-origin {short(value)} is no origin", fix="give one as https://chat.example"
        )
    return f"{scheme}://{host}"
