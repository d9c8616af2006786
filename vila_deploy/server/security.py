"""Who may ask, from where, and what every response tells a browser."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers

from vila_deploy.server.errors import ApiError
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.page_files import PAGE_FILES

# The page needs its own script and style, images that it was given, and this server's API.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# Health tells nothing but that the server runs; the page has a field for the key.
WITHOUT_KEY = (*PAGE_FILES, "/health")


class Keys:
    """API keys, compared in constant time whatever their length."""

    def __init__(self, keys: Collection[str]):
        self._digests = [_digest(key) for key in keys]

    def check(self, headers: Headers) -> None:
        """Raise ApiError unless there are no keys, or the Authorization header has one of them."""
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, so that the time doesn't tell which.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                "the API key is missing or wrong",
                status=401,
                code="invalid_api_key",
                fix="send Authorization: Bearer KEY",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_source(headers: Headers, options: ServerOptions) -> None:
    """Refuse requests under a name that isn't ours, and those of web pages elsewhere.

    Raises:
        ApiError: a Host that isn't in `options.hosts`, or an Origin that is neither this server nor
            in `options.cors_origins`.
    """
    host = headers.get("host", "")
    if options.hosts and host_name(host) not in options.hosts:
        raise ApiError(
            "this server is not known under the name in the Host header",
            status=403,
            code="wrong_host",
            fix="use its address, or give it an API key and --host",
        )
    origin = headers.get("origin")
    if origin is None or origin in options.cors_origins:
        return
    if origin.partition("://")[2] != host:
        raise ApiError(
            "web pages of another origin may not use this server",
            status=403,
            code="wrong_origin",
            fix="start it with --cors-origin and that origin",
        )


def host_name(host: str) -> str:
    """Return a Host header without its port, lower case."""
    name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def is_loopback(address: str) -> bool:
    """Return whether an IP address reaches this computer alone."""
    return ipaddress.ip_address(address).is_loopback


def check_json(headers: Headers) -> None:
    """Refuse bodies that a form on any web page could send without asking first."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            "the body's type is not application/json",
            status=415,
            fix="send Content-Type: application/json",
        )
