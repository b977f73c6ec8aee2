"""HTTP requests to scorers and judges: one deadline, a bounded body, and no host but the one that was named."""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from rlhf.base.json_files import decode
from rlhf.base.redaction import redact

WAITS = (0.5, 1.0, 2.0)
"""Seconds before each repetition of a request that failed to connect, or was answered by 429 or 5xx."""
MAX_BODY = 1 << 26
"""Largest body in bytes, before and after it is decompressed."""
_MAX_REDIRECTS = 3


class HttpError(Exception):
    """A request had no usable answer; its text is the reason, without secrets."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(" ".join(str(redact(reason)).split())[:300])
        self.status = status


class _BusyError(HttpError):
    """A failure that may pass."""

    def __init__(self, reason: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(reason, status)
        self.wait = wait


def post_json(url: str, payload: Any, *, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """Return the JSON value with which a server answers a JSON payload.

    Args:
        timeout: seconds for everything: connecting, repetitions, the waits between them, and the body.

    Raises:
        HttpError: there was no such answer in time.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout

    def work() -> None:
        try:
            outcome.put(_repeat(url, payload, dict(headers or {}), deadline))
        except Exception as error:
            outcome.put(error)

    # A thread, because a server that sends a byte now and then outlasts every timeout of a socket.
    threading.Thread(target=work, name="post-json", daemon=True).start()
    try:
        result = outcome.get(timeout=timeout)
    except queue.Empty:
        raise HttpError(f"no complete answer within {timeout:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def _repeat(url: str, payload: Any, headers: dict[str, str], deadline: float) -> Any:
    for wait in (*WAITS, None):
        try:
            return _once(url, payload, headers, deadline)
        except _BusyError as error:
            pause = max(wait or 0.0, error.wait)
            if wait is None:
                raise
            if time.monotonic() + pause >= deadline:
                raise HttpError(f"{error}, and no time is left to ask again after {pause:g} s", error.status) from error
            time.sleep(pause)
    raise AssertionError("the last round returns or raises")


def _once(url: str, payload: Any, headers: dict[str, str], deadline: float) -> Any:
    """Return the answer to one request, which may be sent on by its own host."""
    asked = {**headers, "Accept-Encoding": "identity"}
    with requests.Session() as session:
        for _ in range(_MAX_REDIRECTS + 1):
            remaining = max(deadline - time.monotonic(), 0.001)
            try:
                answer = session.post(
                    url, json=payload, headers=asked, timeout=remaining, stream=True, allow_redirects=False
                )
                if answer.is_redirect:
                    url = _same_host(url, answer.headers["Location"])
                    continue
                if answer.status_code == 429 or answer.status_code >= 500:
                    raise _BusyError(f"{answer.status_code} {answer.reason}", answer.status_code, _retry_after(answer))
                if not answer.ok:
                    raise HttpError(f"{answer.status_code} {answer.reason}", answer.status_code)
                return decode(_body(answer, deadline))
            except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError, OSError) as error:
                if isinstance(error, requests.RequestException) and not isinstance(
                    error, requests.ConnectionError | requests.Timeout
                ):
                    raise HttpError(str(error)) from error
                raise _BusyError(str(error)) from error
            except (ValueError, zlib.error) as error:
                raise HttpError(f"the answer is no JSON ({error})") from error
    raise HttpError(f"more than {_MAX_REDIRECTS} redirects")


def _same_host(url: str, location: str) -> str:
    """Return the address that a redirect leads to; raise `HttpError` if it is another server's."""
    target = urljoin(url, location)
    if urlsplit(target)[:2] != urlsplit(url)[:2]:
        raise HttpError(
            f"it redirects to another server, {urlsplit(target).netloc}; if that is right, give its address"
        )
    return target


def _retry_after(answer: requests.Response) -> float:
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0


def _body(answer: requests.Response, deadline: float) -> bytes:
    body = bytearray()
    while chunk := answer.raw.read1(1 << 16, decode_content=False):
        body += chunk
        if len(body) > MAX_BODY:
            raise HttpError(f"the answer is longer than {MAX_BODY >> 20} MB")
        if time.monotonic() > deadline:
            raise HttpError("the answer came too slowly")
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    if encoding == "identity":
        return bytes(body)
    if encoding not in ("gzip", "deflate"):
        raise HttpError(f"the answer is compressed as {encoding}, which was not asked for")
    plain = zlib.decompressobj(wbits=47).decompress(bytes(body), MAX_BODY + 1)
    if len(plain) > MAX_BODY:
        raise HttpError(f"the answer is longer than {MAX_BODY >> 20} MB once decompressed")
    return plain
