"""Records as the rows of a stage: one function a kind, for data that a stage reads without `rlhf data`.

| kind | columns | made of |
|---|---|---|
| demonstrations | `prompt`, `completion` | an answer without ratings, or the best of several |
| comparisons | `prompt`, `responses`, `ratings` | responses that are rated, not all the same |
| prompts | `prompt` | any record |

Texts are lists of messages. Other columns of a row are kept beside these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal

from rlhf.base.text_files import HALF_PAIR
from rlhf.data_prep.formats.columns import numbers_in, present, rater_ratings
from rlhf.data_prep.formats.readers import Reader
from rlhf.data_prep.formats.records import DEMONSTRATION, Record
from rlhf.data_prep.formats.rows import Row, Untrainable

Kind = Literal["demonstrations", "comparisons", "prompts"]

_ANSWERS = ("completion", "chosen", "rejected", "responses", "ratings", "ranks")
#: Columns of raw rows that a kind is made of, so that they are not kept beside it.
_MADE_OF: dict[Kind, tuple[str, ...]] = {
    "demonstrations": ("messages", *_ANSWERS),
    "comparisons": ("chosen", "rejected", "responses", "ratings", "ranks", "margin"),
    "prompts": ("messages",),
}


#: Reasons to leave out answers with labels.
BAD_LABEL = "labelled false: a bad answer is no demonstration"
ALONE = "labelled, and no other answer to its prompt to compare it with"


class NotOfKind(Exception):
    """Raised for a record that has nothing of a kind: no answer, or no ratings."""


def check_unicode(*values: Any) -> None:
    """Raise `Untrainable` for values with half of a surrogate pair in a text, which no tokenizer or table takes."""
    if HALF_PAIR.search(json.dumps(values, ensure_ascii=False, default=str)):
        raise Untrainable("holds half of a surrogate pair; the step encoding would replace it")


def stage_row(kind: Kind, record: Record, raw: Row, reader: Reader) -> Row:
    """Return the row of a stage.

    Args:
        raw: the row that the record was read from, for its other columns.

    Raises:
        NotOfKind: the record has no answer or no ratings, and the kind needs them.
        Untrainable: the stage can learn nothing from it.
        Malformed: another column of wrong type.
    """
    used = {"prompt", *_MADE_OF[kind], *reader.needs}
    if kind == "prompts" and raw.get("prompt") is None and raw.get("messages") is None:
        used |= {"chosen", "rejected"}  # conversations that hold the prompt
    others = {name: value for name, value in raw.items() if name not in used}
    check_unicode(record.prompt, record.responses, record.parts, others)
    return {"prompt": record.prompt, **_STAGES[kind](record, raw, others)}


def _demonstration(record: Record, raw: Row, others: Row) -> Row:
    if record.best is None and (raw.get("messages") or raw.get("conversations")) is not None:
        raise Untrainable("no assistant turn")
    if record.best is None:
        raise NotOfKind
    if not record.serves & DEMONSTRATION:
        raise Untrainable(BAD_LABEL if record.labelled else "no response is rated above another")
    return {"completion": record.answer(record.best_place), **others}


def _comparison(record: Record, raw: Row, others: Row) -> Row:
    if record.ratings is None:
        raise NotOfKind
    count = len(record.responses)
    if count < 2:
        raise Untrainable(ALONE if record.labelled else "fewer than two responses")
    ratings = record.ratings
    if raw.get("rater_ratings"):
        lists = rater_ratings(raw, count)
        others["rater_ratings"] = [present(own) for own in lists]
        if raw.get("ratings") is None and raw.get("ranks") is None:
            others |= _halves(lists)
            ratings = [_mean(own) for own in others["rater_ratings"]]
    elif "rater_ratings" in raw:
        others["rater_ratings"] = None
    held_out = numbers_in(others, "ratings_held_out", count) if others.get("ratings_held_out") is not None else []
    # Not finite where no rater is held out: no pair of them is ordered.
    if len(set(ratings)) == 1 and len(set(filter(math.isfinite, held_out))) < 2:
        raise Untrainable("all responses are rated the same")
    return {"responses": [record.answer(place) for place in range(count)], "ratings": ratings, **others}


def _halves(lists: list[list[float | None]]) -> Row:
    """Return columns of raters at even places, which are trained on, and of those at odd places, which are held out.

    A rater who has the same place in every row is in one half only.
    """
    trained_on, held_out = ([present(own[half::2]) for own in lists] for half in (0, 1))
    if not all([*trained_on, *held_out]):
        raise Untrainable("a response without a rating in one half of the raters")
    means = [_mean(own) for own in held_out]
    return {"rater_ratings": trained_on, "ratings_held_out": means, "rater_ratings_held_out": held_out}


def _prompt(record: Record, raw: Row, others: Row) -> Row:
    return others


_STAGES: dict[Kind, Callable[[Record, Row, Row], dict[str, Any]]] = {
    "demonstrations": _demonstration,
    "comparisons": _comparison,
    "prompts": _prompt,
}


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
