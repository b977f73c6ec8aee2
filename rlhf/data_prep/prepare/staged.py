"""Records between reading and writing: an Arrow file, memory-mapped by `datasets`, and one small array a column.

Hashes and the stages that a record can serve are held in numpy arrays, a few dozen bytes a row; texts stay on disk.
"""

from __future__ import annotations

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
from rlhf.data_prep.hashes import hash64
from rlhf.data_prep.prepare.recipe import SPLITS
from rlhf.models.messages import PARTS

_TEXT, _NUMBER = Value("string"), Value("float64")
_FEATURES = Features(
    {
        "prompt": List({"role": _TEXT, "content": _TEXT, PARTS: _TEXT}),
        "responses": List(_TEXT),
        "parts": List(_TEXT),
        "ratings": List(_NUMBER),
        "ranked": Value("bool"),
        "labelled": Value("bool"),
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
#: Names of the hashes of each record; 0 means that it has none.
HASHES = ("content", "item", "prompt", "opening", "id", "user", "document", "prefix")


@dataclass(frozen=True)
class Staged:
    """Records on disk, with arrays about them in memory; row i of each is the same record."""

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
    """(N,) int32, raters that are named."""
    has_parts: bool = False
    """Some message has parts beyond role and content."""

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        """Return the record of a row."""
        return to_record(self.rows[int(index)])

    def records(self, indices: np.ndarray | None = None, batch_size: int = 1000) -> Iterator[Record]:
        """Yield records in the order of `indices`, all by default; a batch at a time is in memory."""
        order = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(order), batch_size):
            for row in self.rows.select(order[start : start + batch_size].tolist()).to_list():
                yield to_record(row)


def to_record(row: dict[str, Any]) -> Record:
    """Return a staged row as a record."""
    prompt = [{k: v for k, v in message.items() if v is not None} for message in row["prompt"]]
    return Record(**{**{k: v for k, v in row.items() if k not in ("prompt_key", "answer_key")}, "prompt": prompt})


def stage(
    records: Iterable[tuple[Record, int]],
    serves: Callable[[Record, int], int],
    file: Path,
    *,
    prefix_length: int | None,
) -> Staged:
    """Write records to an Arrow file as they come, and return them with their hashes.

    Args:
        records: (record, number of its source).
        serves: (record, number of its source) -> bits of the kinds that it may become.
        prefix_length: characters of the prompt that the hash `prefix` is made of; None for no such hash.
    """
    hashes = {name: array("Q") for name in HASHES}
    bits, source, split, raters = array("B"), array("i"), array("b"), array("i")
    has_parts = False
    with ArrowWriter(features=_FEATURES, path=str(file), writer_batch_size=1000) as writer:
        for record, number in records:
            prompt, answer = prompt_key(record.prompt), comparable("\n".join(record.whole_responses))
            writer.write({**_as_row(record), "prompt_key": prompt, "answer_key": answer})
            for name, value in _hashes(record, prompt, number, prefix_length).items():
                hashes[name].append(value)
            bits.append(serves(record, number))
            source.append(number)
            split.append(SPLITS.index(record.split) if record.split else -1)
            raters.append(len(record.raters))
            has_parts = has_parts or bool(record.parts) or any(PARTS in message for message in record.prompt)
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
        has_parts=has_parts,
    )


def _as_row(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__slots__}  # type: ignore[attr-defined]


def _hashes(record: Record, prompt: str, source: int, prefix_length: int | None) -> dict[str, int]:
    responses = [comparable(response) for response in record.whole_responses]
    ranks = map(str, ranks_of(record.ratings)) if record.ratings is not None else [""] * len(responses)
    raters = [
        f"{rater}={list(ratings)}"
        for rater, ratings in zip(record.raters, zip(*record.rater_ratings, strict=True), strict=True)
    ]
    # Raters judge one item: a prompt with these responses, or a prompt whose responses are rated one by one.
    judged = sorted(responses) if len(responses) > 1 or not record.raters else []

    def in_source(name: str | None) -> int:
        return hash64(str(source), name) if name else 0

    return {
        # Rankings are equal when they order the same responses in the same way, however they are listed.
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
