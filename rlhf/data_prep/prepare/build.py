"""The way from sources to a data folder: read, clean, merge raters, deduplicate, split, gate, write, card.

Rows stream from the sources into an Arrow file beside the result; what is decided about them is decided on arrays of
hashes; then the chosen rows stream into Parquet. Nothing is published before all of it is written.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.files import hash_files, read_source
from rlhf.data_prep.formats.readers import SourceReader
from rlhf.data_prep.formats.records import COMPARISON, Record
from rlhf.data_prep.formats.rows import Malformed, Untrainable
from rlhf.data_prep.hashes import unit
from rlhf.data_prep.prepare.card import SourceReport, make_card, render
from rlhf.data_prep.prepare.clean import Dropped, clean
from rlhf.data_prep.prepare.dedup import first_of_equal
from rlhf.data_prep.prepare.folder import make_once
from rlhf.data_prep.prepare.funnel import Funnel, lines
from rlhf.data_prep.prepare.leaks import gate
from rlhf.data_prep.prepare.lengths import Lengths
from rlhf.data_prep.prepare.mix import mix
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import KINDS, DataConfig
from rlhf.data_prep.prepare.splits import (
    assign_splits,
    assign_stages,
    check_sizes,
    deduplicate,
    drop_repeated_prompts,
    group_prompts,
    limit_prompts,
)
from rlhf.data_prep.prepare.staged import Staged, stage
from rlhf.data_prep.prepare.tally import Tally
from rlhf.data_prep.prepare.write import write_sets
from rlhf.data_prep.ratings import by_split, clear_pairs, merge, resolve
from rlhf.data_prep.stage_rows import BAD_LABEL, check_unicode
from rlhf.models.tokenization import TemplateRefusal
from rlhf.run.progress import Progress

#: Fewest rows of a source that are refused for their share of malformed ones; of fewer, one slip would be too many.
FEWEST_ROWS = 20


def prepare_sources(config: DataConfig) -> Path:
    """Make the data folder of a recipe and return it; see `rlhf.data_prep.prepare`.

    Layout: `KIND/SPLIT.parquet`, `card.json`, `card.md`, and `rejected.jsonl` with every row that was left out.

    Raises:
        UserError: the folder holds something else, a source cannot be read, or the leak gate refuses.
    """
    folder = Path(config.output_dir)
    files = [hash_files(source) for source in config.sources]
    recipe = config.recipe(files)

    def fill(partial: Path) -> dict[str, Any]:
        reports = [SourceReport(source, hashes) for source, hashes in zip(config.sources, files, strict=True)]
        scratch = partial / ".work"
        scratch.mkdir()
        rejected = folder.with_name(f"{folder.name}.rejected.jsonl")
        try:
            card = _build(config, recipe, reports, partial, scratch, folder.with_name(f"{folder.name}.leaks.jsonl"))
        except UserError as error:
            file = partial / "rejected.jsonl"
            if not (file.is_file() and file.stat().st_size):
                raise
            file.replace(rejected)
            raise UserError(f"{error}; the rows left out are in {rejected}") from error
        rejected.unlink(missing_ok=True)  # of an earlier try
        shutil.rmtree(scratch)
        return card

    make_once(folder, recipe, fill)
    return folder


def _build(
    config: DataConfig,
    recipe: dict[str, Any],
    reports: list[SourceReport],
    folder: Path,
    scratch: Path,
    leak_report: Path,
) -> dict[str, Any]:
    """Write the sets and `card.md`, and return the card."""
    lengths = Lengths(config) if config.tokenizer else None
    with Tally(folder / "rejected.jsonl") as tally:
        staged = _staged(_read_all(config, reports, lengths, tally), config, scratch / "read.arrow")
        records = len(staged)
        plan = Plan(staged, tally)
        _drop_repeated_ids(plan)
        if (staged.raters > 0).any():
            plan = Plan(_staged(_merged(plan, config), config, scratch / "merged.arrow"), tally)
        funnel = Funnel(plan)
        deduplicate(plan, config, scratch)
        funnel.note("duplicates")
        limit_prompts(plan, config)
        funnel.note("limits")
        prompts = group_prompts(plan, config, scratch)
        assign_splits(plan, prompts, config)
        funnel.note("splits")
        assign_stages(plan, prompts, config)
        funnel.note("stages")
        drop_repeated_prompts(plan)
        funnel.note("repeated")
        mixed = mix(plan, config)
        funnel.note("mix")
        leaks = gate(plan, prompts, config, leak_report)
        funnel.note("leaks")
        check_sizes(plan)
        funnel.note("labels")
        written = write_sets(plan, config, folder, lengths)
        counts: dict[str, Any] = {"records": records, "uses": funnel.as_dict(), "mixed": mixed, "leaks": leaks}
        card = make_card(config, recipe, reports, tally, plan, prompts, written, **counts)
    (folder / "card.md").write_text(render(card), encoding="utf-8")
    leak_report.unlink(missing_ok=True)  # of an earlier try
    for line in (*_read_lines(card), *lines(card["uses"])):
        print(f"data: {line}", file=sys.stderr)
    return card


def _read_lines(card: dict[str, Any]) -> Iterator[str]:
    """Yield a line on the rows that reading and cleaning left out, if there are any."""
    reasons = [(drop["count"], reason) for step in ("read", "clean") for reason, drop in _drops(card, step).items()]
    if reasons:
        count, reason = max(reasons)
        yield (
            f"{sum(n for n, _ in reasons):,} of {card['rows_read']:,} rows are left out in reading and cleaning, most often "
            f"({count:,}): {reason}; all are in rejected.jsonl"
        )


def _drops(card: dict[str, Any], step: str) -> dict[str, Any]:
    return dict(card["steps"].get(step, {}).get("dropped", {}))


def _staged(records: Iterator[tuple[Record, int]], config: DataConfig, file: Path) -> Staged:
    return stage(
        records, lambda record, number: _serves(record, config, number), file, prefix_length=config.min_shared_prefix
    )


# Reading


def _read_all(
    config: DataConfig, reports: list[SourceReport], lengths: Lengths | None, tally: Tally
) -> Iterator[tuple[Record, int]]:
    """Yield (record, number of its source) of every row that passes."""
    for number, report in enumerate(reports):
        with Progress(None, f"reading {report.source.name}", "row") as bar:
            for record in _read_one(config, report, tally):
                cleaned = _cleaned(record, config, lengths, tally)
                if cleaned is not None:
                    report.records += 1
                    yield cleaned, number
                bar.update()
        share = report.malformed / max(report.rows, 1)
        if report.rows >= FEWEST_ROWS and share > config.max_rejected_share:
            reasons = tally.drops["read"].counts.most_common(1)
            raise UserError(
                f"source {report.source.name}: {report.malformed:,} of {report.rows:,} rows are malformed, more than "
                f"max_rejected_share {config.max_rejected_share:g} allows; most often: {reasons[0][0]}. Is the reader "
                f"right ({report.reader}: {report.evidence})?"
            )


def _read_one(config: DataConfig, report: SourceReport, tally: Tally) -> Iterator[Record]:
    """Yield the records of one source; rows that cannot be used are counted and written to the tally."""
    source = report.source
    reader = SourceReader(source, read_source(source, int(config.max_row_megabytes * 1e6)))
    report.reader, report.evidence = reader.name, reader.evidence
    print(f"data: {source.name} is read as {report.reader}: {report.evidence}", file=sys.stderr)
    report.unused = reader.unused
    for reading in reader:
        report.rows += len(reading.lines)
        first = reading.lines[0]
        for record in reading.records:
            yield replace(record, source=str(source.name), file=Path(first.file).name, row=first.number)
        if reading.error is not None:
            report.malformed += len(reading.lines) * isinstance(reading.error, Malformed)
            for line in reading.lines:
                reason, file = str(reading.error), Path(line.file).name
                tally.rejected("read", reason, file, line.number, line.value or line.raw)
    if reader.unused:
        print(f"data: {source.name}: not used: {reader.unused_columns()}", file=sys.stderr)


def _cleaned(record: Record, config: DataConfig, lengths: Lengths | None, tally: Tally) -> Record | None:
    """Return the record after cleaning and length limits, or None: it is dropped and counted."""
    try:
        cleaned = clean(record, config, tally)
        check_unicode(cleaned.prompt, cleaned.responses, cleaned.parts, cleaned.id, cleaned.user, cleaned.document)
        return lengths.limit(cleaned, tally) if lengths else cleaned
    except (Dropped, Malformed, Untrainable, TemplateRefusal) as error:
        tally.dropped("clean", str(error), record)
        return None


def _serves(record: Record, config: DataConfig, source: int) -> int:
    """Return the bits of the kinds that the record, the uses of its source and the rule of preferences allow."""
    bits = record.serves & sum(1 << KINDS.index(use) for use in set(config.sources[source].uses))
    if bits & COMPARISON and not clear_pairs(record, config.preference_rule, config.min_difference):
        bits &= ~COMPARISON
    if record.split is not None:
        bits &= COMPARISON  # a rater's split is no split of prompts
    return bits


# Raters


def _drop_repeated_ids(plan: Plan) -> None:
    """Drop a second row with the id of an earlier one of its source: one of the two is wrong."""
    rows = plan.rows[plan.hashes("id") != 0]
    firsts = first_of_equal(plan.staged.hashes["id"][rows])
    later = firsts != np.arange(len(rows))
    twins = dict(zip(rows[later].tolist(), rows[firsts[later]].tolist(), strict=True))
    plan.drop(
        rows[later], "read", "id of an earlier row", lambda row: f"first in {plan.staged.record(twins[row]).place}"
    )


def _merged(plan: Plan, config: DataConfig) -> Iterator[tuple[Record, int]]:
    """Yield records with raters merged by what they rate, within their source, and the others as they are."""
    staged, groups = plan.staged, _rated_groups(plan)
    for row, record in zip(plan.rows.tolist(), staged.records(plan.rows), strict=True):
        number = int(staged.source[row])
        if row not in groups:
            if staged.raters[row] == 0:
                yield record, number
            continue
        members = groups[row]
        whole = merge([record, *(staged.record(member) for member in members[1:])]) if len(members) > 1 else record
        if len(members) > 1:
            plan.tally.changed("merge raters", f"{record.place}: {len(whole.raters)} raters of {len(members)} rows")
        for part in _labelled(whole, plan.tally) if whole.labelled else _divided(whole, config):
            yield part, number


def _labelled(record: Record, tally: Tally) -> Iterator[Record]:
    """Yield the answers of one prompt that people called good or bad: as a comparison, and each good one by itself.

    Bad answers without a good one are counted; their prompt stays.
    """
    ratings = record.ratings or []
    named = replace(record, raters=[], rater_ratings=[]) if record.raters == ["label"] else record
    good = [place for place, rating in enumerate(ratings) if rating > 0.5]
    if len(set(ratings)) > 1 or good:
        yield named
    for place in good[1:]:  # the first is the best of the record
        parts = [record.parts[place]] if record.parts else []
        alone = replace(
            named, responses=[record.responses[place]], parts=parts, ratings=[1.0], raters=[], rater_ratings=[]
        )
        yield alone
    if not good:
        tally.dropped("labels", BAD_LABEL, record, "its prompt stays")
        yield replace(named, responses=[], parts=[], ratings=None, raters=[], rater_ratings=[], labelled=False)


def _rated_groups(plan: Plan) -> dict[int, list[int]]:
    """Return the rows that rate the same thing in one source by their first row, for rows with raters."""
    rows = plan.rows[plan.staged.raters[plan.alive] > 0]
    items = plan.staged.hashes["item"][rows]
    order = np.lexsort((rows, plan.staged.source[rows], items))
    same = (np.diff(items[order]) == 0) & (np.diff(plan.staged.source[rows][order]) == 0)
    parts = np.split(rows[order], np.flatnonzero(~same) + 1)
    return {int(part[0]): part.tolist() for part in parts if len(part)}


def _divided(record: Record, config: DataConfig) -> Iterator[Record]:
    """Yield the record with its preference; where raters make the splits, one for each split, and one of the prompt."""

    def split_of(rater: str) -> str:
        position = unit(config.seed, "rater split", rater)
        held_out = config.test_share + config.validation_share
        return "test" if position < config.test_share else "validation" if position < held_out else "train"

    parts = by_split(record, split_of) if config.split_by == "rater" else [record]
    resolved = [resolve(part, config.preference_rule, config.held_out_raters, config.seed) for part in parts]
    yield from (part for part in resolved if part.ratings is not None)
    if config.split_by == "rater" or all(part.ratings is None for part in resolved):
        yield replace(
            record,
            responses=[],
            parts=[],
            ratings=None,
            raters=[],
            rater_ratings=[],
            ratings_held_out=None,
            confidence=None,
        )
