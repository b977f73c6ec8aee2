"""Records between reading and writing: an Arrow file on disk, memory-mapped by `datasets`, and one small array a column.

What decides where a record goes (its hashes, which stages it can serve) is held in numpy arrays of a few dozen bytes a row;
texts stay on disk and are looked up.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from rlhf.data_prep.formats.records import Record, ranks_of
from rlhf.data_prep.formats.rows import comparable, prompt_key
from rlhf.data_prep.prepare.recipe import SPLITS

_TEXT, _NUMBER = Value("string"), Value("float64")
_FEATURES = Features(
    {
        "prompt": List({"role": _TEXT, "content": _TEXT}),
        "responses": List(_TEXT),
        "ratings": List(_NUMBER),
        "ranked": Value("bool"),
        "raters": List(_TEXT),
        "rater_ratings": List(List(_NUMBER)),
        "ratings_held_out": List(_NUMBER),
        "confidence": _NUMBER,
        "id": _TEXT,
        "user": _TEXT,
        "document": _TEXT,
        "source": _TEXT,
        "file": _TEXT,
        "row": Value("int64"),
        "split": _TEXT,
        # for comparing only: see `comparable`
        "prompt_key": _TEXT,
        "answer_key": _TEXT,
    }
)
#: Hashes of each record; 0 means that it has none of these.
HASHES = ("content", "item", "prompt", "opening", "id", "user", "document", "prefix")


def hash64(*parts: str) -> int:
    """64 bits that are the same on every machine, never 0. Two of a million texts collide once in 37 million data sets."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


@dataclass(frozen=True)
class Staged:
    """Records on disk and what is known of them in memory; row i of each is the same record."""

    rows: Dataset
    """Memory-mapped, `_FEATURES`."""
    hashes: dict[str, np.ndarray]
    """(N,) uint64 by name in `HASHES`."""
    serves: np.ndarray
    """(N,) uint8, bits of `Record.serves` that its source allows."""
    source: np.ndarray
    """(N,) int32, number of the source in the recipe."""
    split: np.ndarray
    """(N,) int8: number of the split where a rater has set it, else -1."""
    raters: np.ndarray
    """(N,) int32, number of raters that are named."""

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        """The record of a row."""
        return to_record(self.rows[int(index)])

    def records(self, indices: np.ndarray | None = None, batch_size: int = 1000) -> Iterator[Record]:
        """Records in the order of `indices`, all by default; a batch at a time is in memory."""
        order = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(order), batch_size):
            for row in self.rows.select(order[start : start + batch_size].tolist()).to_list():
                yield to_record(row)


def to_record(row: dict[str, Any]) -> Record:
    """A staged row as the record it was."""
    return Record(**{k: v for k, v in row.items() if k not in ("prompt_key", "answer_key")})


def stage(
    records: Iterable[tuple[Record, int]],
    serves: Callable[[Record, int], int],
    file: Path,
    *,
    prefix_length: int | None,
) -> Staged:
    """Writes records to an Arrow file as they come, and returns them with their hashes.

    Args:
        records: (record, number of its source).
        serves: (record, number of its source) -> bits of the kinds that it may become.
        prefix_length: characters of the prompt that the hash `prefix` is made of; None: there is no such hash.
    """
    hashes = {name: array("Q") for name in HASHES}
    bits, source, split, raters = array("B"), array("i"), array("b"), array("i")
    with ArrowWriter(features=_FEATURES, path=str(file), writer_batch_size=1000) as writer:
        for record, number in records:
            prompt, answer = prompt_key(record.prompt), comparable("\n".join(record.responses))
            writer.write({**_as_row(record), "prompt_key": prompt, "answer_key": answer})
            for name, value in _hashes(record, prompt, number, prefix_length).items():
                hashes[name].append(value)
            bits.append(serves(record, number))
            source.append(number)
            split.append(SPLITS.index(record.split) if record.split else -1)
            raters.append(len(record.raters))
        writer.finalize()
    if len(source):
        rows = Dataset.from_file(str(file))
    else:  # an Arrow stream without a batch cannot be opened
        rows = Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES)
    return Staged(
        rows=rows,
        hashes={name: np.array(values, dtype=np.uint64) for name, values in hashes.items()},
        serves=np.array(bits, dtype=np.uint8),
        source=np.array(source, dtype=np.int32),
        split=np.array(split, dtype=np.int8),
        raters=np.array(raters, dtype=np.int32),
    )


def _as_row(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__slots__}  # type: ignore[attr-defined]


def _hashes(record: Record, prompt: str, source: int, prefix_length: int | None) -> dict[str, int]:
    responses = [comparable(response) for response in record.responses]
    ranks = map(str, ranks_of(record.ratings)) if record.ratings is not None else [""] * len(responses)
    raters = [
        f"{rater}={list(ratings)}"
        for rater, ratings in zip(record.raters, zip(*record.rater_ratings, strict=True), strict=True)
    ]
    # What is the same thing to be judged: a prompt with these responses, or a prompt whose responses are rated one by one.
    judged = sorted(responses) if len(responses) > 1 or not record.raters else []

    def in_source(name: str | None) -> int:
        return hash64(str(source), name) if name else 0

    return {
        # Two rankings are the same when they order the same responses alike, in whatever order they are listed.
        "content": hash64(
            prompt, *(f"{r}\x1e{rank}" for r, rank in sorted(zip(responses, ranks, strict=True))), *raters
        ),
        "item": hash64(prompt, *judged),
        "prompt": hash64(prompt),
        "opening": hash64(comparable(record.opening)),
        "id": in_source(record.id),
        "user": in_source(record.user),
        "document": in_source(record.document),
        "prefix": hash64(prompt[:prefix_length]) if prefix_length and len(prompt) >= prefix_length else 0,
    }


def units(values: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """(N,) float64 in [0, 1): a hash of (seed, purpose, value) for each value, the same on every machine (splitmix64)."""
    with np.errstate(over="ignore"):
        x = values ^ np.uint64(hash64(str(seed), purpose))
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
