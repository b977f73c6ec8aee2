"""Text files of users, read as UTF-8: with or without its mark, and UTF-16 or UTF-32 that begin with theirs.

A line ends at a newline, with or without a carriage return before it, and at no other character.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf.base.errors import UserError

#: Marks at the beginning of a file; that of UTF-16-LE is the beginning of that of UTF-32-LE, so it comes later.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8",
}
#: First bytes of files whose names say something else.
_FORMS = {
    b"\x1f\x8b": "gzip data; let its name end in .gz",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"PAR1": "Parquet; let its name end in .parquet",
}
_HEAD = 4096
#: Half of a surrogate pair: Python's stand-in for a byte that is not UTF-8; JSON may spell one out, too.
HALF_PAIR = re.compile(r"[\ud800-\udfff]")


@contextmanager
def open_text(file: Path) -> Iterator[IO[bytes]]:
    """Open a text file, packed (.gz) or not, as bytes of UTF-8 without a mark; they are checked where they are decoded.

    Raises:
        OSError: it cannot be opened; EOFError or zlib.error: it cannot be unpacked.
        UserError: it is in UTF-16 or UTF-32 without a mark, or no text.
    """
    with ExitStack() as stack:
        stream: Any = stack.enter_context(file.open("rb"))
        if file.suffix == ".gz":
            stream = stack.enter_context(gzip.open(stream))
        head = stream.peek(_HEAD)[:_HEAD]
        if form := next((form for mark, form in _FORMS.items() if head.startswith(mark)), ""):
            raise UserError(f"{file} holds {form}")
        mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
        if mark == codecs.BOM_UTF8:
            stream.read(len(mark))
        elif mark:
            stream = io.BufferedReader(_AsUtf8(file, stream, _MARKS[mark]))
        elif name := _wide(head[:64]) or _wide(head):  # the names of a JSON object come first
            raise UserError(
                f"{file} is {name}, and no mark at its beginning says so; convert it: "
                f"iconv -f {name} -t UTF-8 {file.name} > NEW"
            )
        yield stream


class _AsUtf8(io.RawIOBase):
    """A stream of UTF-16 or UTF-32 as one of UTF-8. Half a surrogate pair becomes bytes that no reader of UTF-8 takes."""

    def __init__(self, file: Path, stream: IO[bytes], encoding: str) -> None:
        self._file, self._encoding, self._rest = file, encoding, b""
        self._text = io.TextIOWrapper(stream, encoding, errors="surrogatepass", newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            self._rest = self._rest or self._text.read(_HEAD).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._file} begins with the mark of {self._encoding}, but is not: {error.reason}"
            ) from error
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _wide(head: bytes) -> str:
    """Return the encoding of a text in which every second byte, or the half of four, is often zero; empty: another one."""
    zeros = [head[place::4].count(0) / max(len(head[place::4]), 1) for place in range(4)]
    if zeros[3] == 1 and zeros[2] > 0.9 and zeros[0] < 0.5:
        return "UTF-32LE"
    if zeros[0] == 1 and zeros[1] > 0.9 and zeros[3] < 0.5:
        return "UTF-32BE"
    even, odd = head[::2].count(0), head[1::2].count(0)
    few, many = sorted((even, odd))
    if many < max(2, 0.15 * len(head)) or few > many / 8:
        return ""
    return "UTF-16LE" if odd > even else "UTF-16BE"


def text_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file without their ends; raises like `read_text`."""
    return (line.rstrip("\r\n") for line in _decoded_lines(file))


def read_text(file: Path) -> str:
    """Return the text of a file, its line ends as they are.

    Raises:
        OSError: it cannot be opened.
        UserError: a byte that is not UTF-8, or a zero byte; its place is named.
    """
    return "".join(_decoded_lines(file))


def _decoded_lines(file: Path) -> Iterator[str]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if (zero := line.find(b"\0")) >= 0:
                raise UserError(
                    f"{file} is no text: line {number}, byte {zero + 1} is a zero byte; give plain text in UTF-8"
                )
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise UserError(
                    f"{file} is not UTF-8: line {number}, byte {error.start + 1} (0x{byte:02x}, {chr(byte)!r} in Latin-1); "
                    f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {file.name} > NEW"
                ) from error
            yield text
