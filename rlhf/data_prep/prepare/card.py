"""The data card: sources, sets, every drop with its reason and examples, lengths, splits and hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.data_prep.prepare.dedup import band_rows
from rlhf.data_prep.prepare.funnel import lines
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import DataConfig, Source
from rlhf.data_prep.prepare.splits import Prompts
from rlhf.data_prep.prepare.tally import Tally
from rlhf.data_prep.prepare.write import Written

#: Libraries whose version can change a row.
LIBRARIES = (
    "datasets", "ftfy", "ijson", "opencc", "phonenumberslite", "pyarrow", "py3langid", "rensa", "tokenizers", "transformers",
)  # fmt: skip


@dataclass
class SourceReport:
    """Counts of the rows of one source."""

    source: Source
    files: dict[str, str]
    """sha256 by name; no path, so that the card is the same on every machine."""
    reader: str = ""
    evidence: str = ""
    rows: int = 0
    malformed: int = 0
    records: int = 0
    unused: Mapping[str, int] = field(default_factory=dict)
    """Rows by column that holds something and is not used."""


def versions() -> dict[str, str]:
    """Return the version of each of `LIBRARIES`, and of Unicode."""
    return {**{name: importlib.metadata.version(name) for name in LIBRARIES}, "unicode": unicodedata.unidata_version}


def fingerprint(recipe: Mapping[str, Any], libraries: Mapping[str, str], rows: Mapping[str, str]) -> str:
    """Return the sha256 of the recipe, the libraries' versions and the sha256 of the rows of each set."""
    content = {"recipe": recipe, "libraries": libraries, "rows": rows}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_card(
    config: DataConfig,
    recipe: dict[str, Any],
    reports: Sequence[SourceReport],
    tally: Tally,
    plan: Plan,
    prompts: Prompts,
    written: Mapping[str, Written],
    *,
    records: int,
    uses: dict[str, Any],
    mixed: dict[str, Any],
    leaks: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of `card.json`, less the sha256 of the files.

    Args:
        records: records that passed reading and cleaning.
        uses: `Funnel.as_dict`.
    """
    libraries = versions()
    row_hashes = {name: of.digest.hexdigest() for name, of in written.items()}
    group = prompts.group[plan.rows]
    _, sizes = np.unique(group, return_counts=True)
    bands, band = band_rows(config.similarity)
    return {
        "sources": [_source(report) for report in reports],
        "rows_read": sum(report.rows for report in reports),
        "records": records,
        "records_used": len(plan.rows),
        "uses": uses,
        "rows": {name: of.rows for name, of in written.items()},
        "rows_by_source": {name: dict(sorted(of.sources.items())) for name, of in written.items()},
        "steps": tally.as_dict(),
        "lengths": {
            name: {what: _spread(values) for what, values in of.lengths.items()} for name, of in written.items()
        },
        "comparisons_by_number_of_responses": {
            name: {str(k): n for k, n in sorted(of.responses.items())} for name, of in written.items() if of.responses
        },
        "splits": {
            "by": config.split_by,
            "groups_of_prompts": len(sizes),
            "largest_group": int(sizes.max()),
            "similarity": config.similarity,
            "probability_to_find_a_pair_of_this_similarity": round(1 - (1 - config.similarity**band) ** bands, 4),
        },
        "stages": config.stages,
        "mix": mixed,
        "leaks": leaks,
        "recipe": recipe,
        "libraries": libraries,
        "row_hashes": row_hashes,
        "fingerprint": fingerprint(recipe, libraries, row_hashes),
    }


def _source(report: SourceReport) -> dict[str, Any]:
    source = report.source
    place = {k: getattr(source, k) for k in ("subset", "revision", "split") if getattr(source, k)}
    return {
        "name": source.name,
        **({} if report.files else {"hub": source.path}),
        **place,
        "licence": source.licence,
        "reader": report.reader,
        "evidence": report.evidence,
        "uses": source.uses,
        "rows": report.rows,
        "malformed": report.malformed,
        "records": report.records,
        "unused_columns": dict(sorted(report.unused.items())),
        "files": report.files,
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    numbers = np.asarray(values)
    middle, high = np.percentile(numbers, (50, 95))
    return {
        "min": int(numbers.min()),
        "median": float(middle),
        "mean": round(float(numbers.mean()), 2),
        "p95": float(high),
        "max": int(numbers.max()),
    }


def render(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    splits, leaks, mix = card["splits"], card["leaks"], card["mix"]
    overlaps = [
        f"- {pair}: {o['exact']:,} equal prompts, {o['near']:,} near-duplicates "
        f"({'no leak' if o['allowed'] else 'LEAK, let pass'})"
        for pair, o in leaks["overlaps"].items()
    ]
    mixed = [[kind, *(f"{n:,}" for n in counts.values())] for kind, counts in mix.items()]
    mixed_sources = list(next(iter(mix.values()), {}))
    content = [
        "# Data card",
        "",
        f"Fingerprint {card['fingerprint']}.",
        "",
        "## Sources",
        "",
        *table(["source", "licence", "read as", "rows", "malformed", "records", "sha256"], _source_rows(card)),
        "",
        *_unused_lines(card),
        f"{card['rows_read']:,} rows read, {card['records']:,} records made, {card['records_used']:,} used.",
        "",
        *(re.sub(r"^( *)", r"\1- ", line) for line in lines(card["uses"])),
        "",
        "## Sets",
        "",
        *table(["set", "rows", "prompt, median and longest", "response, median and longest"], _set_rows(card)),
        "",
        "## Changed and left out",
        "",
        *table(["step", "what", "rows", "examples"], _step_rows(card)),
        "",
        "Every row that was left out is in rejected.jsonl.",
        "",
        "## Splits and leaks",
        "",
        f"Split by {splits['by']}; {splits['groups_of_prompts']:,} groups of prompts, the largest of "
        f"{splits['largest_group']:,} rows; near-duplicates from a Jaccard similarity of {splits['similarity']:g} on (a pair "
        f"just there is found with probability {splits['probability_to_find_a_pair_of_this_similarity']}). "
        f"Stages: {card['stages']}.",
        f"The leak gate checked {leaks['pairs_checked']} borders between splits and stages.",
        *(overlaps or ["No prompt, and no near-duplicate of one, is in two sets."]),
        *(["", "## Mix", "", *table(["training rows of", *mixed_sources], mixed)] if mix else []),
        "",
        "## Files",
        "",
        *table(["file", "sha256 of its rows"], [(f"{name}.parquet", h) for name, h in card["row_hashes"].items()]),
        "",
        "Libraries: " + ", ".join(f"{name} {version}" for name, version in card["libraries"].items()) + ".",
    ]
    return "\n".join(content) + "\n"


def _source_rows(card: Mapping[str, Any]) -> Iterator[list[str]]:
    for source in card["sources"]:
        hashes = ", ".join(digest[:16] for digest in source["files"].values()) or f"hub {source.get('hub')}"
        counts = [f"{source[name]:,}" for name in ("rows", "malformed", "records")]
        yield [source["name"], source["licence"], f"{source['reader']} ({source['evidence']})", *counts, hashes]


def _unused_lines(card: Mapping[str, Any]) -> Iterator[str]:
    for source in card["sources"]:
        if source["unused_columns"]:
            counts = ", ".join(f"{name} ({count:,} rows)" for name, count in source["unused_columns"].items())
            yield from (f"Columns of {source['name']} that are not used: {counts}.", "")


def _set_rows(card: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, count in card["rows"].items():
        lengths = [
            "; ".join(
                f"{spread['median']:g}, {spread['max']:,} {unit}"
                for unit in ("characters", "tokens")
                if (spread := card["lengths"][name].get(f"{text}_{unit}"))
            )
            for text in ("prompt", "response")
        ]
        yield [name, f"{count:,}", *lengths]


def _step_rows(card: Mapping[str, Any]) -> Iterator[list[str]]:
    for step, entry in card["steps"].items():
        if entry["changed"]:
            yield [step, "changed", f"{entry['changed']:,}", "; ".join(entry["examples"])]
        for reason, drop in entry["dropped"].items():
            yield [step, f"left out: {reason}", f"{drop['count']:,}", "; ".join(drop["examples"])]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines]
