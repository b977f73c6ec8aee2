"""Two numbered responses (`response_0` and `response_1`, `answer_a` and `answer_b`, ...) and a column that names the better.

Whether 1 is the first or the second response is decided by the names of the columns or by the labels of the first rows, and
never guessed: labels that fit two readings refuse the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlhf.base.errors import UserError
from rlhf.data_prep.formats import columns
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import Malformed, Row, Untrainable, show_value

_NUMBERED = re.compile(
    r"(response|answer|output|completion|candidate|reply|generation|summary|conversation)[ _-]?(\w+)", re.IGNORECASE
)
_SUFFIXES = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"), ("j", "k"))
_LABELS = (
    "better_response_id", "better_response", "better", "preferred_response", "preference", "preferred", "winner", "choice",
    "chosen", "label", "labels",
)  # fmt: skip
_SCORES = ("score", "rating", "reward")
#: Strength and side in one number: below 0 the first response is better (HelpSteer).
_SIGNED = ("preference_strength", "overall_preference")
_TIES = ("tie", "tie (bothbad)", "both", "bothbad", "both_bad", "draw", "equal", "same", "neither", "none")
#: A label as it is compared -> 0 or 1, the better response, or None, a tie.
Sides = dict[str, int | None]


def pair_in(row: Row) -> tuple[str, str] | None:
    """Return the two numbered responses of a row; None where there are none, or more than two."""
    stems: dict[str, dict[str, str]] = {}
    for name in row:
        if match := _NUMBERED.fullmatch(str(name)):
            stems.setdefault(match[1].lower(), {})[match[2]] = name
    for names in stems.values():
        suffixes = [suffix for suffix in names if suffix.isdigit() or len(suffix) == 1]
        pair = next((pair for pair in _SUFFIXES if sorted(pair) == sorted(suffixes)), None)
        if pair:
            return names[pair[0]], names[pair[1]]
    return None


def evidence(row: Row) -> str | None:
    """Return the two responses and the column that compares them."""
    pair = pair_in(row)
    judged = pair and (judge_of(row, pair) or _suffix(pair[0]) == "j")
    if not pair or not judged or not (columns.has_prompt(row) or pair[0].startswith("conversation")):
        return None
    return f"columns {', '.join(pair)}" + (f", compared by {judged}" if isinstance(judged, str) else "")


def judge_of(row: Row, pair: tuple[str, str]) -> str | None:
    """Return the column that says which of a pair is better, or the scores of the first."""
    score = next((f"{name}_{_suffix(pair[0])}" for name in _SCORES if f"{name}_{_suffix(pair[0])}" in row), None)
    label = next((name for name in (*_LABELS, *_SIGNED) if name in row and _is_short(dict(row)[name])), None)
    return label or score


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40)


def _suffix(name: str) -> str:
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    return match[2]


def learn(rows: Sequence[Row]) -> Callable[[Row], Iterable[Record]]:
    """Return the reader of a source whose first rows are these.

    Raises:
        UserError: their labels could mean either response.
    """
    first = next(row for row in rows if evidence(row))
    pair = pair_in(first)
    assert pair is not None
    label = judge_of(first, pair)
    if label in _LABELS:
        labels = {_as_label(row[label]) for row in rows if row.get(label) is not None}
        sides = sides_of(labels, pair, label)
    else:
        sides = {}

    def read(row: Row) -> Iterator[Record]:
        ratings = _ratings(row, pair, label, sides)
        (prompt, one), (other_prompt, other) = (columns.prompt_and_answer(row, name) for name in pair)
        if prompt != other_prompt:
            raise Untrainable("the two responses do not answer the same prompt")
        if one == other:
            raise Untrainable("the two responses are the same")
        yield Record(prompt=prompt, **columns.answers(one, other), ratings=ratings, **columns.about(row))

    return read


def _ratings(row: Row, pair: tuple[str, str], label: str | None, sides: Sides) -> list[float]:
    if label is None:
        return [1.0, 0.0]  # j is better than k by its name
    if label in _LABELS:
        value = row.get(label)
        text = _as_label(value)
        if sides.get(text, text) is None or text in ("", *_TIES):
            raise Untrainable("no preference: a tie")
        if text not in sides:
            problem = f"'{label}' names none of {', '.join(pair)}: {show_value(value)}"
            raise Contradiction(problem) if text.isdigit() else Malformed(problem)
        margin = columns.margin(row)
        return [margin, 0.0] if sides[text] == 0 else [0.0, margin]
    if label in _SIGNED:
        strength = columns.number_in(row, label)
        ratings = [max(-strength, 0.0), max(strength, 0.0)]
    else:
        name = label.rsplit("_", 1)[0]
        ratings = [columns.number_in(row, f"{name}_{_suffix(response)}") for response in pair]
    if ratings[0] == ratings[1]:
        raise Untrainable("no preference: a tie")
    return ratings


class Contradiction(UserError):
    """A label that does not fit the labels of the first rows: their meaning was another."""


def _as_label(value: Any) -> str:
    """Return a label as it is compared: lower case, 1.0 as 1, a bool as true or false."""
    text = str(value).strip().lower() if value is not None else ""
    return text.removesuffix(".0")


def sides_of(labels: set[str], pair: tuple[str, str], column: str) -> Sides:
    """Return which response each label names.

    Raises:
        UserError: the labels fit two readings, or none.
    """
    suffixes = [_suffix(name).lower() for name in pair]
    by_name: Sides = {
        text: side
        for side, (name, suffix) in enumerate(zip(pair, suffixes, strict=True))
        for text in (
            name.lower(),
            suffix,
            f"model_{suffix}",
            f"model {suffix}",
            f"response_{suffix}",
            f"response {suffix}",
        )
    }
    numbers = {label for label in labels if label.lstrip("-").isdigit()}
    names = labels - numbers - {*_TIES, ""}
    if not numbers and names <= by_name.keys():
        return by_name
    if not names and (sides := _sides_of_numbers(numbers, suffixes, column)):
        return sides
    shown = ", ".join(sorted(labels - {""})) or "nothing"
    one, other = pair
    raise UserError(
        f"'{column}' holds {shown}, which does not show whether {one} or {other} is the better one; rename the responses "
        f"after their labels (in data.yaml, columns: {{response_0: {one}, response_1: {other}}}, where label 0 names {one})"
    )


def _sides_of_numbers(numbers: set[str], suffixes: list[str], column: str) -> Sides | None:
    """Return the side that each number names, None where more than one reading is possible.

    Numbers that the columns bear name them (a third number is a tie), unless all of several rows could as well be counted
    from 0. Letters are counted from 0 or 1 where the numbers show it; a bare `label` of letters is 1 for the first in SHP and
    0 for the first elsewhere.
    """
    if suffixes == ["0", "1"]:
        if numbers <= {"0", "1"} or numbers == {"0", "1", "2"}:
            return {"0": 0, "1": 1, "2": None}
        return {"1": 0, "2": 1} if numbers == {"1", "2"} else None
    if suffixes == ["1", "2"]:
        if "2" in numbers and numbers <= {"0", "1", "2"}:
            return {"0": None, "1": 0, "2": 1}
        return {"0": 0, "1": 1} if numbers == {"0", "1"} else None
    if column in ("label", "labels"):
        return None
    if numbers == {"0", "1"}:
        return {"0": 0, "1": 1}
    return {"1": 0, "2": 1} if numbers == {"1", "2"} else None
