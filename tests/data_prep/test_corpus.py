"""Plain text as documents."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.errors import UserError
from rlhf.config import TextConfig
from rlhf.data_prep import corpus
from rlhf.data_prep.corpus import characters, load_text


def train(source: Path, **options: str) -> list[str]:
    return list(load_text(str(source), TextConfig(**options))["train"].rows["text"])


def test_what_a_document_is(tmp_path: Path) -> None:
    """Paragraphs torn apart, lines run together, carriage returns and a byte-order mark in the text."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n \r\n\r\nthree\r\n")
    assert train(file) == ["one\ntwo", "three"]
    assert train(file, documents="line") == ["one", "two", "three"]
    assert train(file, documents="file") == ["one\ntwo\n \n\nthree"]


def test_folder_of_text_and_data(tmp_path: Path) -> None:
    """Files in another order on each machine, hidden files read, rows of data read as lines of text."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("x", " ", "y")))
    (tmp_path / "a.md").write_text("first")
    (tmp_path / ".hidden.txt").write_text("no")
    sets = load_text(str(tmp_path), TextConfig(text_field="body"))
    assert list(sets["train"].rows["text"]) == ["first", "x", "y"] and sets["train"].dropped == {"empty document": 1}


def test_encodings_and_lines_of_text(tmp_path: Path) -> None:
    """Catches: a document cut at another character than a newline, and half a surrogate pair that ends in a traceback."""
    text = "one\u2028two\x0cthree\u0085four\x1cfive\x0bsix"
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes(f"{text}\r\n{text}\n".encode(encoding))
        assert train(tmp_path / "a.txt", documents="line") == [text, text]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "half \\ud83d"}\n')
    loaded = load_text(str(rows), TextConfig())["train"]
    assert list(loaded.rows["text"]) == ["a"] and loaded.dropped == {"half of a surrogate pair": 1}


def test_split_is_of_the_text_alone(tmp_path: Path) -> None:
    """A copy of a held-out document in training, or documents that change sides when others are added."""
    file, more = tmp_path / "a.txt", tmp_path / "more.txt"
    lines = [f"document {i}" for i in range(300)]
    file.write_text("\n".join(lines))
    more.write_text("\n".join(["another", *reversed(lines), *lines]))
    first, second = (
        {
            k: set(v.rows["text"])
            for k, v in load_text(str(f), TextConfig(documents="line"), validation_share=0.2).items()
        }
        for f in (file, more)
    )
    assert first["validation"] == second["validation"] - {"another"} and not second["validation"] & second["train"]
    assert 40 <= len(first["validation"]) <= 80


def test_text_that_ends_early(tmp_path: Path) -> None:
    """A limit that is ignored reads an endless stream for ever."""
    (tmp_path / "a.txt").write_text("\n".join(["12345"] * 9))
    assert len(load_text(str(tmp_path / "a.txt"), TextConfig(documents="line"), max_characters=11)["train"].rows) == 3


def test_fingerprint_tells_texts_apart(tmp_path: Path) -> None:
    """Two documents where there was one are another text."""
    prints = set()
    for content in ("ab\nc", "a\nbc", "ab\nc\n"):
        (tmp_path / "a.txt").write_text(content)
        prints.add(load_text(str(tmp_path / "a.txt"), TextConfig(documents="line"))["train"].fingerprint)
    assert len(prints) == 2


def test_hub_dataset_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a dot taken for a file, a configuration that cannot be named, a page of traceback when the network goes."""
    import datasets

    asked: list[Any] = []

    def rows(fails: bool) -> Iterator[dict[str, str]]:
        yield {"body": "one"}
        yield {"body": "two"}
        if fails:
            raise ConnectionError("the network is gone\nand more")

    def load_dataset(*words: Any, **options: Any) -> Any:
        asked.append((words, options))
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"fails": words[1] == "fails"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name, common = "owner/text-1.0", {"text_field": "body"}
    read = load_text(name, TextConfig(**common, text_subset="raw"))
    assert list(read["train"].rows["text"]) == ["one", "two"]
    assert asked == [((name, "raw"), {"split": "train", "revision": None, "streaming": True})]
    with pytest.raises(UserError, match=r"'owner/text-1.0' here.* after row 2: the network is gone \(.*--text_subset"):
        load_text(name, TextConfig(**common, text_subset="fails"))
    with pytest.raises(UserError, match=r"row 1 of owner/text-1\.0 has no text in 'text'; it has body"):
        load_text(name, TextConfig())
    for file in ("none.txt", "./owner/text-1.0", "a/b/text", "texts.v2"):
        with pytest.raises(UserError, match="no text at"):
            load_text(file, TextConfig())


def test_rated_sentences_of_all_four_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the text, a part left out, lines lost that are not UTF-8, or a pickle that is opened."""
    inner = archive({f"hutto_ICWSM_2014/{part}_GroundTruth.txt": f"1\t2.5\tof {part}\n".encode() + b"2\t1\t\x93q\x94\n" for part in corpus._PARTS})  # noqa: E501  # fmt: skip
    root = f"{corpus.VADER_SDIST.project}-{corpus.VADER_SDIST.version}"
    (tmp_path / "sdist.tar.gz").write_bytes(archive({f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    monkeypatch.setattr(corpus, "fetch", lambda asset: tmp_path / "sdist.tar.gz")
    texts = list(load_text(corpus.RATED_SENTENCES, TextConfig())["train"].rows["text"])
    assert texts[::2] == [f"of {part}" for part in corpus._PARTS] and set(texts[1::2]) == {"“q”"}
    assert characters(texts[:2]) == len(texts[0]) + 1 + 4


def archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b" \n\n", "no document"),
        ("a.txt", b"", "is empty"),
        ("a.bin", b"ok\nab\0", "line 2, byte 3 is a zero byte"),
        ("a.txt", b"ok\n\xff", "line 2, byte 1"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    """Trained on, each of these gives a model of noise."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_text(str(tmp_path / name), TextConfig())
