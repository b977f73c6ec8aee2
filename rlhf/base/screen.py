"""Output on a terminal, free of control characters of data and models, which could steer it.

`clean_output` replaces the control characters of all that is printed. `console` writes past it, and cleans what it is given.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_BAR = re.compile(r"\r|(\x1b\[A)+")
"""Beginning of what a progress bar of a library writes: it draws over its own line."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All control characters but line feed and tab: escape sequences begin with one of them."""


def printable(text: str) -> str:
    r"""Return a text with control characters written out, as in `\x1b`."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n"))


class CleanStream:
    """A text stream that writes `printable` texts to another.

    Args:
        bars: let progress bars begin at the start of the line.
    """

    def __init__(self, stream: TextIO, *, bars: bool = False) -> None:
        self.stream, self.bars = stream, bars

    def write(self, text: str) -> int:
        """Write a text and return its length."""
        bar = _BAR.match(text) if self.bars else None
        start = bar.end() if bar else 0
        self.stream.write(text[:start] + printable(text[start:]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def clean_output() -> Iterator[None]:
    """Context in which standard output and standard error get no control characters."""
    streams = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, CleanStream(raw(sys.stdout)))
    sys.stderr = cast(TextIO, CleanStream(raw(sys.stderr), bars=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def raw(stream: TextIO) -> TextIO:
    """Return the stream below a `CleanStream`, for colours of our own and for programs that read; other streams unchanged."""
    return stream.stream if isinstance(stream, CleanStream) else stream


def console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a rich console whose texts are cleaned, and whose colours and cursor movements reach the terminal."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, *arguments: Any, **keywords: Any) -> Any:
            for segment in super().render(*arguments, **keywords):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

        def render_str(self, text: str, **keywords: Any) -> Any:
            return super().render_str(printable(text), **keywords)

    return CleanConsole(file=raw(sys.stderr if stderr else sys.stdout), **options)
