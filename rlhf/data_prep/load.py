"""Data of any accepted form as validated rows of one shape for each stage, with counts of the rows left out.

Rows are read by the readers of `rlhf.data_prep.formats`, as in `rlhf data`, and become the rows of `rlhf.data_prep.stage_rows`.

| kind | plain columns that are accepted, beside all published shapes |
|---|---|
| demonstrations | `prompt` + `completion`; `messages`; preference data, of which the best answer is taken |
| comparisons | `prompt` + `responses` + `ratings` (or `ranks`, 1 is best, or `rater_ratings`); `prompt` + `chosen` + `rejected`; `chosen` + `rejected` conversations that share their beginning |
| prompts | `prompt`; `messages`; preference data, of which the prompt is taken |

Texts are lists of `{role, content}` messages, plain strings, or transcripts as in Anthropic/hh-rlhf
(`\\n\\nHuman: ...\\n\\nAssistant: ...`). Other columns are kept.

`margin` beside `chosen` and `rejected` (TRL's format) is the difference of their ratings; 1 where there is none.

`rater_ratings` holds, for each response, the numbers of its raters, null where one gave none. In place of `ratings` it is
split: raters at even places are trained on (`ratings`, their means, and `rater_ratings`), raters at odd places are held out
(`ratings_held_out`, `rater_ratings_held_out`).
"""  # noqa: E501

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from rlhf.base import distributed
from rlhf.base.errors import UserError, did_you_mean
from rlhf.data_prep.formats.files import Line, hub_error, is_data, is_readable, looks_local, read_file, without_media
from rlhf.data_prep.formats.readers import READERS, NoReader, Reading, SourceReader, mapped
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import Malformed, Row, Untrainable, prompt_key, show_value
from rlhf.data_prep.prepare.folder import prepared_fingerprint
from rlhf.data_prep.prepare.recipe import Source
from rlhf.data_prep.ratings import merge
from rlhf.data_prep.stage_rows import Kind, NotOfKind, stage_row
from rlhf.registry import recipe_hash
from rlhf.run.progress import progress

#: A row with its line or row number in the source, from 1.
Numbered = tuple[int, Row]

#: Share of prompts that validation gets where the data has no validation split of its own.
VALIDATION_SHARE = 0.1
NEEDED = {
    "demonstrations": "'prompt' + 'completion', or 'messages'",
    "comparisons": "'prompt' + 'chosen' + 'rejected', or 'prompt' + 'responses' + 'ratings' (or 'ranks', or 'rater_ratings')",
    "prompts": "'prompt', or 'messages'",
}
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
_SPLITS = {"train": ("train",), "validation": ("validation", "test", "eval", "dev")}
#: More rows than this take long enough for a progress bar.
_MANY_ROWS = 20_000
#: Rows that are named for each reason to leave rows out.
NAMED_ROWS = 20


class NoneOfKind(UserError):
    """The data holds other kinds of rows, and none that is meant to be of this one."""


@dataclass(frozen=True)
class Loaded:
    """Rows a stage can train on.

    Attributes:
        rows: columns as in `rlhf.data_prep.stage_rows`.
        dropped: reason -> rows left out. Of data without splits, those of the whole data.
        fingerprint: sha256 of the rows.
        prepared: fingerprint on the card of the folder that `rlhf.data_prep` made; None for other data.
        numbers: line or row number in the source of each of the rows.
        dropped_rows: reason -> numbers of the first rows left out.
        source: file or hub dataset, for messages.
    """

    rows: Dataset
    dropped: dict[str, int]
    fingerprint: str
    prepared: str | None = None
    numbers: list[int] = field(default_factory=list)
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)
    source: str = ""


def joint_fingerprint(sets: Mapping[str, Loaded]) -> str:
    """Return one fingerprint of the data sets of a stage, by name: that of its manifest."""
    return recipe_hash({name: loaded.fingerprint for name, loaded in sets.items()}, [], None)


@dataclass(frozen=True)
class _Raw:
    """Rows as they were read."""

    source: str
    lines: Sequence[Line]
    has_split: bool
    """False: these are all rows, and a hash of the prompt decides which are train and validation."""
    prepared: str | None = None
    in_folder_of_kind: bool = False
    """The file is KIND/SPLIT.*, so its rows are meant to be of this kind."""

    def none_of_kind(self, kind: Kind, columns: Iterable[str], hint: str = "") -> UserError:
        """Return the error for rows none of which is of this kind."""
        error = UserError if self.in_folder_of_kind else NoneOfKind
        return error(f"{self.source} has columns {', '.join(sorted(columns))}; {kind} need {NEEDED[kind]}{hint}")


def load_rows(path: str | Path, split: str, *, kind: Kind) -> Loaded:
    """Read, check and normalise the rows of a stage.

    Args:
        path: a folder (`KIND/SPLIT.parquet`, `.jsonl`, `.json`, `.csv`, or `SPLIT.*` right in it), a data file, or the
            name of a dataset on the hub. Of a file, and of a hub dataset without a validation or test split, a tenth of
            the prompts (by hash) is `validation` and the rest is `train`: a prompt is never in both.
        split: `train` or `validation`.
        kind: purpose of the rows.

    Raises:
        NoneOfKind: there is data, and none of this kind.
        UserError: nothing there, columns are missing, a row has a wrong type (it is named), or no row is left.
    """
    if split not in _SPLITS:
        raise UserError(f"no split '{split}'{did_you_mean(split, _SPLITS)}; there are train and validation")
    raw = _read(str(path), split, kind)
    if not raw.lines:
        raise UserError(f"{raw.source} is empty: it holds no rows")
    rows, dropped = _stage_rows(raw, kind)
    if kind == "comparisons":
        rows = _without_contradictions(rows, dropped)
    counts = {reason: len(numbers) for reason, numbers in dropped.items()}
    reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
    if rows and not raw.has_split:
        rows = _hash_split(rows, split)
        if not rows:
            left_out = f" among the {kind} ({reasons})" if reasons else ""
            raise UserError(
                f"{raw.source} has a single prompt{left_out}, too few to hold some out; give a folder with train and validation"
            )
    if reasons and rows:
        _say(f"{raw.source}: left out of the {kind}: {reasons}")
    if not rows:
        raise UserError(f"no row of {raw.source} can be used as {kind} ({reasons})")
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Loaded(
        _to_dataset([row for _, row in rows]),
        counts,
        digest.hexdigest(),
        raw.prepared,
        numbers=[number for number, _ in rows],
        dropped_rows={reason: numbers[:NAMED_ROWS] for reason, numbers in dropped.items()},
        source=raw.source,
    )


# Reading


def _read(path: str, split: str, kind: Kind) -> _Raw:
    place = Path(path).expanduser()
    if place.is_file():
        return _Raw(path, _read_file(place), has_split=False)
    if place.is_dir():
        file = _file_in_folder(place, split, kind)
        return _Raw(
            str(file),
            _read_file(file),
            has_split=True,
            prepared=prepared_fingerprint(file),
            in_folder_of_kind=file.parent != place,
        )
    if looks_local(path):
        siblings = [str(p) for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = did_you_mean(str(place), siblings)
        raise UserError(f"no data at {path}{near}; the demo's data is made with: rlhf data --output_dir FOLDER")
    return _read_hub(path, split)


def _file_in_folder(folder: Path, split: str, kind: Kind) -> Path:
    candidates = [place / f"{split}{suffix}" for place in (folder / kind, folder) for suffix in _SUFFIXES]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if is_data(p))
        raise NoneOfKind(
            f"no {kind} for {split} in {folder}: expected {kind}/{split}.parquet (or .jsonl, .json, .csv); "
            f"there are {', '.join(names[:8]) or 'no data files'}{did_you_mean(f'{kind}/{split}.parquet', names)}"
        )
    return file


def _read_file(file: Path) -> list[Line]:
    if not is_readable(file):
        raise UserError(f"cannot read {file}: its name must end in one of {', '.join(_SUFFIXES)}")
    lines = list(read_file(file))
    for line in lines:
        if line.problem or not isinstance(mapped(line.value, {}), dict):
            problem = line.problem or f"must be an object with named columns, got {show_value(line.value)}"
            raise _refusal(line, problem)
    return lines


def _refusal(line: Line, reason: object) -> UserError:
    return UserError(f"{line.file}, row {line.number}: {reason}; rlhf data leaves bad rows out")


def _read_hub(name: str, split: str) -> _Raw:
    import datasets

    try:
        splits: Any = datasets.load_dataset(name)
    except Exception as error:  # hub, network, script and parsing errors have no common type
        raise hub_error(name, 0, error) from error
    own = next((s for s in _SPLITS[split] if s in splits), None)
    has_validation = any(s in splits for s in _SPLITS["validation"])
    if own is None and (split == "train" or "train" not in splits):
        raise UserError(f"dataset '{name}' has no {split} split; it has {', '.join(splits)}")
    source = f"{name} ({own or 'train'})"
    rows = enumerate(without_media(splits[own or "train"]), start=1)
    return _Raw(source, [Line(source, number, dict(row)) for number, row in rows], has_split=has_validation)


# Rows


def _stage_rows(raw: _Raw, kind: Kind) -> tuple[list[Numbered], dict[str, list[int]]]:
    """Return the rows that can be used, and by reason the numbers of the others."""
    rows: list[Numbered] = []
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    other_kinds: list[Reading] = []
    columns: set[str] = set()
    lines = progress(raw.lines, f"reading {kind}") if len(raw.lines) > _MANY_ROWS else raw.lines
    try:
        reader = SourceReader(Source(path=raw.source), lines)
    except NoReader as error:
        raise raw.none_of_kind(kind, error.columns, error.hint) from error
    rated: defaultdict[str, list[tuple[int, Record, Reading]]] = defaultdict(list)
    for reading in reader:
        line = reading.lines[0]
        columns |= reading.row.keys()
        try:
            if kind != "prompts" and _is_single(reading, kind):
                record = reading.records[0]
                rated[prompt_key(record.prompt)].append((line.number, record, reading))
            else:
                rows += [(line.number, row) for row in _rows_of(reading, kind)]
        except NotOfKind:
            other_kinds.append(reading)
        except Untrainable as reason:
            dropped[str(reason)] += [each.number for each in reading.lines]
        except Malformed as error:
            raise _refusal(line, error) from error
    for members in rated.values():
        _add_compared(kind, members, rows, dropped)
    rows.sort(key=lambda numbered: numbered[0])
    if raw.prepared is None and reader.unused:
        _say(f"{raw.source}: not used: {reader.unused_columns()}")
    if other_kinds and not rows and not dropped:
        raise raw.none_of_kind(kind, columns)
    for reading in other_kinds:
        if reading.reader is READERS["columns"]:  # published data hold rows of several kinds, a user's file slips
            raise _refusal(reading.lines[0], f"{kind} need {NEEDED[kind]}; this row has {', '.join(reading.row)}")
        dropped[f"nothing for {kind}"] += [each.number for each in reading.lines]
    return rows, dropped


def _is_single(reading: Reading, kind: Kind) -> bool:
    """Return True for one answer that somebody rated: those of a prompt are compared. A label counts alone for SFT."""
    rated = [record for record in reading.records if len(record.responses) == 1 and record.raters]
    return len(rated) == 1 and not (kind == "demonstrations" and rated[0].labelled)


def _add_compared(
    kind: Kind, members: list[tuple[int, Record, Reading]], rows: list[Numbered], dropped: dict[str, list[int]]
) -> None:
    """Add the rated answers to one prompt as a row, or count them as left out."""
    numbers, records, readings = zip(*members, strict=True)
    try:
        rows.append((numbers[0], stage_row(kind, merge(records), readings[0].row, readings[0].reader)))
    except Untrainable as reason:
        dropped[str(reason)] += numbers


@cache
def _say(text: str) -> None:
    """Print a line to the user, once in a process: a stage reads its data more than once."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _rows_of(reading: Reading, kind: Kind) -> list[Row]:
    """Return the stage's rows of a reading; where it has none, raise the reason."""
    if reading.error is not None:
        raise reading.error
    rows: list[Row] = []
    reasons: list[Exception] = []
    for record in reading.records:
        try:
            rows.append(stage_row(kind, record, reading.row, reading.reader))
        except (NotOfKind, Untrainable) as reason:
            reasons.append(reason)
    if not rows:
        raise reasons[0] if reasons else NotOfKind
    return rows


def _without_contradictions(rows: list[Numbered], dropped: dict[str, list[int]]) -> list[Numbered]:
    """Return the rows less those that order two responses to a prompt contrary to another row.

    All of these are dropped: nothing shows which is right. Raters who disagree belong into one row, as `rater_ratings`.
    """
    of_prompt: defaultdict[str, list[Numbered]] = defaultdict(list)
    for number, row in rows:
        of_prompt[prompt_key(row["prompt"])].append((number, row))
    bad: set[int] = set()
    for members in of_prompt.values():
        orders: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # (better, worse) -> numbers of rows
        for number, row in members if len(members) > 1 else []:
            texts = [answer[0]["content"] for answer in row["responses"]]
            for i, j in itertools.permutations(range(len(texts)), 2):
                if row["ratings"][i] > row["ratings"][j]:
                    orders[texts[i], texts[j]].add(number)
        for (better, worse), numbers in orders.items():
            if (worse, better) in orders:
                bad |= numbers
    if bad:
        dropped["contradicts another row"] = sorted(bad)
    return [(number, row) for number, row in rows if number not in bad]


# Results


def _hash_split(rows: list[Numbered], split: str) -> list[Numbered]:
    """Return the rows of train or validation, by a hash of the prompt; the lowest is validation, so that there is one."""
    keys = [prompt_key(row["prompt"]) for _, row in rows]
    lowest: dict[str, str] = {}  # of the spellings of one prompt
    for key, (_, row) in zip(keys, rows, strict=True):
        digest = hashlib.sha256(json.dumps(row["prompt"], sort_keys=True).encode()).hexdigest()
        lowest[key] = min(digest, lowest.get(key, digest))
    limit = max(f"{int(VALIDATION_SHARE * 16**8):08x}", min(lowest.values()))
    return [row for key, row in zip(keys, rows, strict=True) if (lowest[key] <= limit) == (split == "validation")]


def _to_dataset(rows: list[Row]) -> Dataset:
    """Return a dataset; a column that mixes types, which no stage needs, is kept as JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, list[Any]] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            values = [json.dumps(value, default=str) for value in values]
        columns[name] = values
    return Dataset.from_dict(columns)
