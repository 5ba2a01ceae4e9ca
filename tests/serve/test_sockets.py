"""Slow, cut-off and garbage requests: each ends, nothing is lost, and the others are served meanwhile."""

from __future__ import annotations

import errno
import json
import socket

import pytest

pytest.importorskip("starlette")

from tests.serving import serving

pytestmark = pytest.mark.slow

HEAD = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a red circle", "width": 64, "height": 64, "steps": 1}'


@pytest.fixture(scope="module")
def hasty(model, tmp_path_factory):
    """A server that waits for half a second."""
    with serving(model, tmp_path_factory.mktemp("hasty"), "--timeout", "0.5") as server:
        yield server


def sent(server, *parts: bytes, end: bool = False) -> bytes:
    """Send bytes, and read until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            if end:
                connection.shutdown(socket.SHUT_WR)
            found = b""
            while piece := connection.recv(65536):
                found += piece
        except OSError as error:
            # The server has closed the connection already: where it is first noticed is a matter of time.
            if not isinstance(error, ConnectionError) and error.errno != errno.ENOTCONN:
                raise
            return b""
        return found


def with_length(body: bytes, length: int | None = None) -> bytes:
    return HEAD + f"Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


GARBAGE = {
    "nothing known": b"\x00\x01\x02\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "no HTTP": b"hello\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /jobs HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    "a length that is none": HEAD + b"Content-Length: many\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "an endless line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "endless headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 30_000,
    "control characters": b"GET /\x07 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage(hasty, data):
    answer = sent(hasty, data, end=True)
    # The end of what is sent may be seen before there is an answer.
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505")), answer
    assert b"Traceback" not in answer
    assert hasty.json("GET", "/ready")["status"] == "ready"


@pytest.mark.parametrize(("version", "status"), [("1.0", 200), ("1.1", 200), ("0.9", 505), ("2.0", 505), ("9.9", 505)])
def test_versions(hasty, version, status):
    answer = sent(hasty, f"GET /health HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer


SLOW = {
    "nothing is sent": b"",
    "a part of the head": b"POST /jobs HT",
    "a head without end": HEAD,
    "a second request without end": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
}


@pytest.mark.parametrize("data", SLOW.values(), ids=SLOW)
def test_heads_that_stop_coming(hasty, data):
    answer = sent(hasty, data)
    assert b"/jobs" not in answer
    assert answer.count(b"HTTP/1.1 200") == (1 if data.startswith(b"GET") else 0)


def test_bodies_that_stop_coming(hasty):
    before = len(hasty.json("GET", "/jobs")["jobs"])
    for data in (with_length(BODY[:20], len(BODY)), HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        answer = sent(hasty, data)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the request stopped coming"
    assert len(hasty.json("GET", "/jobs")["jobs"]) == before


def test_bodies_that_are_cut_off(hasty):
    before = len(hasty.json("GET", "/jobs")["jobs"])
    for length in (0, 1, len(BODY) - 1):
        sent(hasty, with_length(BODY[:length], len(BODY)), end=True)
    assert len(hasty.json("GET", "/jobs")["jobs"]) == before
    assert sent(hasty, with_length(BODY).replace(b"Host:", b"Connection: close\r\nHost:")).startswith(b"HTTP/1.1 202")


def test_bodies_that_are_too_large(model, tmp_path):
    with serving(model, tmp_path, "--max-body", "1") as server:
        chunks = (b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 40
        answer = sent(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks)
        assert answer == b"" or b" 413 " in answer
        assert sent(server, with_length(b"", 1 << 40)).startswith(b"HTTP/1.1 413")
        assert server.json("GET", "/ready")["status"] == "ready"


def test_a_listener_that_does_not_read_holds_up_nobody(hasty):
    connections = [socket.create_connection(("127.0.0.1", hasty.port)) for _ in range(20)]
    for connection in connections:
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert hasty.draw(steps=40)["state"] == "done"
    for connection in connections:
        connection.close()
