"""Prepared rows as Parquet, in TRL's conversational formats, in the order of a hash: the first rows are a fair sample."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from rlhf.data_prep.formats.records import Record, ranks_of
from rlhf.data_prep.hashes import units
from rlhf.data_prep.prepare.lengths import Lengths
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import DataConfig
from rlhf.data_prep.ratings import clear_pairs, halves
from rlhf.models.messages import PARTS

_BATCH = 1000
_TEXT, NUMBER = Value("string"), Value("float64")
MESSAGES = List({"role": _TEXT, "content": _TEXT})
MESSAGES_WITH_PARTS = List({"role": _TEXT, "content": _TEXT, PARTS: _TEXT})
_ABOUT = {"source": _TEXT, "id": _TEXT}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "demonstrations": {"messages": MESSAGES, **_ABOUT},
    "rankings": {
        "prompt": MESSAGES,
        "responses": List(MESSAGES),
        "ratings": List(NUMBER),
        "ranks": List(Value("int64")),
        "raters": List(_TEXT),
        "rater_ratings": List(List(NUMBER)),
        "confidence": NUMBER,
        **_ABOUT,
    },
    "pairs": {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "margin": NUMBER,
        "raters": List(_TEXT),
        "confidence": NUMBER,
        **_ABOUT,
    },
    "prompts": {"prompt": MESSAGES, **_ABOUT},
}
#: Columns of rankings some of whose raters are held out.
_HELD_OUT = {
    "ratings_held_out": List(NUMBER),
    "raters_held_out": List(_TEXT),
    "rater_ratings_held_out": List(List(NUMBER)),
}


@dataclass
class Written:
    """Counts, lengths and sha256 of the rows of one file."""

    rows: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    """sha256 of the rows, as JSON; the bytes of a Parquet file also depend on the library that wrote it."""
    sources: Counter[str] = field(default_factory=Counter)
    responses: Counter[int] = field(default_factory=Counter)
    """Rankings by their number of responses."""
    lengths: dict[str, array[int]] = field(default_factory=dict)
    """Characters, and tokens where there is a tokenizer, by name: `prompt_characters`, ..."""

    def measure(self, name: str, value: int) -> None:
        """Add a length."""
        self.lengths.setdefault(name, array("i")).append(value)


def write_sets(plan: Plan, config: DataConfig, folder: Path, lengths: Lengths | None) -> dict[str, Written]:
    """Write `KIND/SPLIT.parquet` for every kind that has rows, and return the counts of each file, by set."""
    sets = plan.sets()
    kinds = {name.split("/")[0] for name, rows in sets.items() if len(rows)}
    written = {}
    for name, rows in sets.items():
        kind, split = name.split("/")
        if kind in kinds and (len(rows) or split != "test"):
            order = np.argsort(units(plan.staged.hashes["content"][rows], config.seed, "order"), kind="stable")
            schema = _schema(kind, config, plan.staged.has_parts)
            written[name] = _write(
                folder / f"{name}.parquet", plan.staged.records(rows[order]), kind, schema, config, lengths
            )
    return written


def _form(kind: str, config: DataConfig) -> str:
    return config.comparison_form if kind == "comparisons" else kind


def _schema(kind: str, config: DataConfig, has_parts: bool) -> pa.Schema:
    """Return the columns of a kind; messages have a column of parts only where some message has any."""
    form = _form(kind, config)
    columns = dict(_SCHEMAS[form])
    if form == "rankings" and config.held_out_raters > 0:
        columns |= _HELD_OUT
    if has_parts:
        wide = [(MESSAGES, MESSAGES_WITH_PARTS), (List(MESSAGES), List(MESSAGES_WITH_PARTS))]
        columns = {name: next((to for of, to in wide if of == column), column) for name, column in columns.items()}
    return Features(columns).arrow_schema


def _write(
    file: Path, records: Iterator[Record], kind: str, schema: pa.Schema, config: DataConfig, lengths: Lengths | None
) -> Written:
    file.parent.mkdir(exist_ok=True)
    form = _form(kind, config)
    result = Written()
    with pq.ParquetWriter(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        for record in records:
            _note(result, record, kind, lengths)
            for row in _ROWS[form](record, config):
                result.rows += 1
                result.digest.update(json.dumps({k: row[k] for k in schema.names}, sort_keys=True).encode() + b"\n")
                batch.append(row)
            if len(batch) >= _BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return result


def _note(result: Written, record: Record, kind: str, lengths: Lengths | None) -> None:
    result.sources[record.source] += 1
    result.measure("prompt_characters", sum(len(message["content"]) for message in record.prompt))
    if lengths:
        result.measure("prompt_tokens", lengths.prompt_length(record.prompt))
    places = {"demonstrations": [record.best_place], "comparisons": range(len(record.responses))}.get(kind, [])
    if kind == "comparisons":
        result.responses[len(places)] += 1
    for place in places:
        result.measure("response_characters", len(record.responses[place]))
        if lengths:
            result.measure("response_tokens", lengths.response_length(record.prompt, record.answer(place)))


def _about(record: Record) -> dict[str, Any]:
    return {"source": record.source, "id": record.id}


def _demonstration(record: Record, _: DataConfig) -> Iterator[dict[str, Any]]:
    yield {"messages": [*record.prompt, *record.answer(record.best_place)], **_about(record)}


def _ranking(record: Record, config: DataConfig) -> Iterator[dict[str, Any]]:
    assert record.ratings is not None
    means = record.ratings_held_out or [float("nan")] * len(record.ratings)  # NaN: no pair of them is ordered
    trained_on, held_out = halves(record, config.held_out_raters, config.seed)

    def of(columns: list[int], suffix: str = "") -> dict[str, Any]:
        return {
            f"raters{suffix}": [record.raters[a] for a in columns],
            f"rater_ratings{suffix}": [[row[a] for a in columns] for row in record.rater_ratings],
        }

    yield {
        "prompt": record.prompt,
        "responses": [record.answer(place) for place in range(len(record.responses))],
        "ratings": None if record.ranked else record.ratings,
        "ranks": ranks_of(record.ratings),
        **of(trained_on),
        "confidence": record.confidence,
        **({"ratings_held_out": means, **of(held_out, "_held_out")} if config.held_out_raters > 0 else {}),
        **_about(record),
    }


def _pairs(record: Record, config: DataConfig) -> Iterator[dict[str, Any]]:
    ratings = record.ratings or []
    for better, worse in clear_pairs(record, config.preference_rule, config.min_difference):
        yield {
            "prompt": record.prompt,
            "chosen": record.answer(better),
            "rejected": record.answer(worse),
            "margin": ratings[better] - ratings[worse],
            "raters": record.raters,
            "confidence": record.confidence,
            **_about(record),
        }


def _prompt(record: Record, _: DataConfig) -> Iterator[dict[str, Any]]:
    yield {"prompt": record.prompt, **_about(record)}


_ROWS: dict[str, Callable[[Record, DataConfig], Iterator[dict[str, Any]]]] = {
    "demonstrations": _demonstration,
    "rankings": _ranking,
    "pairs": _pairs,
    "prompts": _prompt,
}
