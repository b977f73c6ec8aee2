"""Logs in JSON, JSON lines and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from rlhf.base.json_files import MAX_BYTES, MAX_LINE_BYTES, bounded_lines, decode
from rlhf.doctor.foreign.rows import Log, Row, plain_name, read_row

HISTORY = "log_history"
_CSV_FIELD = 1 << 16
#: Columns that W&B's export adds to each figure.
_EXTREMES = ("__MIN", "__MAX")


def read_json(text: bytes, known: frozenset[str]) -> list[Log]:
    """Return the logs in a JSON text: `trainer_state.json`, a list of rows, or columns; none if it is nothing of these."""
    try:
        value = decode(text)
    except ValueError as error:
        return _truncated(text, known, str(error))
    if isinstance(value, dict) and isinstance(history := value.get(HISTORY), list):
        options = {name: entry for name, entry in value.items() if name != HISTORY}
        log = Log("trainer_state.json of transformers", options=options)
        log.rows = [read_row(row, known) for row in history if isinstance(row, dict)]
        return [log]
    rows = value if isinstance(value, list) else _of_columns(value)
    return [Log("JSON", rows=[read_row(row, known) for row in rows if isinstance(row, dict)])]


def _of_columns(value: Any) -> Iterator[dict[str, Any]]:
    """Yield rows of `{name: [values]}` and of `{name: {row: value}}`, as pandas writes them."""
    if not isinstance(value, dict):
        return
    columns = {
        name: list(column.values()) if isinstance(column, dict) else column
        for name, column in value.items()
        if isinstance(column, dict | list)
    }
    length = max(map(len, columns.values()), default=0)
    columns = {name: column for name, column in columns.items() if len(column) == length}
    for place in range(length):
        yield {name: column[place] for name, column in columns.items()}


def _truncated(text: bytes, known: frozenset[str], reason: str) -> list[Log]:
    """Return the rows of a `trainer_state.json` that was cut off, as far as they go."""
    whole = text[:MAX_BYTES].decode("utf-8", "replace")
    start = whole.find("[", whole.find(f'"{HISTORY}"'))
    if f'"{HISTORY}"' not in whole or start < 0:
        return []
    log = Log("trainer_state.json of transformers", notes=[f"cut off or damaged ({reason}); what comes after is lost"])
    place, parse = start + 1, json.JSONDecoder().raw_decode
    while True:
        while place < len(whole) and whole[place] in " \t\r\n,":
            place += 1
        try:
            row, place = parse(whole, place)
        except (ValueError, RecursionError):
            return [log]
        if isinstance(row, dict):
            log.rows.append(read_row(row, known))


def read_lines(stream: IO[bytes], known: frozenset[str]) -> list[Log]:
    """Return the log in JSON lines; lines that are no objects are counted."""
    log, unreadable = Log("JSON lines"), 0
    for line, size in bounded_lines(stream, MAX_LINE_BYTES):
        if not line.strip():
            continue
        try:
            value = decode(line.decode("utf-8", "replace")) if size <= MAX_LINE_BYTES else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            unreadable += 1
        elif (
            isinstance(value.get(HISTORY), list) and log.rows
        ):  # ms-swift ends with the state, whose rows it has written
            log.options |= {name: entry for name, entry in value.items() if name != HISTORY}
        else:
            log.rows.append(read_row(value, known))
    if unreadable:
        log.notes.append(f"{unreadable} unreadable line{'s' if unreadable > 1 else ''} left out")
    return [log]


def read_csv(lines: Iterator[str], known: frozenset[str]) -> list[Log]:
    """Return the logs in a CSV file, one a run: W&B's export has columns `RUN - NAME`. Empty cells and NaN are no figures."""
    csv.field_size_limit(_CSV_FIELD)
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)
    try:
        header = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error:  # a name of tens of kilobytes
        return []
    columns = [_column(name) for name in header]
    logs: dict[str, Log] = {run: Log("CSV", name=run) for run, _ in columns if run} or {"": Log("CSV")}
    broken = 0
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            broken += 1
            continue
        if cells is None:
            break
        for run, log in logs.items():
            if row := _cells(columns, cells, run, known):
                log.rows.append(row)
    result = list(logs.values())
    if broken:
        result[0].notes.append(f"{broken} unreadable line{'s' if broken > 1 else ''} left out")
    return result


def plain_column(name: str) -> str:
    """Return the figure of a column."""
    return _column(name)[1]


def _column(name: str) -> tuple[str, str]:
    """Return run and figure of a column; the run is empty for one that all runs share."""
    run, _, figure = name.strip().strip('"').rpartition(" - ")
    return (run, "") if figure.endswith(_EXTREMES) else (run, plain_name(figure))


def _cells(columns: Sequence[tuple[str, str]], cells: Sequence[str], run: str, known: frozenset[str]) -> Row:
    values: Mapping[str, str] = {
        name: cell
        for (owner, name), cell in zip(columns, cells, strict=False)
        if name and owner in ("", run) and cell.strip().lower() not in ("", "nan")
    }
    return read_row(values, known)
