"""Any user's data -> validated rows of one shape for each stage, with counts of what was left out and why.

| kind | columns after loading | accepted |
|---|---|---|
| demonstrations | `prompt`, `completion` | `prompt` + `completion`; `messages`; preference data, of which the chosen answer is taken |
| comparisons | `prompt`, `responses`, `ratings` | `prompt` + `responses` + `ratings` (or `ranks`, 1 is best); `prompt` + `chosen` + `rejected`; `chosen` + `rejected` conversations that share their beginning |
| prompts | `prompt` | `prompt`; `messages`; preference data, of which the prompt is taken |

Texts are lists of `{role, content}` messages, plain strings, or transcripts as in Anthropic/hh-rlhf
(`\\n\\nHuman: ...\\n\\nAssistant: ...`). After loading they are lists of messages. Other columns are kept.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset

from rlhf.data_prep.files import is_data, is_readable, read_file
from rlhf.data_prep.folder import prepared_fingerprint
from rlhf.data_prep.rows import (
    Malformed,
    Row,
    Untrainable,
    as_prompt,
    as_response,
    at_last_answer,
    conversation,
    is_number,
    prompt_and_answer,
    show_value,
)
from rlhf.errors import UserError, did_you_mean
from rlhf.progress import progress

Kind = Literal["demonstrations", "comparisons", "prompts"]

#: Share of prompts that validation gets where the data has no validation split of its own.
VALIDATION_SHARE = 0.1
NEEDED = {
    "demonstrations": "'prompt' + 'completion', or 'messages'",
    "comparisons": "'prompt' + 'chosen' + 'rejected', or 'prompt' + 'responses' + 'ratings' (or 'ranks')",
    "prompts": "'prompt', or 'messages'",
}
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
#: Bytes of a row, far above any that fits a model.
_LONGEST_ROW = 16_000_000
_OTHER_NAMES = {"train": ("train",), "validation": ("validation", "test", "eval", "dev")}
#: More rows than this take long enough for a progress bar.
_MANY_ROWS = 20_000


@dataclass(frozen=True)
class Loaded:
    """Rows a stage can train on.

    Attributes:
        rows: columns as in the table above.
        dropped: reason -> rows left out. Of data without splits, those of the whole data.
        fingerprint: sha256 of the rows.
        prepared: fingerprint on the card of the folder that `rlhf.data_prep` made; None for other data.
    """

    rows: Dataset
    dropped: dict[str, int]
    fingerprint: str
    prepared: str | None = None


@dataclass(frozen=True)
class _Raw:
    """Rows as they were read."""

    source: str
    rows: Sequence[tuple[int, Row]]
    """(line or row number from 1, row)"""
    has_split: bool
    """False: these are all rows, and train and validation have to be told apart by a hash of the prompt."""
    prepared: str | None = None


def load_rows(path: str | Path, split: str, *, kind: Kind) -> Loaded:
    """Reads, checks and normalises data.

    Args:
        path: a folder (`KIND/SPLIT.parquet`, `.jsonl`, `.json`, `.csv`, or `SPLIT.*` right in it), a data file, or the
            name of a dataset on the hub. Of a file, and of a hub dataset without a validation or test split, a tenth of
            the prompts (by hash) is `validation` and the rest is `train`: a prompt is never in both.
        split: `train` or `validation`.
        kind: what the rows are for.

    Raises:
        UserError: nothing there, columns are missing, a row has a wrong type (it is named), or no row is left.
    """
    if split not in _OTHER_NAMES:
        raise UserError(f"no split '{split}'{did_you_mean(split, _OTHER_NAMES)}; there are train and validation")
    raw = _read(str(path), split, kind)
    if not raw.rows:
        raise UserError(f"{raw.source} is empty: it holds no rows")
    columns = set().union(*(row.keys() for _, row in raw.rows))
    normalise = _normaliser(kind, columns, raw.source)
    rows, dropped = _normalise_all(raw, normalise, kind)
    if rows and not raw.has_split:
        rows = _hash_split(rows, split)
        if not rows:
            raise UserError(
                f"{raw.source} has a single prompt, too few to hold some out; give a folder with train and validation"
            )
    if not rows:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise UserError(f"no row of {raw.source} can be used as {kind} ({reasons})")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Loaded(_to_dataset(rows), dict(dropped), digest.hexdigest(), raw.prepared)


# Reading


def _read(path: str, split: str, kind: str) -> _Raw:
    place = Path(path).expanduser()
    if place.is_file():
        return _Raw(path, _read_file(place), has_split=False)
    if place.is_dir():
        file = _file_in_folder(place, split, kind)
        return _Raw(str(file), _read_file(file), has_split=True, prepared=prepared_fingerprint(file))
    if _looks_local(path, place):
        siblings = [str(p) for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = did_you_mean(str(place), siblings)
        raise UserError(
            f"no data at {path}{near}; the demo's data is made with: python -m rlhf.data_prep --output_dir FOLDER"
        )
    return _read_hub(path, split)


def _looks_local(path: str, place: Path) -> bool:
    """Whether a name that does not exist here was meant as a path: hub names are NAME or OWNER/NAME."""
    return (
        path.startswith((".", "/", "~"))
        or path.endswith("/")
        or is_readable(place)
        or len(place.parts) != 2
        or place.parent.is_dir()
    )


def _file_in_folder(folder: Path, split: str, kind: str) -> Path:
    candidates = [folder / kind / f"{split}{suffix}" for suffix in _SUFFIXES]
    candidates += [folder / f"{split}{suffix}" for suffix in _SUFFIXES]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if is_data(p))
        raise UserError(
            f"no {kind} for {split} in {folder}: expected {kind}/{split}.parquet (or .jsonl, .json, .csv); "
            f"there are {', '.join(there[:8]) or 'no data files'}{did_you_mean(f'{kind}/{split}.parquet', there)}"
        )
    return found


def _read_file(file: Path) -> list[tuple[int, Row]]:
    """Numbered rows of a file: lines from 1 in .jsonl, rows from 1 elsewhere."""
    if not is_readable(file):
        raise UserError(f"cannot read {file}: its name must end in one of {', '.join(_SUFFIXES)}")
    rows = []
    for line in read_file(file, _LONGEST_ROW):
        if line.problem:
            raise UserError(f"{file}, row {line.number}: {line.problem}; python -m rlhf.data_prep leaves bad rows out")
        if not isinstance(line.value, dict):
            raise UserError(
                f"{file}, row {line.number} must be an object with named columns, got {show_value(line.value)}"
            )
        rows.append((line.number, line.value))
    return rows


def _read_hub(name: str, split: str) -> _Raw:
    import datasets

    try:
        splits: Any = datasets.load_dataset(name)
    except Exception as error:  # hub, network, script and parsing errors have no common type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no file or folder '{name}' here, and no dataset of that name could be loaded: {reason}"
        ) from error
    own = next((s for s in _OTHER_NAMES[split] if s in splits), None)
    has_validation = any(s in splits for s in _OTHER_NAMES["validation"])
    if own is None and (split == "train" or "train" not in splits):
        raise UserError(f"dataset '{name}' has no {split} split; it has {', '.join(splits)}")
    chosen = own or "train"
    return _Raw(f"{name} ({chosen})", list(enumerate(splits[chosen], start=1)), has_split=has_validation)


# Rows


def _normalise_all(raw: _Raw, normalise: Callable[[Row], Row], kind: str) -> tuple[list[Row], Counter[str]]:
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    numbered: Iterable[tuple[int, Row]] = raw.rows
    for number, row in progress(numbered, f"reading {kind}", len(raw.rows)) if len(raw.rows) > _MANY_ROWS else numbered:
        try:
            rows.append(normalise(row))
        except Untrainable as reason:
            dropped[str(reason)] += 1
        except Malformed as error:
            raise UserError(f"{raw.source}, row {number}: {error}") from error
    return rows, dropped


def _normaliser(kind: Kind, columns: set[str], source: str) -> Callable[[Row], Row]:
    """The function that brings a row with these columns into the shape of its kind."""
    shapes: dict[str, list[tuple[set[str], Callable[[Row], Row]]]] = {
        "demonstrations": [
            ({"prompt", "completion"}, _demonstration),
            ({"messages"}, _demonstration_of_messages),
            ({"chosen"}, _demonstration_of_chosen),
        ],
        "comparisons": [
            ({"prompt", "responses", "ratings"}, _ranking),
            ({"prompt", "responses", "ranks"}, _ranking),
            ({"chosen", "rejected"}, _pair),
        ],
        "prompts": [({"prompt"}, _prompt_row), ({"messages"}, _prompt_row), ({"chosen"}, _prompt_of_chosen)],
    }
    for needed, normalise in shapes[kind]:
        if needed <= columns:
            return normalise
    raise UserError(f"{source} has columns {', '.join(sorted(columns))}; {kind} need {NEEDED[kind]}")


def _demonstration(row: Row) -> Row:
    prompt, completion = as_prompt(row.get("prompt")), as_response(row.get("completion"), "completion")
    return {"prompt": prompt, "completion": completion, **_others(row, "prompt", "completion")}


def _demonstration_of_messages(row: Row) -> Row:
    prompt, answer = at_last_answer(conversation(row.get("messages"), "messages"))
    return {"prompt": prompt, "completion": answer, **_others(row, "messages", "prompt", "completion")}


def _demonstration_of_chosen(row: Row) -> Row:
    prompt, chosen = prompt_and_answer(row, "chosen")
    return {"prompt": prompt, "completion": chosen, **_others(row, "prompt", "chosen", "rejected")}


def _prompt_row(row: Row) -> Row:
    name = "prompt" if row.get("prompt") is not None else "messages"
    return {"prompt": as_prompt(row.get(name), name), **_others(row, "prompt", "messages")}


def _prompt_of_chosen(row: Row) -> Row:
    return {"prompt": prompt_and_answer(row, "chosen")[0], **_others(row, "prompt", "chosen", "rejected")}


def _pair(row: Row) -> Row:
    prompt, chosen = prompt_and_answer(row, "chosen")
    other_prompt, rejected = prompt_and_answer(row, "rejected")
    if prompt != other_prompt:
        raise Untrainable("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise Untrainable("chosen and rejected are the same")
    others = _others(row, "prompt", "chosen", "rejected")
    return {"prompt": prompt, "responses": [chosen, rejected], "ratings": [1.0, 0.0], **others}


def _ranking(row: Row) -> Row:
    prompt, values = as_prompt(row.get("prompt")), row.get("responses")
    if not isinstance(values, list):
        raise Malformed(f"'responses' must be a list, got {show_value(values)}")
    name, sign = ("ratings", 1.0) if row.get("ratings") is not None else ("ranks", -1.0)
    numbers = row.get(name)
    if not isinstance(numbers, list) or not all(is_number(v) for v in numbers):
        raise Malformed(f"'{name}' must be a list of numbers, got {show_value(numbers)}")
    if len(numbers) != len(values):
        raise Malformed(f"{len(values)} responses but {len(numbers)} {name}")
    if len(values) < 2:
        raise Untrainable("fewer than two responses")
    if not all(v is not None and math.isfinite(v) for v in numbers):
        raise Untrainable(f"{name} that are missing or not finite")
    if min(numbers) == max(numbers):
        raise Untrainable("all responses are rated the same")
    responses = [as_response(value, f"responses[{i}]") for i, value in enumerate(values)]
    ratings = [sign * v for v in numbers]
    return {
        "prompt": prompt,
        "responses": responses,
        "ratings": ratings,
        **_others(row, "responses", "ratings", "ranks"),
    }


def _others(row: Row, *used: str) -> Row:
    return {name: value for name, value in row.items() if name not in (*used, "prompt")}


# Results


def _hash_split(rows: list[Row], split: str) -> list[Row]:
    """Train or validation by a hash of the prompt; the lowest hash is always validation, so that there is one."""
    hashes = [hashlib.sha256(json.dumps(row["prompt"], sort_keys=True).encode()).hexdigest() for row in rows]
    limit = max(f"{int(VALIDATION_SHARE * 16**8):08x}", min(hashes))
    return [row for row, digest in zip(rows, hashes, strict=True) if (digest <= limit) == (split == "validation")]


def _to_dataset(rows: list[Row]) -> Dataset:
    """A dataset; a column that no stage needs and that mixes types is kept as JSON text."""
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
