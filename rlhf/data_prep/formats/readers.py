"""The way from raw rows to records: every reader by name, the choice of one for a source, and reading with it.

A reader is named, or chosen by its evidence in the first rows: published shapes come first, plain columns last.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.data_prep.formats import numbered, published
from rlhf.data_prep.formats.columns import columns_evidence, messages_evidence, read_columns, read_pair
from rlhf.data_prep.formats.files import Line
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import (
    Columns,
    Malformed,
    Row,
    Untrainable,
    is_blank,
    is_message,
    is_transcript,
    show_value,
)
from rlhf.data_prep.prepare.recipe import Source

#: Rows at the beginning of a source by which its reader is chosen; most of them must show the reader's evidence.
ROWS_LOOKED_AT = 20
#: Characters of a prompt that answers do not all repeat by chance.
LONG_PROMPT = 20
#: Rows at the beginning of a source from which a reader learns what its labels mean.
ROWS_LEARNT_FROM = 1000


@dataclass(frozen=True)
class Reader:
    """A shape of rows; docs/data.md names the data sets of each."""

    needs: tuple[str, ...]
    """Columns that every row has."""
    read: Callable[[Row], Iterable[Record]]
    """Raises `Malformed` or `Untrainable` for a row that it cannot use."""
    own_evidence: Callable[[Row], str | None] | None = None
    """Replaces the evidence of the needed columns."""
    gather: str | None = None
    """Column by whose value neighbouring rows are read together; `read` gets `{"rows": [...]}`."""
    learn: Callable[[Sequence[Row]], Callable[[Row], Iterable[Record]]] | None = None
    """Makes `read` from the first rows, where one row alone does not show what its columns mean."""

    def evidence(self, row: Row) -> str | None:
        """Return the reason to take a row for one of this shape, or None."""
        if self.own_evidence is not None:
            return self.own_evidence(row)
        return f"columns {', '.join(self.needs)}" if set(self.needs) <= row.keys() else None


def _transcripts(row: Row) -> str | None:
    if all(is_transcript(row.get(name)) for name in ("chosen", "rejected")):
        return "chosen and rejected are 'Human: ... Assistant: ...' transcripts"
    return None


def _ranked_answers(row: Row) -> str | None:
    answers = row.get("answers")
    ranked = isinstance(answers, list) and answers and all(isinstance(a, dict) and "rank" in a for a in answers)
    return "columns prompt, answers (with ranks)" if ranked and "prompt" in row else None


def _tree(row: Row) -> str | None:
    columns = ("message_tree_id", "tree_state", "prompt")
    return f"columns {', '.join(columns)}" if set(columns) <= row.keys() else None


READERS: dict[str, Reader] = {
    "hh_rlhf": Reader(("chosen", "rejected"), read_pair, _transcripts),
    "tldr_posts": Reader(("subreddit", "title", "post", "summary"), published.tldr_post),
    "tldr_comparisons": Reader(("info", "summaries", "choice"), published.tldr_comparison),
    "webgpt": Reader(("question", "answer_0", "answer_1", "score_0", "score_1"), published.webgpt),
    "arena": Reader(("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"), published.arena),
    "shp": Reader(("history", "human_ref_A", "human_ref_B", "labels"), published.shp),
    "ultrafeedback": Reader(("instruction", "completions"), published.ultrafeedback),
    "ultrafeedback_binarized": Reader(
        ("chosen", "rejected", "score_chosen", "score_rejected"), published.ultrafeedback_binarized
    ),
    "oasst_trees": Reader(("message_tree_id", "prompt"), published.oasst_tree, _tree),
    "oasst_messages": Reader(
        ("message_id", "parent_id", "message_tree_id", "text", "role"),
        published.oasst_messages,
        gather="message_tree_id",
    ),
    "nectar": Reader(("prompt", "answers"), published.nectar, _ranked_answers),
    "helpsteer": Reader(("prompt", "response", "helpfulness"), published.helpsteer),
    "pandalm": Reader(("instruction", "response1", "response2", "annotator1"), published.pandalm),
    "numbered": Reader((), read_columns, numbered.evidence, learn=numbered.learn),
    "alpaca": Reader(("instruction", "output"), published.alpaca),
    "sharegpt": Reader(("conversations",), read_columns),
    "messages": Reader(("messages",), read_columns, messages_evidence),
    "columns": Reader((), read_columns, columns_evidence),
}


#: Columns of documented formats that no stage here can use, and what they are.
_HINTS = {
    "segments": "texts with masks of their own, Axolotl's input_output: give messages, whose last answer is trained",
    "text": "plain text is read by rlhf pretrain",
    "data": "if it holds the turns of a conversation as texts: columns: {conversations: data} in data.yaml",
    "conversation": "if it holds messages: columns: {messages: conversation} in data.yaml",
    "overall_preference": "the first response is better below 0: columns: {prompt: context} in data.yaml reads it",
    "answer": "if the answers are to be imitated: columns: {prompt: question, completion: answer} in data.yaml",
}


class NoReader(UserError):
    """No reader fits the first rows of a source, which have these `columns`."""

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        self.columns = columns
        self.hint = hint = next((f" ({text})" for name, text in _HINTS.items() if name in columns), "")
        super().__init__(
            f"source {source.name}: no reader knows rows with the columns {', '.join(columns) or 'none'}{hint}; name one with "
            f"reader: ({', '.join(READERS)}), or rename columns with columns: {{prompt: THEIRS, completion: THEIRS, ...}}"
        )


@dataclass(frozen=True)
class Reading:
    """Records of one row, or of neighbouring rows that are read together."""

    lines: list[Line]
    reader: Reader
    row: Row
    """The row with our names for columns; empty where it could not be read, and for rows read together."""
    records: list[Record]
    error: Malformed | Untrainable | None = None
    """Reason why there are no records."""


class SourceReader:
    """Reads the rows of one source with the reader that it names, or the one that fits most of its first rows.

    Of a source that names none, rows without the needed columns are read by their plain columns: files mix their forms.

    Raises:
        NoReader: none fits.
        UserError: no reader of that name, or a column that is needed, or mapped, is missing in all of the first rows.
    """

    def __init__(self, source: Source, lines: Iterable[Line]) -> None:
        rest = iter(lines)
        first = list(itertools.islice(rest, ROWS_LOOKED_AT))
        self.source = source
        values = _mapped_rows(first, source)
        if source.reader == "auto" and first and not any(isinstance(value, dict) for value in values):
            line = first[0]
            reason = line.problem or f"must be an object with named columns, got {show_value(line.value)}"
            raise UserError(f"source {source.name}: no row can be read; {line.file}, row {line.number}: {reason}")
        self.name, self.evidence = choose_reader(source, values)
        self.unused: Counter[str] = Counter()
        """Rows by column that holds something and was not read, as far as the reading went."""
        reader = READERS[self.name]
        if reader.learn:
            first += itertools.islice(rest, ROWS_LEARNT_FROM - len(first))
            rows = [row for row in _mapped_rows(first, source) if isinstance(row, dict)]
            try:
                reader = replace(reader, read=reader.learn(rows))
            except UserError as error:
                raise UserError(f"source {source.name}: {error}") from error
        self._reader = reader
        self._lines = itertools.chain(first, rest)

    def __iter__(self) -> Iterator[Reading]:
        for lines in _gathered(self._lines, self._reader.gather):
            yield self._read(lines)

    def unused_columns(self) -> str:
        """Return the names of columns that hold something and were not read, with the rows that have them."""
        return ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(self.unused.items()))

    def _read(self, lines: list[Line]) -> Reading:
        reader, rows = self._reader, list[Columns]()
        try:
            if lines[0].problem:
                raise Malformed(lines[0].problem)
            values = [mapped(line.value, self.source.column_map) for line in lines]
            rows = [Columns(value) for value in values if isinstance(value, dict)]
            if not reader.gather:
                reader = self._reader_of(values[0])
            whole = {"rows": rows or values} if reader.gather else rows[0] if rows else values[0]
            records = read_row(reader, whole)
            self.unused.update(name for row in rows for name in row.unused())
            return Reading(lines, reader, Row() if reader.gather else rows[0], records)
        except (Malformed, Untrainable) as error:
            return Reading(lines, reader, rows[0] if rows and not reader.gather else Row(), [], error)
        except numbered.Contradiction as error:
            raise UserError(f"{lines[0].file}, row {lines[0].number}: {error}, unlike the rows before it") from error

    def _reader_of(self, row: Any) -> Reader:
        reader = self._reader
        if self.source.reader != "auto" or not isinstance(row, dict) or columns_evidence(row) is None:
            return reader
        fits = all(row.get(name) is not None for name in reader.needs) and not (
            reader.learn and not reader.evidence(row)
        )
        return reader if fits else READERS["columns"]


def _mapped_rows(lines: Sequence[Line], source: Source) -> list[Any]:
    """Return the values with our names for columns; raises `UserError` where a mapped column is in none of them."""
    values, slips = [], []
    for line in lines:
        try:
            values.append(mapped(line.value, source.column_map))
        except Malformed as error:
            slips.append(f"source {source.name}: {line.file}, row {line.number}: {error}")
    if slips and not values:
        raise UserError(slips[0])
    return values


def _gathered(lines: Iterable[Line], column: str | None) -> Iterator[list[Line]]:
    """Yield neighbouring lines with one value in a column together; without a column, each alone."""
    if column is None:
        yield from ([line] for line in lines)
        return

    def key(line: Line) -> Any:
        return line.value.get(column) if isinstance(line.value, dict) else (line.file, line.number)

    for _, group in itertools.groupby(lines, key=key):
        yield list(group)


def choose_reader(source: Source, first: Sequence[Any]) -> tuple[str, str]:
    """Return the name of a source's reader and the evidence for it.

    Args:
        first: the first rows of the source, columns mapped.

    Raises:
        NoReader: none fits.
        UserError: no reader of that name, or columns that it needs are missing.
    """
    rows = [row for row in first if isinstance(row, dict)]
    columns = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    if source.reader != "auto":
        if source.reader not in READERS:
            near = did_you_mean(source.reader, READERS)
            raise UserError(f"source {source.name}: no reader '{source.reader}'{near}; known: {', '.join(READERS)}")
        missing = [name for name in READERS[source.reader].needs if rows and name not in columns]
        if missing:
            raise UserError(
                f"source {source.name}: no column '{missing[0]}', which reader {source.reader} needs; there are: "
                f"{', '.join(columns) or 'none'}. Rename with columns: {{OURS: THEIRS}}, or name another reader"
            )
        return source.reader, "named in the recipe"
    for name, reader in READERS.items():
        evidence = [reason for row in rows if (reason := reader.evidence(row)) is not None]
        if evidence and 2 * len(evidence) > len(rows):
            return name, f"{evidence[0]} ({len(evidence)} of the first {len(rows)} rows)"
    raise NoReader(source, columns)


def mapped(row: Any, column_map: dict[str, str]) -> Any:
    """Return the row with our names for columns; `info.id` reaches into an object. Columns that are not named stay.

    A list of messages is a row with the column `messages`.

    Raises:
        Malformed: a column that the map names is missing.
    """
    if isinstance(row, list) and row and all(map(is_message, row)):
        row = {"messages": row}
    if not column_map or not isinstance(row, dict):
        return row
    renamed = {}
    for ours, theirs in column_map.items():
        value: Any = row
        for part in (theirs,) if theirs in row else theirs.split("."):
            if not isinstance(value, dict) or part not in value:
                raise Malformed(f"no column '{theirs}' (for {ours}); this row has {', '.join(map(str, row))}")
            value = value[part]
        renamed[ours] = value
    return {**{k: v for k, v in row.items() if k not in column_map.values()}, **renamed}


def read_row(reader: Reader, row: Any) -> list[Record]:
    """Return the records of a row; raises `Malformed` or `Untrainable` with the reason why it has none."""
    if not isinstance(row, dict):
        raise Malformed(f"must be an object with named columns, got {show_value(row)}")
    missing = next((name for name in reader.needs if name not in row and reader.gather is None), None)
    if missing is not None:
        raise Malformed(f"no column '{missing}'; this row has {', '.join(map(str, row)) or 'none'}")
    records = list(reader.read(row))
    for record in records:
        if any(map(is_blank, record.whole_responses)):
            raise Untrainable("empty response")
        asked = record.last_turn.strip()
        several = len(record.responses) > 1 and len(asked) >= LONG_PROMPT
        if several and all(response.lstrip().startswith(asked) for response in record.responses):
            raise Untrainable("each answer begins with the prompt, which stands before it already")
        responses = record.whole_responses
        rated = set(zip(responses, record.ratings, strict=True)) if record.ratings else set()
        if len(rated) > len(set(responses)):
            raise Untrainable("the same response is rated twice, differently")
    return records
