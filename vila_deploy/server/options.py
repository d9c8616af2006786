"""What a server is told at its start: addresses, keys and limits."""

from __future__ import annotations

from dataclasses import dataclass

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class RequestLimits:
    """The most that one request may ask for.

    Args:
        body_bytes: of the HTTP body, images included.
        image_pixels: width × height of one image; a request may have twice as many in all.
        images: images and video frames of one request.
        max_tokens: tokens of one answer; None: as many as fit into the engine.
        timeout_s: from the arrival of the request to the end of its answer.
        body_timeout_s: for the body to arrive.
    """

    body_bytes: int = 32 * MEGABYTE
    image_pixels: int = 50 * MEGABYTE
    images: int = 16
    max_tokens: int | None = None
    timeout_s: float = 600.0
    body_timeout_s: float = 60.0


@dataclass(frozen=True)
class ServerOptions:
    """How the server answers.

    Args:
        model_names: what clients may call the model; the first one is told to them.
        api_keys: keys of which each request needs one; none: no request needs any.
        hosts: values of the Host header that are answered, without port; none: all. A page on the
            web can point a name of its own at 127.0.0.1; its Host tells.
        cors_origins: origins of web pages that browsers may let use this server.
        allow_image_urls: fetch images from http(s) addresses on the internet.
        ignore_tools: answer requests that offer tools in words, instead of refusing them.
        drain_timeout_s: for running answers to end after SIGTERM.
        body_bytes_in_flight: of all bodies that are being read at once.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allow_image_urls: bool = False
    ignore_tools: bool = False
    drain_timeout_s: float = 30.0
    body_bytes_in_flight: int = 256 * MEGABYTE
    limits: RequestLimits = RequestLimits()
