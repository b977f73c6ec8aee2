"""Any user's data -> validated rows of one shape for each stage, with counts of what was left out and why.

| kind | columns after loading | accepted |
|---|---|---|
| demonstrations | `prompt`, `completion` | `prompt` + `completion`; `messages`; preference data, of which the chosen answer is taken |
| comparisons | `prompt`, `responses`, `ratings` | `prompt` + `responses` + `ratings` (or `ranks`, 1 is best, or `rater_ratings`); `prompt` + `chosen` + `rejected`; `chosen` + `rejected` conversations that share their beginning |
| prompts | `prompt` | `prompt`; `messages`; preference data, of which the prompt is taken |

Texts are lists of `{role, content}` messages, plain strings, or transcripts as in Anthropic/hh-rlhf
(`\\n\\nHuman: ...\\n\\nAssistant: ...`). After loading they are lists of messages. Other columns are kept.

`margin` beside `chosen` and `rejected` (TRL's format) is by how much the chosen one is rated higher; 1 where there is none.

`rater_ratings` holds, for each response, the numbers of its raters, null where one gave none. In place of `ratings` it is
split: raters at even places are trained on (`ratings`, their means, and `rater_ratings`), raters at odd places are held out
(`ratings_held_out`, `rater_ratings_held_out`). So a rater who has the same place in every row is in one half only.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset

from rlhf.base.errors import UserError, did_you_mean
from rlhf.data_prep.formats.files import is_data, is_readable, read_file, without_media
from rlhf.data_prep.formats.rows import (
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
from rlhf.data_prep.prepare.folder import prepared_fingerprint
from rlhf.registry import recipe_hash
from rlhf.run.progress import progress

Kind = Literal["demonstrations", "comparisons", "prompts"]
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
#: Bytes of a row, far above any that fits a model.
_LONGEST_ROW = 16_000_000
_OTHER_NAMES = {"train": ("train",), "validation": ("validation", "test", "eval", "dev")}
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
        rows: columns as in the table above.
        dropped: reason -> rows left out. Of data without splits, those of the whole data.
        fingerprint: sha256 of the rows.
        prepared: fingerprint on the card of the folder that `rlhf.data_prep` made; None for other data.
        numbers: line or row number in the source of each of the rows.
        dropped_rows: reason -> numbers of the first rows left out.
    """

    rows: Dataset
    dropped: dict[str, int]
    fingerprint: str
    prepared: str | None = None
    numbers: list[int] = field(default_factory=list)
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)


def joint_fingerprint(sets: Mapping[str, Loaded]) -> str:
    """One fingerprint of the data sets of a stage, by name: that of its manifest."""
    return recipe_hash({name: loaded.fingerprint for name, loaded in sets.items()}, [], None)


@dataclass(frozen=True)
class _Raw:
    """Rows as they were read."""

    source: str
    rows: Sequence[Numbered]
    has_split: bool
    """False: these are all rows, and train and validation have to be told apart by a hash of the prompt."""
    prepared: str | None = None
    in_folder_of_kind: bool = False
    """The file is KIND/SPLIT.*, so its rows are meant to be of this kind."""


def load_rows(path: str | Path, split: str, *, kind: Kind) -> Loaded:
    """Reads, checks and normalises data.

    Args:
        path: a folder (`KIND/SPLIT.parquet`, `.jsonl`, `.json`, `.csv`, or `SPLIT.*` right in it), a data file, or the
            name of a dataset on the hub. Of a file, and of a hub dataset without a validation or test split, a tenth of
            the prompts (by hash) is `validation` and the rest is `train`: a prompt is never in both.
        split: `train` or `validation`.
        kind: what the rows are for.

    Raises:
        NoneOfKind: there is data, and none of this kind.
        UserError: nothing there, columns are missing, a row has a wrong type (it is named), or no row is left.
    """
    if split not in _OTHER_NAMES:
        raise UserError(f"no split '{split}'{did_you_mean(split, _OTHER_NAMES)}; there are train and validation")
    raw = _read(str(path), split, kind)
    if not raw.rows:
        raise UserError(f"{raw.source} is empty: it holds no rows")
    columns = set().union(*(row.keys() for _, row in raw.rows))
    normalise = _normaliser(kind, columns, raw)
    rows, dropped = _normalise_all(raw, normalise, kind)
    if kind == "comparisons":
        rows = _without_contradictions(rows, dropped)
    if rows and not raw.has_split:
        rows = _hash_split(rows, split)
        if not rows:
            raise UserError(
                f"{raw.source} has a single prompt, too few to hold some out; give a folder with train and validation"
            )
    counts = {reason: len(numbers) for reason, numbers in dropped.items()}
    if not rows:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
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
    )


# Reading


def _read(path: str, split: str, kind: str) -> _Raw:
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
        raise NoneOfKind(
            f"no {kind} for {split} in {folder}: expected {kind}/{split}.parquet (or .jsonl, .json, .csv); "
            f"there are {', '.join(there[:8]) or 'no data files'}{did_you_mean(f'{kind}/{split}.parquet', there)}"
        )
    return found


def _read_file(file: Path) -> list[Numbered]:
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
    return _Raw(f"{name} ({chosen})", list(enumerate(without_media(splits[chosen]), start=1)), has_split=has_validation)


# Rows


def _normalise_all(
    raw: _Raw, normalise: Callable[[Row], Row], kind: str
) -> tuple[list[Numbered], dict[str, list[int]]]:
    """The rows that can be used, and by reason the numbers of the others."""
    rows: list[Numbered] = []
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    numbered: Iterable[Numbered] = raw.rows
    for number, row in progress(numbered, f"reading {kind}", len(raw.rows)) if len(raw.rows) > _MANY_ROWS else numbered:
        try:
            rows.append((number, normalise(row)))
        except Untrainable as reason:
            dropped[str(reason)].append(number)
        except Malformed as error:
            raise UserError(f"{raw.source}, row {number}: {error}") from error
    return rows, dropped


def _normaliser(kind: Kind, columns: set[str], raw: _Raw) -> Callable[[Row], Row]:
    """The function that brings a row of data with these columns into the shape of its kind.

    Each row is read by the columns that it has itself: files of several sources mix their forms.
    """
    shapes: dict[str, list[tuple[set[str], Callable[[Row], Row]]]] = {
        "demonstrations": [
            ({"prompt", "completion"}, _demonstration),
            ({"messages"}, _demonstration_of_messages),
            ({"chosen"}, _demonstration_of_chosen),
        ],
        "comparisons": [
            ({"prompt", "responses", "ratings"}, _ranking),
            ({"prompt", "responses", "ranks"}, _ranking),
            ({"prompt", "responses", "rater_ratings"}, _ranking_by_raters),
            ({"chosen", "rejected"}, _pair),
        ],
        "prompts": [({"prompt"}, _prompt_row), ({"messages"}, _prompt_row), ({"chosen"}, _prompt_of_chosen)],
    }
    known = [(needed, normalise) for needed, normalise in shapes[kind] if needed <= columns]
    if not known:
        error = UserError if raw.in_folder_of_kind else NoneOfKind
        raise error(f"{raw.source} has columns {', '.join(sorted(columns))}; {kind} need {NEEDED[kind]}")

    def by_its_columns(row: Row) -> Row:
        there = {name for name, value in row.items() if value is not None}
        # A row that has too little for any form is told what the first of them misses.
        return next((normalise for needed, normalise in known if needed <= there), known[0][1])(row)

    return by_its_columns


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
    others = {**_others(row, "prompt", "chosen", "rejected", "margin"), **_single_ratings(row, 2)}
    return {"prompt": prompt, "responses": [chosen, rejected], "ratings": [_margin(row), 0.0], **others}


def _margin(row: Row) -> float:
    """By how much the chosen response is rated higher; 1 where the row does not say."""
    margin = row.get("margin")
    if margin is None:
        return 1.0
    if not is_number(margin):
        raise Malformed(f"'margin' must be a number, got {show_value(margin)}")
    if not (math.isfinite(margin) and margin > 0):
        raise Untrainable("a margin that is not above 0 and finite")
    return float(margin)


def _ranking(row: Row) -> Row:
    prompt, values = as_prompt(row.get("prompt")), row.get("responses")
    if not isinstance(values, list):
        raise Malformed(f"'responses' must be a list, got {show_value(values)}")
    if row.get("ratings") is None and row.get("ranks") is None:
        raise Malformed("it has 'responses', but no 'ratings', 'ranks' or 'rater_ratings'")
    name, sign = ("ratings", 1.0) if row.get("ratings") is not None else ("ranks", -1.0)
    ratings = [sign * v for v in _ratings(row, name, len(values))]
    if not all(map(math.isfinite, ratings)):
        raise Untrainable(f"{name} that are missing or not finite")
    if len(values) < 2:
        raise Untrainable("fewer than two responses")
    # Not finite where no rater is held out: no pair of them is ordered.
    held_out = _ratings(row, "ratings_held_out", len(values)) if row.get("ratings_held_out") is not None else []
    if len(set(ratings)) == 1 and len(set(filter(math.isfinite, held_out))) < 2:
        raise Untrainable("all responses are rated the same")
    responses = [as_response(value, f"responses[{i}]") for i, value in enumerate(values)]
    rated = {(answer[0]["content"], rating) for answer, rating in zip(responses, ratings, strict=True)}
    if len(rated) > len({text for text, _ in rated}):
        raise Untrainable("the same response is rated twice, differently")
    others = {**_others(row, "responses", "ratings", "ranks"), **_single_ratings(row, len(values))}
    return {"prompt": prompt, "responses": responses, "ratings": ratings, **others}


def _ratings(row: Row, name: str, count: int) -> list[float]:
    """A number for each of `count` responses; NaN where there is none."""
    numbers = row.get(name)
    if not isinstance(numbers, list) or not all(is_number(v) for v in numbers):
        raise Malformed(f"'{name}' must be a list of numbers, got {show_value(numbers)}")
    if len(numbers) != count:
        raise Malformed(f"{count} responses but {len(numbers)} {name}")
    return [math.nan if v is None else v for v in numbers]


def _ranking_by_raters(row: Row) -> Row:
    """A row whose ratings are the means of one half of its raters; the other half is held out."""
    values = row.get("responses")
    raters = _rater_ratings(row, len(values) if isinstance(values, list) else 0)
    halves = [[_given(inner[half::2]) for inner in raters] for half in (0, 1)]
    if not all(inner for half in halves for inner in half):
        raise Untrainable("a response without a rating in one half of the raters")
    trained, held_out = ([sum(inner) / len(inner) for inner in half] for half in halves)
    split = {"ratings_held_out": held_out, "rater_ratings_held_out": halves[1]}
    return _ranking({**row, "ratings": trained, "rater_ratings": halves[0], **split})


def _single_ratings(row: Row, count: int) -> Row:
    """The column of the single raters' numbers, if the row has any."""
    if not row.get("rater_ratings"):
        return {"rater_ratings": None} if "rater_ratings" in row else {}
    return {"rater_ratings": [_given(inner) for inner in _rater_ratings(row, count)]}


def _rater_ratings(row: Row, count: int) -> list[list[float | None]]:
    raters = row["rater_ratings"]
    if not isinstance(raters, list) or not all(
        isinstance(inner, list) and all(is_number(v) for v in inner) for inner in raters
    ):
        raise Malformed(f"'rater_ratings' must be a list of numbers for each response, got {show_value(raters)}")
    if len(raters) != count:
        raise Malformed(f"{count} responses but {len(raters)} lists of rater_ratings")
    if not all(_given(inner) and all(math.isfinite(v) for v in _given(inner)) for inner in raters):
        raise Untrainable("rater_ratings that are missing or not finite")
    return raters


def _given(ratings: Sequence[float | None]) -> list[float]:
    """The ratings that are there."""
    return [float(v) for v in ratings if v is not None]


def _without_contradictions(rows: list[Numbered], dropped: dict[str, list[int]]) -> list[Numbered]:
    """Leaves out rows that order two responses to a prompt one way where another row orders them the other way.

    All of them: nothing says which is right. Raters who disagree belong into one row, as `rater_ratings`.
    """
    of_prompt: defaultdict[str, list[Numbered]] = defaultdict(list)
    for number, row in rows:
        of_prompt[json.dumps(row["prompt"], sort_keys=True)].append((number, row))
    bad: set[int] = set()
    for members in of_prompt.values():
        says: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # (better, worse) -> rows that say so
        for number, row in members if len(members) > 1 else []:
            texts = [answer[0]["content"] for answer in row["responses"]]
            for i, j in itertools.permutations(range(len(texts)), 2):
                if row["ratings"][i] > row["ratings"][j]:
                    says[texts[i], texts[j]].add(number)
        for (better, worse), numbers in says.items():
            if (worse, better) in says:
                bad |= numbers
    if bad:
        dropped["contradicts another row"] = sorted(bad)
    return [(number, row) for number, row in rows if number not in bad]


def _others(row: Row, *used: str) -> Row:
    return {name: value for name, value in row.items() if name not in (*used, "prompt")}


# Results


def _hash_split(rows: list[Numbered], split: str) -> list[Numbered]:
    """Train or validation by a hash of the prompt; the lowest hash is always validation, so that there is one."""
    hashes = [hashlib.sha256(json.dumps(row["prompt"], sort_keys=True).encode()).hexdigest() for _, row in rows]
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
