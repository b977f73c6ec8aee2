"""JSON and JSON lines, read with limits of size, nesting and digits, and with types checked.

`decode` and `read_value` raise `ValueError` or `OSError`, for callers with a message of their own.
`parse_object` and `read_object` raise a `UserError` that names the source and the fix.
`read_object_or_none` and `read_jsonl` leave out what cannot be read.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from rlhf.base.errors import UserError

MAX_BYTES = 1 << 28
"""Longest JSON text that is decoded; the largest that this package writes are caches of sampled answers, some megabytes."""
MAX_LINE_BYTES = 1 << 24
"""Longest line of a `.jsonl` file of this package."""
MAX_DEPTH = 100
"""Deepest nesting of lists and objects, far below the depth at which Python's own recursion ends."""
MAX_PARTS = 1_000_000
"""Most values in a YAML file, with what its aliases stand for."""
MAX_DIGITS = 100
"""Longest whole number, in digits; any shorter one fits a float."""

_FIX = "restore it from a copy, or delete it and write it again"


def decode(text: str | bytes, *, nan_as_none: bool = False) -> Any:
    """Return the JSON value of a text; bytes must be UTF-8.

    Args:
        nan_as_none: read NaN, Infinity and -Infinity, which Python writes and JSON lacks, as None instead of as floats.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.
        ValueError: no JSON, or beyond one of the limits; its text is the reason.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES / 1e6:.0f} MB")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = (_NAN_AS_NONE if nan_as_none else _DECODER).decode(text)
    except RecursionError:
        _refuse_depth()
    if text.count("[") + text.count("{") > MAX_DEPTH:  # else it cannot be nested so deeply
        check_depth(value)
    return value


def _integer(digits: str) -> int:
    check_digits(digits)
    return int(digits)


def check_digits(digits: str) -> None:
    """Raise `ValueError` for a whole number longer than `MAX_DIGITS`."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, more than {MAX_DIGITS}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        check_repeated(pairs)
    return value


def check_repeated(pairs: Iterable[tuple[str, Any]]) -> None:
    """Raise `ValueError` for a name that stands twice with different values: a reader would take the last without a word."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values and values[name] != value:
            raise ValueError(f"`{name}` stands twice, with different values")
        values[name] = value


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)
_NAN_AS_NONE = json.JSONDecoder(
    parse_int=_integer,
    parse_float=lambda digits: number if math.isfinite(number := float(digits)) else None,  # 1e999 is infinite
    parse_constant=lambda _: None,
    object_pairs_hook=_object,
)


def check_characters(value: Any) -> None:
    """Raise `ValueError` for half a surrogate pair in a text, which no file, page or terminal can be given."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text with half a character (a lone surrogate)") from error


def check_depth(value: Any) -> None:
    """Raise `ValueError` for a value nested more deeply than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children = (child for parent in level for child in _children(parent) if isinstance(child, dict | list))
        level = list({id(child): child for child in children}.values())  # a YAML file may name one list a million times
        if not level:
            return
    _refuse_depth()


def check_expanded(value: Any) -> None:
    """Raise `ValueError` for a value of more than `MAX_PARTS` parts, one that YAML names again counted each time."""
    sizes: dict[int, int] = {}

    def size(part: Any) -> int:
        if id(part) not in sizes:
            sizes[id(part)] = 1 + sum(map(size, _children(part)))
        return sizes[id(part)]

    if size(value) > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS:,} parts")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_depth() -> NoReturn:
    raise ValueError(f"nested too deeply, more than {MAX_DEPTH} levels")


def parse_object(text: str | bytes, source: object, *, fix: str = _FIX, nan_as_none: bool = False) -> dict[str, Any]:
    """Return the JSON object of a text; `UserError` names the source, the reason and the fix."""
    try:
        value = decode(text, nan_as_none=nan_as_none)
        check_characters(value)
    except ValueError as error:
        raise UserError(f"{source} is not readable as JSON ({error}); {fix}") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} holds a {type(value).__name__}, not an object; {fix}")
    return value


def read_object(file: Path, *, fix: str = _FIX, nan_as_none: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        fix: end of the error message, an instruction to the user.
        nan_as_none: as of `decode`.

    Raises:
        OSError: the file cannot be opened.
        UserError: no JSON object, or beyond a limit.
    """
    return parse_object(read_bytes(file), file, fix=fix, nan_as_none=nan_as_none)


def read_object_or_none(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where there is no such file, or something else in it."""
    try:
        return read_object(file)
    except (OSError, UserError):
        return None


def read_value(file: Path) -> Any:
    """Return the JSON value in a file; raises `OSError`, or `ValueError` like `decode`."""
    return decode(read_bytes(file))


def read_bytes(file: Path) -> bytes:
    """Return a file's bytes, one more than `MAX_BYTES` at most; raises `OSError`, also for pipes, which may never end."""
    if not file.is_file() and file.exists():
        raise OSError(errno.EINVAL, "Not a plain file", str(file))
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def read_jsonl(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a `.jsonl` file, and the number of lines that are not JSON objects (a killed run leaves half a line).

    NaN and infinity become None; bytes that are not UTF-8 become replacement characters.
    """
    rows, unreadable = [], 0
    with file.open("rb") as stream:
        for line, size in bounded_lines(stream, MAX_LINE_BYTES):
            if not line.strip():
                continue
            row = _row(line) if size <= MAX_LINE_BYTES else None
            if row is None:
                unreadable += 1
            else:
                rows.append(row)
    return rows, unreadable


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        value = decode(line.decode("utf-8", "replace"), nan_as_none=True)
        if b"\\u" in line:
            check_characters(value)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


EXCERPT = 2000
"""Bytes that are kept of a line that is too long."""


def bounded_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Yield each line and its length in bytes, line end excluded; a line longer than `limit` is cut to `EXCERPT` bytes."""
    while line := stream.readline(limit + 1):
        size = len(line.rstrip(b"\r\n"))
        if size > limit:
            line = line[:EXCERPT]
            while (more := stream.readline(1 << 20)) and not more.endswith(b"\n"):
                size += len(more)
            size += len(more.rstrip(b"\r\n"))
        yield line, size


def entries(tree: Mapping[str, Any], name: str) -> list[Any]:
    """Return the list under a name, empty where there is none."""
    entry = tree.get(name)
    return entry if isinstance(entry, list) else []


def section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping under a name, empty where there is none."""
    entry = tree.get(name)
    return entry if isinstance(entry, dict) else {}


def finite_number(value: Any) -> float | None:
    """Return the value as a float, None unless it is a finite number; figures may be null, absent or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
