"""Reading JSON: limits just inside and just outside, and one clear error for whatever a file holds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from rlhf.base import json_files
from rlhf.base.errors import UserError
from rlhf.base.json_files import (
    EXCERPT,
    MAX_DEPTH,
    MAX_DIGITS,
    bounded_lines,
    decode,
    finite_number,
    read_jsonl,
    read_object,
    read_object_or_none,
    read_value,
)


def nested(depth: int, brackets: str = "[]") -> str:
    return brackets[0] * depth + brackets[1] * depth


@pytest.mark.parametrize("innermost", ["", "1", '"["', "{}"])
def test_depth(innermost: str) -> None:
    """A file of brackets ends in RecursionError: here, or later where the value is redacted, compared or written again."""
    outside = MAX_DEPTH - (innermost == "{}")
    inside = nested(outside).replace("[]", f"[{innermost}]")
    assert decode(inside)
    for depth in (outside + 1, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            decode(nested(depth).replace("[]", f"[{innermost}]"))


def test_many_brackets_are_no_depth() -> None:
    """The count of brackets is only a first look: a long flat list has more of them than levels."""
    assert len(decode("[" + ",".join(["{}"] * 3 * MAX_DEPTH) + "]")) == 3 * MAX_DEPTH
    assert decode('"' + "[" * 3 * MAX_DEPTH + '"') == "[" * 3 * MAX_DEPTH


def test_digits() -> None:
    """A number too long for a float ends in OverflowError where it is drawn; Python itself refuses at 4300 digits only."""
    assert finite_number(decode("9" * MAX_DIGITS)) == float("9" * MAX_DIGITS)
    with pytest.raises(ValueError, match=f"{MAX_DIGITS + 1} digits"):
        decode("9" * (MAX_DIGITS + 1))
    assert decode('"' + "9" * (MAX_DIGITS + 1) + '"'), "digits in a text are no number"


def test_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of gigabytes named metrics.json fills the memory before anything is said of it."""
    monkeypatch.setattr(json_files, "MAX_BYTES", 20)
    file = tmp_path / "a.json"
    file.write_text('{"a": "' + "x" * 11 + '"}')
    assert read_object(file) == {"a": "x" * 11}
    file.write_text('{"a": "' + "x" * 12 + '"}')
    with pytest.raises(UserError, match="longer than"):
        read_object(file)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not readable as JSON"),
        (b'{"a": ', "not readable as JSON"),
        (b"\xff{}", "not readable as JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
        (nested(100_000).encode(), "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    ],
)
def test_one_error(tmp_path: Path, content: bytes, reason: str) -> None:
    """UnicodeDecodeError, JSONDecodeError, RecursionError, AttributeError: each was a traceback in some command."""
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_object(file, fix="run it again")
    assert str(file) in str(error.value) and str(error.value).endswith("; run it again")
    assert read_object_or_none(file) is None


def test_missing_file(tmp_path: Path) -> None:
    """A missing file has to be told from a damaged one."""
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        read_value(tmp_path / "none")
    assert read_object_or_none(tmp_path / "none") is None


def test_nan() -> None:
    """A checkpoint's NaN is a number that comes back; a page has no such figure."""
    value: Any = decode("[NaN, Infinity]")
    assert value[0] != value[0] and value[1] == float("inf")
    assert decode("[NaN, Infinity]", nan_as_none=True) == [None, None]


def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bad line counts once, and none of them ends the reading."""
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 3000)
    file = tmp_path / "a.jsonl"
    bad = ['{"a"', "[1]", nested(2000, "[]"), "9" * 200, '"' + "x" * 5000 + '"', '{"a": ' + "9" * 200 + "}"]
    file.write_bytes(("\n".join(['{"a": NaN}', *bad, "", '{"a": 2}']) + '\n{"b": "').encode() + b'\xff"}\n{"c"')
    assert read_jsonl(file) == ([{"a": None}, {"a": 2}, {"b": "\ufffd"}], len(bad) + 1)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_bounded_lines(end: bytes) -> None:
    """A line that is cut must not swallow the next one, or give its rest as a line of its own."""
    limit = 3000
    for length in (limit - 1, limit + 1, limit + 2, (1 << 20) + limit + 1, 5 << 20):
        lines = list(bounded_lines(io.BytesIO(b"x" * length + end + (b"next" if end else b"")), limit))
        kept = b"x" * length + end if length <= limit else b"x" * EXCERPT
        assert lines == [(kept, length), *([(b"next", 4)] if end else [])]
