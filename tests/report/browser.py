"""A real browser for the tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 60_000
"""Milliseconds; machines that run many tests at once are slow."""


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Yield the browser of this machine; the test is skipped without one."""
    api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no chromium or chrome on this machine")
    with api.sync_playwright() as browsers:
        own = browsers.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        yield own
        own.close()


@contextlib.contextmanager
def opened(own: Any, file: Path, **options: Any) -> Iterator[Any]:
    """Yield the page of a file when its plots are drawn; any complaint of the browser, or request of the page, fails the test."""
    complaints: list[str] = []
    page = own.new_page(**options)
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    yield page
    page.close()
    assert not complaints, complaints
