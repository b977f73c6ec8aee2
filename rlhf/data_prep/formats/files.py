"""Raw rows of files, folders and hub datasets, read one at a time: no file is ever held whole.

A row that cannot be read (not UTF-8, not JSON, too long) comes as a `Line` with a problem, and reading goes on. What makes
the rest of a file unreadable (a truncated archive, a broken JSON array, a file that changes) is a `UserError`.
"""

from __future__ import annotations

import collections
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.base.errors import UserError
from rlhf.base.json_files import EXCERPT, bounded_lines, decode
from rlhf.base.storage import sha256_file
from rlhf.base.text_files import open_text, text_lines
from rlhf.data_prep.prepare.recipe import Source, local

#: Endings of data files; each but .parquet and .arrow may be followed by .gz.
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
BINARY_SUFFIXES = (".parquet", ".arrow")
#: Columns whose cells in a CSV file are texts even when they look like a JSON list, unless it is a list of messages.
TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected", "response")
_BATCH = 1000
#: Line after the last one of a CSV file: part of a cell where a quote is still open.
_END = "\0end"
#: Characters of a cell that stand for a byte that is not UTF-8, and zero bytes.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
#: Names of the list of rows in a .json file that is one object: LMFlow's, SQuAD's, and the like.
_LISTS = ("data", "instances", "examples", "rows", "records", "samples", "train")
#: Bytes of a row, far above any that fits a model.
LONGEST_ROW = 16_000_000


@dataclass(frozen=True)
class Line:
    """A row as it was read."""

    file: str
    number: int
    """Line of a .jsonl file, row elsewhere; from 1."""
    value: Any = None
    """The JSON value of the row, a dict in most files."""
    problem: str = ""
    """Reason why there is no value; empty where there is one."""
    raw: str = ""
    """Beginning of an unreadable row, undecodable bytes written as \\xNN."""


def source_files(source: Source) -> list[Path]:
    """Return the data files of a local source in the order in which they are read; none for a hub dataset.

    Raises:
        UserError: nothing there, or a folder or file without readable data.
    """
    place = local(source)
    if place is None:
        if looks_local(source.path):
            raise UserError(f"no data at {source.path} (source {source.name})")
        return []
    if place.is_file():
        if not is_readable(place):
            endings = ", ".join((*TEXT_SUFFIXES, *BINARY_SUFFIXES))
            raise UserError(f"cannot read {place}: its name must end in one of {endings} (or .jsonl.gz and the like)")
        return [place]
    files = sorted(p for p in place.rglob("*") if p.is_file() and is_data(p))
    if source.split:
        files = [p for p in files if source.split in (p.name.split(".")[0].split("-")[0], p.parent.name)]
    if not files:
        of_split = f" of split '{source.split}'" if source.split else ""
        raise UserError(f"no data files{of_split} in {place}; expected names ending in {', '.join(TEXT_SUFFIXES)}, ...")
    return files


def looks_local(name: str) -> bool:
    """Return True for a name that exists nowhere here and was meant as a path: hub names are NAME or OWNER/NAME."""
    place = Path(name).expanduser()
    inside = place.parent.is_dir()
    return (
        name.startswith((".", "/", "~", "pypi:"))
        or name.endswith("/")
        or len(place.parts) > 2
        or is_readable(place)
        or (inside and (place.suffix != "" or place.parent != Path()))
    )


def is_data(file: Path) -> bool:
    """Return True for data, False for notes about data: cards, and the state of a dataset saved by `datasets`."""
    notes = ("card.json", "rejected.jsonl", "state.json", "dataset_info.json", "dataset_dict.json")
    return is_readable(file) and file.name not in notes


def is_readable(file: Path) -> bool:
    """Return True for a file name with an ending that can be read."""
    return _suffix(file) in TEXT_SUFFIXES + BINARY_SUFFIXES


def _suffix(file: Path) -> str:
    """Return the ending without .gz, e.g. .jsonl; a compressed binary file has none that can be read."""
    if file.suffix != ".gz":
        return file.suffix
    inner = Path(file.stem).suffix
    return inner if inner in TEXT_SUFFIXES else ".gz"


def hash_files(source: Source) -> dict[str, str]:
    """Return the sha256 of each file of a local source, by name or place in its folder; empty for a hub dataset."""
    place = local(source)
    files = source_files(source)
    return {
        file.relative_to(place).as_posix() if place and place.is_dir() else file.name: sha256_file(file)
        for file in files
    }


def read_source(source: Source, max_row_bytes: int) -> Iterator[Line]:
    """Yield the rows of a source, in order.

    Args:
        max_row_bytes: longer lines of a text file become a `Line` with a problem.

    Raises:
        UserError: a file is empty, ends too early, cannot be parsed on, or changed while it was read.
    """
    files = source_files(source)
    if not files:
        yield from read_hub(source.path, subset=source.subset, split=source.split or "train", revision=source.revision)
    for file in files:
        yield from read_file(file, max_row_bytes)


def read_file(file: Path, max_row_bytes: int = LONGEST_ROW) -> Iterator[Line]:
    """Yield the rows of one file; raises like `read_source`."""
    first = _identity(file)
    suffix, number = _suffix(file), 0
    readers = {".csv": _csv_lines, ".tsv": _csv_lines, ".parquet": _parquet_lines, ".arrow": _arrow_lines}
    place = _place_of_rows(file) if suffix == ".json" else ""
    read = readers.get(suffix, partial(_json_array_lines, place=place) if place else _json_lines)
    try:
        for line in read(file, max_row_bytes):
            number = line.number
            yield line
        last = _identity(file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file} ends in the middle of its compressed data after row {number} ({error}); download it again"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{file} was removed while it was read; copy it first, and run again") from error
    if last != first:
        raise UserError(f"{file} was changed while it was read; wait until it is written, or copy it, and run again")
    if number == 0:
        raise UserError(f"{file} is empty: it holds no rows")


def _identity(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _place_of_rows(file: Path) -> str:
    """Return the place, in ijson's words, of the rows of a .json file that is one array or object; empty for JSON lines.

    Raises:
        UserError: an object over several lines without a list of rows.
    """
    try:
        with open_text(file) as stream:
            first = next((line for line in iter(partial(stream.readline, LONGEST_ROW), b"") if line.strip()), b"")
            more = stream.read(4096).strip()
        if first.lstrip().startswith(b"["):
            return "item"
        if not first.lstrip().startswith(b"{") or (more and _is_json(first)):
            return ""
        with open_text(file) as stream:
            place = _place_in_object(stream)
            broken = place is None  # reported when it is read
            return place or ("" if broken or _is_json(first) else _refuse_object(file))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error):
        return ""  # reported when it is read


def _place_in_object(stream: IO[bytes]) -> str | None:
    """Return the place of the first list of objects in the object that a stream begins with, under a name such as `data`.

    It is empty if there is none, and None if the object is broken before its list.
    """
    import ijson  # here: a machine that trains on prepared rows can do without

    name = ""
    try:
        for prefix, event, _ in ijson.parse(stream):
            if event == "start_map" and name and prefix == f"{name}.item":
                return prefix
            name = prefix if event == "start_array" and prefix in _LISTS else ""
            if not prefix and event == "end_map":
                break
    except ijson.JSONError:
        return None
    return ""


def _refuse_object(file: Path) -> NoReturn:
    raise UserError(
        f"{file} holds JSON objects over several lines; rows are an array, a list under one of {', '.join(_LISTS)}, or one "
        f"object a line: jq -c . {file.name} > NEW.jsonl"
    )


def _is_json(line: bytes) -> bool:
    try:
        decode(line)
    except ValueError:
        return False
    return True


def _json_lines(file: Path, max_row_bytes: int) -> Iterator[Line]:
    with open_text(file) as stream:
        for number, (raw, size) in enumerate(bounded_lines(stream, max_row_bytes), start=1):
            if size > max_row_bytes:
                problem = f"{size / 1e6:.1f} MB on one line, more than max_row_megabytes allows"
                yield Line(str(file), number, problem=problem, raw=_excerpt(raw))
            elif raw.strip():
                yield _json_line(str(file), number, raw)


def _json_line(file: str, number: int, raw: bytes) -> Line:
    try:
        zero = raw.find(b"\0") + 1
        if not zero:
            return Line(file, number, decode(raw))
        problem = f"not JSON: byte {zero} of the line is zero"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start + 1} of the line)"
    except ValueError as error:
        problem = f"not valid JSON: {error}"
    return Line(file, number, problem=problem, raw=_excerpt(raw))


def _excerpt(raw: bytes) -> str:
    return raw[:EXCERPT].decode("utf-8", "backslashreplace").rstrip("\r\n")


class _Object(dict[str, Any]):
    """An object that notes a name which stands twice with different values; raising there would confuse the parser."""

    repeated = ""

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self and self[name] != value:
            self.repeated = f"`{name}` stands twice, with different values"
        super().__setitem__(name, value)


def _repeated(value: Any) -> str:
    """Return the note of an object, or of one inside it; empty where there is none."""
    if isinstance(value, _Object):
        return value.repeated or next(filter(None, map(_repeated, value.values())), "")
    return next(filter(None, map(_repeated, value)), "") if isinstance(value, list) else ""


def _json_array_lines(file: Path, _: int, *, place: str) -> Iterator[Line]:
    import ijson

    number = 0
    with open_text(file) as stream:
        try:
            for value in ijson.items(stream, place, use_float=True, map_type=_Object):
                number += 1
                problem = _repeated(value)
                yield Line(
                    str(file), number, None if problem else value, problem, "" if not problem else str(value)[:EXCERPT]
                )
        except (ijson.JSONError, UnicodeDecodeError) as error:
            if "UTF" in str(error):
                collections.deque(text_lines(file), maxlen=0)  # raises with the place of the byte
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file} is not valid JSON after row {number}: {reason}; one object a line (.jsonl) would lose only bad rows"
            ) from error


def _csv_lines(file: Path, max_row_bytes: int) -> Iterator[Line]:
    """Yield rows; cells that hold a JSON list become lists (in a column of texts only lists of messages)."""
    csv.field_size_limit(max_row_bytes)
    with open_text(file) as stream:
        # surrogateescape: a bad byte spoils its row, not the file; newline="": csv knows those inside quotes
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        ended: list[bool] = []

        def lines() -> Iterator[str]:
            yield from text
            ended.append(True)
            yield _END

        reader = csv.DictReader(lines(), delimiter="\t" if _suffix(file) == ".tsv" else ",", restkey="\0more")
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _check_header(file, reader.fieldnames)
            _refuse_other_separator(file, reader.fieldnames)
            number, row = 0, dict[str | Any, Any]({"": "".join(reader.fieldnames)})
            for number, row in enumerate(reader, start=1):
                if ended:
                    break
                yield _csv_line(str(file), number, row)
        except csv.Error as error:
            raise UserError(
                f"{file} is not a readable CSV file: {error} (line {reader.line_num}); is a quote not closed?"
            ) from error
    if next(iter(row.values())) not in (_END, [_END]):
        raise UserError(
            f"{file}: a quote in row {number} is not closed, and the rest of the file is inside it; mend the row"
        )


def _check_header(file: Path, names: Sequence[str]) -> None:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file}: `{twice}` stands twice in the header; rename one of the two columns, or delete it")


def _refuse_other_separator(file: Path, names: Sequence[str]) -> None:
    mark = next((mark for mark in ";|\t," if len(names) == 1 and mark in names[0]), None)
    if mark:
        separator = "tabs" if _suffix(file) == ".tsv" else "commas"
        raise UserError(f"{file}: columns are separated by {mark!r} in {names[0]!r}; save it with {separator}")


def _csv_line(file: str, number: int, row: dict[str, Any]) -> Line:
    more = row.pop("\0more", None)
    raw = json.dumps(row, default=str)[:EXCERPT]
    if more is not None:
        return Line(file, number, problem=f"{len(more)} more cells than columns", raw=raw)
    missing = [name for name, value in row.items() if value is None]
    if missing:
        return Line(file, number, problem=f"the row ends before column '{missing[0]}'", raw=raw)
    for name, value in row.items():
        if bad := _NO_TEXT.search(value):
            problem = "a zero byte" if bad[0] == "\0" else "not UTF-8"
            return Line(file, number, problem=f"{problem} (character {bad.start() + 1} of '{name}')", raw=raw)
    return Line(file, number, {name: csv_cell(name, value) for name, value in row.items()})


def csv_cell(name: str, value: str) -> Any:
    """Return a cell; one that holds a JSON list becomes the list, except that "[1]" in a column of texts is a text."""
    if not value.lstrip().startswith("["):
        return value
    try:
        values = decode(value)
    except ValueError:
        return value
    return values if name not in TEXT_COLUMNS or all(isinstance(v, dict) for v in values) else value


def _parquet_lines(file: Path, _: int) -> Iterator[Line]:
    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            _check_header(file, parquet.schema_arrow.names)
            yield from _numbered(file, parquet.iter_batches(batch_size=_BATCH))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _arrow_lines(file: Path, _: int) -> Iterator[Line]:
    """Yield the rows of a file that `Dataset.save_to_disk` wrote, memory-mapped."""
    from datasets import Dataset

    try:
        rows = Dataset.from_file(str(file))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a readable Arrow file: {str(error).splitlines()[0]}") from error
    yield from _numbered(file, rows.with_format("arrow").iter(batch_size=_BATCH))


def _numbered(file: Path, batches: Any) -> Iterator[Line]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Line(str(file), number, row)


def read_hub(
    name: str, *, subset: str | None = None, split: str = "train", revision: str | None = None, hint: str = ""
) -> Iterator[Line]:
    """Yield the rows of a hub dataset, streamed; raises like `read_source`, with the hint at the end."""
    import datasets

    place, number = f"{name} ({split})", 0
    try:
        rows: Any = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        for number, row in enumerate(without_media(rows), start=1):
            yield Line(place, number, dict(row))
    except Exception as error:  # hub, network, script and parsing errors have no common type
        raise hub_error(name, number, error, hint) from error
    if number == 0:
        raise UserError(f"{place} is empty: it holds no rows")


def hub_error(name: str, row: int, error: Exception, hint: str = "") -> UserError:
    """Return the error for a hub dataset that cannot be read on after a row."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"no file or folder '{name}' here, and the hub dataset of that name cannot be read after row {row}: {reason}{hint}"
    )


def without_media(rows: Any) -> Any:
    """Return a hub dataset without its columns of images, sound and the like.

    Their cells may hold paths, and reading one would open that file of this machine.
    """
    from datasets.features.features import require_decoding

    media = [name for name, feature in (rows.features or {}).items() if require_decoding(feature)]
    return rows.remove_columns(media) if media else rows
