"""Requests to servers that are slow, greedy or lead elsewhere: one deadline, one size, one host."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf.base import http
from rlhf.base.http import HttpError, post_json

Answer = Callable[[Any], None]
"""What a server does with a request: it gets the handler."""


def send(handler: Any, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """`server(first, second)` serves these answers, the last one again and again; its address, and the requests' bodies."""
    servers: list[ThreadingHTTPServer] = []

    def serve(*answers: Answer) -> tuple[str, list[Any]]:
        seen: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answers[min(len(seen), len(answers)) - 1](self)

            def log_message(self, *args: Any) -> None:
                pass

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        servers.append(made)
        return f"http://127.0.0.1:{made.server_port}/score", seen

    yield serve
    for made in servers:
        made.shutdown()
        made.server_close()


def good(handler: Any) -> None:
    send(handler, b'{"scores": [1]}')


def drip_body(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    drip(handler)


def drip_header(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    drip(handler)


def drip(handler: Any) -> None:
    for _ in range(100):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.1)


def silent(handler: Any) -> None:
    time.sleep(10)


def busy(**headers: str) -> Answer:
    return lambda handler: send(handler, b"", 503, **headers)


@pytest.mark.parametrize("answer", [drip_body, drip_header, silent, busy(Retry_After="3600"), busy()])
def test_everything_ends_at_the_deadline(answer: Answer, server: Callable[..., tuple[str, list[Any]]]) -> None:
    """Catches: a run that hangs for an hour on `Retry-After: 3600`, or for ever on a byte now and then."""
    url, _ = server(answer)
    start = time.monotonic()
    with pytest.raises(HttpError):
        post_json(url, {}, timeout=1.0)
    assert time.monotonic() - start < 3


def test_a_busy_server_is_asked_again_as_it_wishes(server: Callable[..., tuple[str, list[Any]]]) -> None:
    """Catches: a run that dies of one 503, and a server asked again before the second it asked for."""
    url, seen = server(busy(Retry_After="1"), good)
    start = time.monotonic()
    assert post_json(url, {"a": 1}, timeout=30) == {"scores": [1]}
    assert time.monotonic() - start >= 1 and seen == [{"a": 1}, {"a": 1}]


def test_too_long_a_wait_is_named(server: Callable[..., tuple[str, list[Any]]]) -> None:
    """Catches: a refusal without the reason."""
    url, seen = server(busy(Retry_After="3600"))
    with pytest.raises(HttpError, match=r"503 .*no time is left to ask again after 3600 s") as error:
        post_json(url, {}, timeout=5.0)
    assert error.value.status == 503 and len(seen) == 1


def test_repetitions_end(server: Callable[..., tuple[str, list[Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a server that is always busy, asked until the deadline."""
    monkeypatch.setattr(http, "WAITS", (0.01, 0.02))
    url, seen = server(busy())
    with pytest.raises(HttpError, match="503"):
        post_json(url, {}, timeout=30)
    assert len(seen) == 3


def compressed(size: int, encoding: str = "gzip") -> Answer:
    body = gzip.compress(b'"' + b"a" * (size - 2) + b'"')
    return lambda handler: send(handler, body, Content_Encoding=encoding)


@pytest.mark.parametrize("form", ["plain", "compressed"])
def test_bodies_have_a_largest_size(
    form: str, server: Callable[..., tuple[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a server that fills the memory, with many bytes or with few that unpack to many."""
    monkeypatch.setattr(http, "MAX_BODY", 1 << 20)

    def answer(size: int) -> Answer:
        return compressed(size) if form == "compressed" else lambda h: send(h, b'"' + b"a" * (size - 2) + b'"')

    url, _ = server(answer(1 << 20))
    assert len(post_json(url, {}, timeout=30)) == (1 << 20) - 2
    url, _ = server(answer((1 << 20) + 1))
    with pytest.raises(HttpError, match="longer than 1 MB"):
        post_json(url, {}, timeout=30)


@pytest.mark.parametrize(
    "answer", [compressed(100, "br"), lambda h: send(h, b"<html>"), lambda h: send(h, b"[" * 9999)]
)
def test_what_is_no_json_is_refused(answer: Answer, server: Callable[..., tuple[str, list[Any]]]) -> None:
    """Catches: a traceback of a decoder, and an error page that is asked for again and again."""
    url, seen = server(answer)
    with pytest.raises(HttpError):
        post_json(url, {}, timeout=30)
    assert len(seen) == 1


def test_redirects_stay_at_the_host(server: Callable[..., tuple[str, list[Any]]]) -> None:
    """Catches: prompts and keys sent to a server that nobody named, a slash too few that stops a run, and a circle."""
    other, received = server(good)
    url, _ = server(lambda h: send(h, b"", 307, Location=other))
    with pytest.raises(HttpError, match=r"redirects to another server, 127\.0\.0\.1:\d+"):
        post_json(url, {}, timeout=30, headers={"Authorization": "Bearer secret"})
    assert received == []
    url, seen = server(lambda h: send(h, b"", 308, Location="/score/"), good)
    assert post_json(url, {"a": 1}, timeout=30) == {"scores": [1]} and seen == [{"a": 1}] * 2
    url, seen = server(lambda h: send(h, b"", 302, Location="/score"))
    with pytest.raises(HttpError, match="more than 3 redirects"):
        post_json(url, {}, timeout=30)
    assert len(seen) == 4


def test_nobody_there() -> None:
    """Catches: a traceback of the network library."""
    with pytest.raises(HttpError, match=r"refused|no time is left"):
        post_json("http://127.0.0.1:9/", {}, timeout=1.0)
