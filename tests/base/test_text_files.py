"""Text files of users: encodings, line ends, and bytes that are no text."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from rlhf.base.errors import UserError
from rlhf.base.text_files import open_text, read_text, text_lines

TEXT = "é你😀\u2028a\u0085b\x1cc\x0bd\x0ce\r\n\nlast"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_encodings_with_their_mark(tmp_path: Path, encoding: str, packed: bool) -> None:
    """Catches: UTF-32-LE taken for UTF-16-LE, a mark that stays, and a character cut where a block ends."""
    mark = "\ufeff" if encoding.endswith("be") else ""
    long = TEXT + "你😀a" * 5000
    content = (mark + long).encode(encoding)
    file = tmp_path / ("a.txt.gz" if packed else "a.txt")
    file.write_bytes(gzip.compress(content) if packed else content)
    assert read_text(file) == long
    assert list(text_lines(file)) == [TEXT[: TEXT.index("\r")], "", "last" + "你😀a" * 5000]


@pytest.mark.parametrize(
    "text", ['{"prompt": "a"}\n', "hi", "Ein längerer Satz 😀.\n" * 500, '{"prompt": "你好，世界"}\n' * 99]
)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_without_a_mark_are_named(tmp_path: Path, encoding: str, text: str) -> None:
    """Catches: each row called bad JSON, or a text with a space between its letters."""
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(UserError, match=f"a.txt is {name}, and no mark .*: iconv -f {name} -t UTF-8 a.txt > NEW"):
        read_text(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nab\0cd" * 3, "line 2, byte 3 is a zero byte"),
        (bytes(100), "line 1, byte 1 is a zero byte"),
        (
            "fine\ncafé".encode("latin-1"),
            r"is not UTF-8: line 2, byte 4 \(0xe9, 'é' in Latin-1\); convert it, e.g. iconv",
        ),
        ("fine\nhalf \ud83d".encode("utf-8", "surrogatepass"), "is not UTF-8: line 2, byte 6"),
        ("\ufefffine\nhalf \ud83d\n".encode("utf-16-le", "surrogatepass"), "is not UTF-8: line 2, byte 6"),
        ("\ufefffine".encode("utf-16-le")[:-1], "begins with the mark of UTF-16, but is not: truncated data"),
        ("\ufefffine".encode("utf-32-le")[:-1], "begins with the mark of UTF-32, but is not: truncated data"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    """Catches: a traceback, a place that is not named, and half of a pair that is read."""
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(file)


def test_an_empty_file_and_a_mark_alone(tmp_path: Path) -> None:
    for content in (b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfe\0\0"):
        (tmp_path / "a.txt").write_bytes(content)
        with open_text(tmp_path / "a.txt") as stream:
            assert stream.read() == b""
