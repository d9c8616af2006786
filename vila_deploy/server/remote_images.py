"""Fetch an image from the internet, and from nowhere else.

Of every hop the URL is parsed once, strictly; all addresses of its name must be public; the
connection goes to an address that was checked, so that a name can't change between check and use.
What went wrong is not told: the answers would map the network behind the server.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import h11

from vila_deploy.server.errors import ApiError

TIMEOUT_S = 10.0
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
# Plain characters only: no user, no backslash, no other port, no bracket but IPv6's, no fragment.
URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>80|443))?"
    r"(?P<target>/[A-Za-z0-9._~:/?@!$&'()*+,;=%-]*)?",
    re.ASCII,
)
REDIRECTS = (301, 302, 303, 307, 308)
MAX_ADDRESSES = 4
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Location:
    """A parsed http(s) URL; `host` as in the URL, brackets of an IPv6 address included."""

    scheme: str
    host: str
    port: int
    target: str


class _NotFetched(Exception):
    pass


def parse_url(url: str) -> Location | None:
    """Return the parts of a plain http(s) URL without user or fragment; None for all others."""
    scheme, separator, rest = url.partition("://")
    host, slash, target = rest.partition("/")
    match = URL.fullmatch(f"{scheme.lower()}{separator}{host.lower()}{slash}{target}")
    if match is None:
        return None
    port = int(match["port"] or PORTS[match["scheme"]])
    return Location(match["scheme"], match["host"], port, match["target"] or "/")


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet; IPv6 forms of IPv4 are not."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embeds_ipv4 = ip.sixtofour is not None or ip.teredo is not None
        if embeds_ipv4 or ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291


def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host."""
    return [str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Network:
    """How names become addresses, and addresses connections; tests put others in their place."""

    resolve: Callable[[str, int], list[str]] = resolve
    connect: Callable[..., Awaitable[Streams]] = asyncio.open_connection
    timeout_s: float = TIMEOUT_S
    tls: Callable[[], ssl.SSLContext] = field(default=ssl.create_default_context)


async def fetch_image(
    url: str, param: str, max_bytes: int, network: Network | None = None
) -> bytes:
    """Return the bytes of the image at a public http(s) address.

    Raises:
        ApiError: no such URL, or not fetched, for whatever reason, within the limits.
    """
    location = parse_url(url)
    if location is None:
        raise ApiError(
            "is no plain http(s) URL", param=param, fix="send https://host/path, or a data: URI"
        )
    network = network or Network()
    try:
        async with asyncio.timeout(network.timeout_s):
            for _ in range(MAX_REDIRECTS + 1):
                content, following = await _fetch(location, max_bytes, network)
                if following is None:
                    return content
                location = following
    except (OSError, TimeoutError, ValueError, h11.ProtocolError, _NotFetched):
        pass
    raise ApiError(
        "could not be fetched",
        param=param,
        code="image_not_fetched",
        fix=f"send a public address of an image of at most {max_bytes / 1e6:g} MB, or a data: URI",
    )


async def _fetch(
    location: Location, max_bytes: int, network: Network
) -> tuple[bytes, Location | None]:
    """Return the body at a location, or where it redirects to."""
    reader, writer = await _connect(location, network)
    try:
        return await _exchange(location, reader, writer, max_bytes)
    finally:
        writer.close()


async def _connect(location: Location, network: Network) -> Streams:
    """Connect to one of the addresses of a location, all of which must be public."""
    host = location.host.strip("[]")
    addresses = await asyncio.to_thread(network.resolve, host, location.port)
    if not all(map(is_public, addresses)):
        raise _NotFetched
    secure = {"ssl": network.tls(), "server_hostname": host} if location.scheme == "https" else {}
    for address in addresses[:MAX_ADDRESSES]:
        try:
            return await network.connect(address, location.port, **secure)
        except OSError:
            continue
    raise _NotFetched


async def _exchange(
    location: Location,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    max_bytes: int,
) -> tuple[bytes, Location | None]:
    connection = h11.Connection(h11.CLIENT)
    headers = [
        ("host", location.host),
        ("user-agent", "vila-serve"),
        ("accept", "image/*"),
        ("accept-encoding", "identity"),
        ("connection", "close"),
    ]
    request = connection.send(h11.Request(method="GET", target=location.target, headers=headers))
    end = connection.send(h11.EndOfMessage())
    writer.write((request or b"") + (end or b""))
    content = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            following = _redirect(location, event)
            if following is not None:
                return b"", following
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > max_bytes:
                raise _NotFetched
        elif isinstance(event, h11.EndOfMessage):
            return bytes(content), None
        elif isinstance(event, h11.ConnectionClosed):
            raise _NotFetched


def _redirect(location: Location, response: h11.Response) -> Location | None:
    """Return where a response leads; None if it has the image itself."""
    headers = {name: value.decode("latin-1") for name, value in response.headers}
    if response.status_code not in REDIRECTS:
        kind, encoding = headers.get(b"content-type", ""), headers.get(b"content-encoding", "")
        if response.status_code != 200 or encoding not in ("", "identity"):
            raise _NotFetched
        if not kind.lower().startswith(("image/", "application/octet-stream")):
            raise _NotFetched
        return None
    target = headers.get(b"location", "")
    if target.startswith("/") and not target.startswith("//"):
        target = f"{location.scheme}://{location.host}:{location.port}{target}"
    following = parse_url(target)
    if following is None or (location.scheme == "https" and following.scheme == "http"):
        raise _NotFetched
    return following
