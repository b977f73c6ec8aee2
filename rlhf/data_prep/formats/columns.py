"""Plain columns, in TRL's names or mapped to them: one row in, one record out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import (
    Malformed,
    Messages,
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
from rlhf.data_prep.ratings import mean_ratings

_COLUMNS = (
    "prompt", "completion", "response", "rating", "rater", "chosen", "rejected", "responses", "ratings", "ranks",
    "rater_ratings", "messages",
)  # fmt: skip


def columns_evidence(row: Row) -> str | None:
    """Return the plain columns of a row, or None: it has neither a prompt, nor a pair, nor messages."""
    if not {"prompt", "messages"} & row.keys() and not {"chosen", "rejected"} <= row.keys():
        return None
    return f"columns {', '.join(name for name in _COLUMNS if name in row)}"


def messages_evidence(row: Row) -> str | None:
    """Return evidence that the messages are all there is to read: no answers stand beside them."""
    others = ("completion", "response", "responses", "chosen", "rejected")
    alone = row.get("messages") is not None and all(row.get(name) is None for name in others)
    return "columns messages" if alone else None


def read_columns(row: Row) -> Iterator[Record]:
    """Yield the record that the columns allow: a ranking, a pair, a rated response, a demonstration, or a prompt."""
    answer = next((name for name in ("completion", "response") if row.get(name) is not None), None)
    if row.get("responses") is not None:
        yield _ranking(row)
    elif row.get("chosen") is not None or row.get("rejected") is not None:
        yield from read_pair(row)
    elif row.get("rating") is not None and answer != "completion":
        yield _rated_response(row)
    elif answer:
        yield Record(prompt=_prompt(row), responses=[_response(row[answer], answer)], **_about(row))
    elif row.get("messages") is not None:
        yield from read_messages(row)
    else:
        yield Record(prompt=_prompt(row), **_about(row))


def read_pair(row: Row) -> Iterator[Record]:
    """Yield the comparison of `chosen` and `rejected`, rated apart by `margin`, or by 1 where there is none."""
    missing = next((name for name in ("chosen", "rejected") if row.get(name) is None), None)
    if missing:
        raise Malformed(f"no '{missing}' for a pair; this row has {', '.join(row)}")
    prompt, chosen = prompt_and_answer(row, "chosen")
    other_prompt, rejected = prompt_and_answer(row, "rejected")
    if prompt != other_prompt:
        raise Untrainable("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise Untrainable("chosen and rejected are the same")
    texts, ratings = [chosen[0]["content"], rejected[0]["content"]], [_margin(row), 0.0]
    rater = name_in(row, "rater")
    raters: dict[str, Any] = {"raters": [rater], "rater_ratings": [[r] for r in ratings]} if rater else {}
    yield Record(prompt=_with_system(prompt, row), responses=texts, ratings=ratings, **raters, **_about(row))


def _margin(row: Row) -> float:
    margin = row.get("margin")
    if not is_number(margin):
        raise Malformed(f"'margin' must be a number, got {show_value(margin)}")
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise Untrainable("a margin that is not above 0 and finite")
    return 1.0 if margin is None else float(margin)


def read_messages(row: Row) -> Iterator[Record]:
    """Yield the last answer of `messages` with all turns before it, or, without an answer, the turns as a prompt.

    OpenAI's form: content may be a list of parts, of which the texts are taken, and `developer` is a system message.
    """
    turns = row.get("messages")
    if isinstance(turns, list):
        turns = [_plain_turn(turn) if isinstance(turn, dict) else turn for turn in turns]
    messages = conversation(turns, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        yield Record(prompt=_with_system(messages, row), **_about(row))
        return
    prompt, answer = at_last_answer(messages)
    yield Record(prompt=_with_system(prompt, row), responses=[answer[0]["content"]], **_about(row))


def _plain_turn(turn: Row) -> Row:
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(text_in(part, "text") for part in content)
    return {**turn, "content": content, "role": "system" if turn.get("role") == "developer" else turn.get("role")}


def _rated_response(row: Row) -> Record:
    rating, rater = number_in(row, "rating"), name_in(row, "rater") or "unnamed"
    response = _response(row.get("response"), "response")
    judged: dict[str, Any] = {"raters": [rater], "rater_ratings": [[rating]], "ratings": [rating]}
    return Record(prompt=_prompt(row), responses=[response], **judged, **_about(row))


def _ranking(row: Row) -> Record:
    values = row["responses"]
    if not isinstance(values, list):
        raise Malformed(f"'responses' must be a list, got {show_value(values)}")
    name = next((name for name in ("ratings", "ranks", "rater_ratings") if row.get(name) is not None), None)
    if name is None:
        raise Malformed("it has 'responses', but no 'ratings', 'ranks' or 'rater_ratings'")
    if name == "rater_ratings":
        judged = _rated_by_several(row, len(values))
    else:
        sign = -1.0 if name == "ranks" else 1.0
        judged = {"ratings": [sign * number for number in numbers_in(row, name, len(values))], "ranked": sign < 0}
        if not all(map(math.isfinite, judged["ratings"])):
            raise Untrainable(f"{name} that are missing or not finite")
    responses = [_response(value, f"responses[{i}]") for i, value in enumerate(values)]
    return Record(prompt=_prompt(row), responses=responses, **judged, **_about(row))


def _rated_by_several(row: Row, count: int) -> dict[str, Any]:
    """Return fields of a record: raters by name, or by their place in the lists, and the means of their ratings."""
    lists = rater_ratings(row, count)
    most = max(map(len, lists))
    matrix = [[*ratings, *[None] * (most - len(ratings))] for ratings in lists]
    names = row.get("raters")
    if not isinstance(names, list) or len(names) != most:
        names = [f"rater {number}" for number in range(1, most + 1)]
    return {"raters": list(map(str, names)), "rater_ratings": matrix, "ratings": mean_ratings(matrix)}


def rater_ratings(row: Row, count: int) -> list[list[float | None]]:
    """Return the column `rater_ratings`: for each of `count` responses the numbers of its raters, None where one gave none.

    Raises:
        Malformed: another shape.
        Untrainable: a number is not finite, or a response has none.
    """
    lists = row["rater_ratings"]
    if not isinstance(lists, list) or not all(
        isinstance(ratings, list) and all(is_number(rating) for rating in ratings) for ratings in lists
    ):
        raise Malformed(f"'rater_ratings' must be a list of numbers for each response, got {show_value(lists)}")
    if len(lists) != count:
        raise Malformed(f"{count} responses but {len(lists)} lists of rater_ratings")
    numbers = [present(ratings) for ratings in lists]
    if not all(own and all(map(math.isfinite, own)) for own in numbers):
        raise Untrainable("rater_ratings that are missing or not finite")
    return lists


def present(ratings: Sequence[float | None]) -> list[float]:
    """Return the ratings that are not None, as floats."""
    return [float(rating) for rating in ratings if rating is not None]


def numbers_in(row: Row, name: str, count: int) -> list[float]:
    """Return a column's number for each of `count` responses, NaN where it has none; raises `Malformed`."""
    numbers = row.get(name)
    if not isinstance(numbers, list) or not all(map(is_number, numbers)):
        raise Malformed(f"'{name}' must be a list of numbers, got {show_value(numbers)}")
    if len(numbers) != count:
        raise Malformed(f"{count} responses but {len(numbers)} {name}")
    return [math.nan if number is None else number for number in numbers]


def _prompt(row: Row) -> Messages:
    return _with_system(as_prompt(row.get("prompt")), row)


def _with_system(prompt: Messages, row: Row) -> Messages:
    return [{"role": "system", "content": text_in(row, "system")}, *prompt] if row.get("system") else prompt


def _response(value: Any, name: str) -> str:
    return as_response(value, name)[0]["content"]


def _about(row: Row) -> dict[str, Any]:
    return {name: name_in(row, name) for name in ("id", "user", "document")}


def text_in(row: Row, name: str) -> str:
    """Return the text in a column; raises `Malformed`."""
    value = row.get(name)
    if not isinstance(value, str):
        raise Malformed(f"'{name}' must be a text, got {show_value(value)}")
    return value


def number_in(row: Row, name: str) -> float:
    """Return the finite number in a column, also one that is written as text; raises `Malformed`."""
    value = row.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Malformed(f"'{name}' must be a number, got {show_value(value)}")
    return number


def name_in(row: Row, name: str) -> str | None:
    """Return the value in a column as text, None where it is empty."""
    return None if row.get(name) in (None, "") else str(row[name])
