"""Images from addresses: strict URLs, public addresses alone, each hop checked and pinned."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.internet import OTHER, PUBLIC, Answer, Internet
from vila_deploy.server.errors import ApiError
from vila_deploy.server.remote_images import fetch_image, is_public, parse_url

PNG = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 3\r\n\r\nabc"


def fetch(url: str, internet: Internet, max_bytes: int = 100) -> bytes:
    return asyncio.run(fetch_image(url, "here", max_bytes, internet.network))


def refused(url: str, internet: Internet, max_bytes: int = 100) -> None:
    with pytest.raises(ApiError, match="could not be fetched") as caught:
        fetch(url, internet, max_bytes)
    assert caught.value.status == 400
    assert caught.value.code == "image_not_fetched"


def site(answer: Answer, *addresses: str) -> Internet:
    return Internet({"a.org": [list(addresses or (PUBLIC,))]}, {PUBLIC: answer})


def redirect(target: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


def test_an_image() -> None:
    internet = site(PNG)
    assert fetch("http://a.org/x%20y.png?b=1", internet) == b"abc"
    assert internet.connections == [(PUBLIC, 80)]
    request = internet.requests[0]
    assert request.startswith(b"GET /x%20y.png?b=1 HTTP/1.1\r\n")
    assert b"\r\nhost: a.org\r\n" in request
    assert b"cookie" not in request
    assert b"authorization" not in request


def test_the_next_address_is_tried() -> None:
    internet = Internet({"a.org": [[OTHER, PUBLIC]]}, {PUBLIC: PNG})
    assert fetch("http://a.org/", internet) == b"abc"
    assert internet.connections == [(OTHER, 80), (PUBLIC, 80)]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.1.1",
        "169.254.169.254", "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "::127.0.0.1",
        "::ffff:127.0.0.1", "::ffff:93.184.215.14", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:7f00:1::", "2001:db8::1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    internet = Internet({"a.org": [[address]]}, {})
    refused("http://a.org/", internet)
    assert internet.connections == []


def test_public_addresses() -> None:
    assert is_public(PUBLIC)
    assert is_public(OTHER)


def test_one_private_address_among_public_ones() -> None:
    internet = site(PNG, PUBLIC, "127.0.0.1")
    refused("http://a.org/", internet)
    assert internet.connections == []


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A name that answers otherwise the second time (DNS rebinding) changes nothing."""
    internet = Internet({"a.org": [[PUBLIC], ["127.0.0.1"]]}, {PUBLIC: PNG})
    assert fetch("http://a.org/", internet) == b"abc"
    assert internet.resolved == ["a.org"]


@pytest.mark.parametrize(
    "url",
    [
        "http://a.org\\@127.0.0.1/", "http://127.0.0.1\\@a.org/", "http://user@a.org/",
        "http://user:pw@a.org/", "http://a.org#@127.0.0.1/", "http://a.org:22/", "http://a.org:8000/",
        "http://a.org:/", "http:/a.org/", "http:///a.org/", "http://a .org/",
        "http://a.org/\r\nX: y",
        "http://a.org/\n", "http://ａ.org/", "http://é.org/", "http://a.org/é", "http://a.org/\x00",
        "http://[::1/", "http://[fe80::1%25eth0]/", "http://a.org/#x", "HTTP://", "http://a_b.org/",
        "ftp://a.org/", "file:///etc/passwd", "gopher://a.org/", "http://a.org/ ", "//a.org/",
    ],
)  # fmt: skip
def test_urls_that_parsers_read_differently(url: str) -> None:
    internet = site(PNG)
    with pytest.raises(ApiError, match="is no plain http"):
        fetch(url, internet)
    assert internet.resolved == []


def test_plain_urls() -> None:
    location = parse_url("HTTPS://A.ORG:443/Path?Q=1")
    assert location is not None
    assert (location.scheme, location.host, location.port) == ("https", "a.org", 443)
    assert location.target == "/Path?Q=1"
    ipv6 = parse_url("http://[2606:2800::1]")
    assert ipv6 is not None
    assert (ipv6.host, ipv6.target) == ("[2606:2800::1]", "/")


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "017700000001", "localhost"])
def test_other_spellings_of_this_computer(host: str) -> None:
    """The resolver says what they mean, and that is what is checked."""
    refused(f"http://{host}/", Internet({host: [["127.0.0.1"]]}, {"127.0.0.1": PNG}))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int) -> None:
    internet = Internet(
        {"a.org": [[PUBLIC]], "b.org": [[OTHER]]},
        {PUBLIC: redirect("http://b.org/x", status), OTHER: PNG},
    )
    assert fetch("http://a.org/", internet) == b"abc"
    assert internet.connections == [(PUBLIC, 80), (OTHER, 80)]


@pytest.mark.parametrize(
    "target",
    [
        "http://inside.org/", "http://127.0.0.1/", "http://[::1]/", "//127.0.0.1/",
        "file:///etc/passwd", "http://b.org:22/", "http://b.org\\@127.0.0.1/", "ftp://b.org/", "",
        "x.png", "gopher://127.0.0.1:6379/_FLUSHALL",
    ],
)  # fmt: skip
def test_every_hop_is_checked(target: str) -> None:
    names = {"a.org": [[PUBLIC]], "inside.org": [["10.0.0.1"]], "127.0.0.1": [["127.0.0.1"]],
             "::1": [["::1"]]}  # fmt: skip
    internet = Internet(names, {PUBLIC: redirect(target), "10.0.0.1": PNG, "127.0.0.1": PNG})
    refused("http://a.org/", internet)
    assert internet.connections == [(PUBLIC, 80)]


def test_redirects_end() -> None:
    internet = site(redirect("/again"))
    refused("http://a.org/", internet)
    assert len(internet.connections) == 4


def test_no_way_back_from_https() -> None:
    location = parse_url("https://a.org/")
    assert location is not None
    import h11

    from vila_deploy.server import remote_images

    response = h11.Response(status_code=302, headers=[("location", "http://a.org/")])
    with pytest.raises(remote_images._NotFetched):
        remote_images._redirect(location, response)


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
    for _ in range(1000):
        writer.write(b"x" * 1000)
        await writer.drain()


async def trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100):
        writer.write(b"x%d: y\r\n" % number)
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "answer",
    [
        endless, trickle, b"", b"garbage\r\n\r\n", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 999999999999\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    ],
)  # fmt: skip
def test_answers_that_are_no_image(answer: Answer) -> None:
    internet = site(answer)
    internet.timeout_s = 0.5
    refused("http://a.org/", internet)


def test_a_name_that_is_not_there_sounds_as_one_that_may_not_be_asked() -> None:
    texts = set()
    for names in ({}, {"a.org": [["127.0.0.1"]]}, {"a.org": [[PUBLIC]]}):
        with pytest.raises(ApiError) as caught:
            fetch("http://a.org/", Internet(names, {}))
        texts.add(str(caught.value))
    assert len(texts) == 1
