"""Plain columns, in TRL's names or those of other trainers: one row in, one record out.

A row is a prompt (with its system message, earlier turns and tools) and what is known of answers to it: a pair, a ranking, a
rating, a label, or one answer as it should be. docs/data.md lists the names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import (
    Columns,
    Malformed,
    Messages,
    Row,
    Untrainable,
    as_prompt,
    as_response,
    at_last_answer,
    conversation,
    is_number,
    is_transcript,
    parsed,
    show_value,
    unpacked,
    without_answers,
)
from rlhf.data_prep.ratings import mean_ratings
from rlhf.models.messages import OF_CONVERSATION, PARTS, parts_of, with_parts

#: Names of a column, ours first.
_ANSWERS = ("completion", "response", "output")
_CONVERSATIONS = ("messages", "conversations")
_QUESTIONS = ("instruction", "question", "query", "input")
_PAIRS = (
    ("chosen", "rejected"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
)
_LABELS = ("label", "kto_tag")
#: Labels under names that may mean something else, then those that are true for a bad answer.
_FLAGS = (
    "desirable", "is_desirable", "good", "is_good", "accepted", "thumbs_up", "thumbs", "preferred", "chosen", "feedback",
)  # fmt: skip
_BAD_FLAGS = ("undesirable", "is_undesirable", "bad", "is_bad", "thumbs_down", "rejected")
#: Flags that are texts of another meaning unless they hold a label.
_TEXTS = ("preferred", "chosen", "rejected", "feedback")
_NUMBERED = re.compile(r"(response|answer|output|completion)[ _-]?(\d+|[a-z])", re.IGNORECASE)
#: Columns that compare answers under names which no reader knows.
_VERDICTS = ("better", "winner", "preference", "preferred_response", "overall_preference")
_TRUE = ("true", "1", "1.0", "good", "desirable", "thumbs_up", "👍")
_FALSE = ("false", "0", "0.0", "bad", "undesirable", "thumbs_down", "👎")
#: Further values of flags; as a `label` they would more often answer another question.
_YES, _NO = ("yes", "up", "accepted"), ("no", "down", "rejected")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_EVIDENCE = (
    "prompt", "completion", "response", "rating", "rater", "chosen", "rejected", "responses", "ratings", "ranks",
    "rater_ratings", "messages",
)  # fmt: skip


def columns_evidence(row: Row) -> str | None:
    """Return the plain columns of a row, or None: it has neither a prompt, nor a pair, nor messages, nor an answered question."""
    asked = any(row.get(name) is not None for name in (*_QUESTIONS, *_CONVERSATIONS))
    answered = any(row.get(name) is not None for name in _ANSWERS)
    pair = next((pair for pair in _PAIRS if set(pair) <= row.keys()), ())
    if not {"prompt", "messages"} & row.keys() and not pair and not (asked and answered):
        return None
    named = (*_EVIDENCE, *_QUESTIONS, *_CONVERSATIONS, *_ANSWERS, *pair, *_LABELS)
    return f"columns {', '.join(name for name in dict.fromkeys(named) if name in row)}"


def messages_evidence(row: Row) -> str | None:
    """Return evidence that the messages are all there is to read: no answers stand beside them."""
    others = ("completion", "response", "responses", *(name for pair in _PAIRS for name in pair))
    alone = row.get("messages") is not None and all(row.get(name) is None for name in others)
    return "columns messages" if alone else None


def read_columns(row: Row) -> Iterator[Record]:
    """Yield the record that the columns allow: a ranking, a pair, a rated or labelled answer, an answer, or a prompt."""
    _check_usable(row)
    answer = _first(row, _ANSWERS)
    if _first(row, ("responses",)):
        yield _ranking(row)
    elif _first(row, [name for pair in _PAIRS for name in pair if not isinstance(dict(row).get(name), bool)]):
        yield from read_pair(row)
    elif answer != "completion" and _first(row, ("rating",)):
        yield _rated_response(row, answer or "response")
    elif answer:
        prompt = prompt_of(row)
        yield Record(prompt=prompt, **answers(_reasoned(row, answer)), **_judged(row), **about(row))
    else:
        yield _conversation(row)


def _reasoned(row: Row, answer: str) -> Messages:
    """Return an answer with the reasoning that stands beside it."""
    (message,) = as_response(row[answer], answer)
    name = _first(row, ("reasoning_content", "thinking"))
    if name is None or not text_in(row, name).strip():
        return [message]
    return [with_parts(message, {**parts_of(message), "reasoning_content": row[name]})]


def _check_usable(row: Row) -> None:
    plain = dict(row)
    media = next((name for name in _MEDIA if plain.get(name)), None)
    if media:
        raise Untrainable(f"'{media}', which no stage can use")
    if isinstance(plain.get("completions"), list) and isinstance(plain.get("labels"), list):
        raise Malformed("'completions' with 'labels', one for each step (stepwise supervision), trains no stage here")
    several = [name for name in plain if _NUMBERED.fullmatch(name)]
    if len(several) > 2 and any(plain.get(name) is not None for name in _LABELS):
        raise Malformed(
            f"a label beside {len(several)} numbered answers: give them as 'responses' with 'ratings' or 'ranks'"
        )
    verdict = next((name for name in plain if name.startswith(_VERDICTS) and plain[name] is not None), None)
    if verdict:
        raise Malformed(
            f"'{verdict}' compares answers that are not known by their names; rename them, in data.yaml, to response_0 and "
            "response_1 after its labels (or rename it, if it means something else)"
        )


def _conversation(row: Row) -> Record:
    """Return the last answer of a conversation with all turns before it, or, without an answer, the turns as a prompt."""
    name = _first(row, _CONVERSATIONS)
    if name is None or _first(row, ("prompt",)):
        return Record(prompt=_in_context(as_prompt(row.get("prompt")), row), **about(row))
    messages = conversation(row[name], name)
    if not any(message["role"] == "assistant" for message in messages):
        return Record(prompt=_in_context(messages, row), **about(row))
    prompt, answer = at_last_answer(messages)
    if messages[-1]["role"] != "assistant" and isinstance(row, Columns):
        row.left_out.add(f"turns of {name} after the last answer")
    return Record(prompt=_in_context(prompt, row), **answers(answer), **_judged(row), **about(row))


# Pairs


def read_pair(row: Row) -> Iterator[Record]:
    """Yield the comparison of `chosen` and `rejected`, rated apart by `margin`, or by 1 where there is none."""
    names = next(pair for pair in _PAIRS if _first(row, pair))
    if names[0] == "chosen_response" and not _first(row, names[:1]):  # ms-swift: beside the answer itself
        names = (_first(row, (*_ANSWERS, *_CONVERSATIONS)) or names[0], names[1])
    missing = next((name for name in names if row.get(name) is None), None)
    if missing:
        raise Malformed(f"no '{missing}' for a pair; this row has {', '.join(row)}")
    (prompt, chosen), (other_prompt, rejected) = (prompt_and_answer(row, name) for name in names)
    if prompt != other_prompt:
        raise Untrainable("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise Untrainable("chosen and rejected are the same")
    rater, ratings = name_in(row, "rater"), [margin(row), 0.0]
    raters: dict[str, Any] = {"raters": [rater], "rater_ratings": [[r] for r in ratings]} if rater else {}
    yield Record(prompt=prompt, **answers(chosen, rejected), ratings=ratings, **raters, **about(row))


def margin(row: Row) -> float:
    """Return by how much the better answer of a row is rated above the other: its `margin`, or 1."""
    margin = 1.0 if row.get("margin") in (None, "") else number_in(row, "margin", finite=False)
    if not (math.isfinite(margin) and margin > 0):
        raise Untrainable("a margin that is not above 0 and finite")
    return margin


def prompt_and_answer(row: Row, column: str) -> tuple[Messages, Messages]:
    """Return prompt and answer of a preference: an answer beside its prompt, or a conversation that includes the prompt."""
    value = unpacked(row.get(column))
    if isinstance(value, str) and not is_transcript(value):
        if not has_prompt(row):
            raise Malformed(f"'{column}' is an answer without its prompt; add a 'prompt' column")
        # transcripts have a blank between "Assistant:" and the answer
        return prompt_of(row), as_response(value.strip() if is_transcript(row.get("prompt")) else value, column)
    messages = conversation(value, column)
    if messages[-1]["role"] != "assistant":
        raise Untrainable("the conversation does not end with an answer")
    if messages[0]["role"] == "assistant":
        return at_last_answer([*prompt_of(row), *messages])
    prompt, answer = at_last_answer(messages)
    if isinstance(row.get("prompt"), list) or (row.get("prompt") is None and _first(row, _CONVERSATIONS)):
        prompt = _longer(prompt, _turns_of(row), column)
    return _in_context(prompt, row), answer


def _longer(own: Messages, beside: Messages, column: str) -> Messages:
    """Return the turns before an answer: its own, or those of the conversation beside it, of which its own are the end."""
    turns, others = ([message for message in of if message["role"] != "system"] for of in (own, beside))
    if others[-len(turns) :] == turns:
        return beside if len(beside) > len(own) else own
    if turns[: len(others)] != others and others[: len(turns)] != turns:
        raise Untrainable(f"'{column}' does not belong to the conversation beside it")
    return own


# Prompts


def prompt_of(row: Row) -> Messages:
    """Return the prompt of a row with its system message, its earlier turns and the tools that it may call."""
    return _in_context(_turns_of(row), row)


def has_prompt(row: Row) -> bool:
    """Return True for a row with a question, or a conversation, to answer."""
    return _first(row, ("prompt", *_QUESTIONS, *_CONVERSATIONS)) is not None


def _turns_of(row: Row) -> Messages:
    """Return the turns of the prompt: those of `prompt`, of an instruction with its input, or of a conversation."""
    if _first(row, ("prompt",)) and not (_first(row, ("instruction",)) and _first(row, ("output",))):
        return as_prompt(row["prompt"])
    name = _first(row, _QUESTIONS)
    conversation_name = _first(row, _CONVERSATIONS)
    if name is None or (name == "input" and conversation_name is not None):
        if conversation_name is None:
            return as_prompt(row.get("prompt"))
        return without_answers(conversation(row[conversation_name], conversation_name))
    if isinstance(row[name], dict):  # OpenAI's preferences: {"input": {"messages": [...]}}
        return prompt_of(row[name])
    more = next((n for n in ("input", "context") if n != name and row.get(n)), None)
    texts = [text_in(row, each).strip() for each in (name, more) if each]
    return [{"role": "user", "content": "\n\n".join(text for text in texts if text)}]


def _in_context(turns: Messages, row: Row) -> Messages:
    """Return the turns after the row's system message and history, with its tools and arguments of the template."""
    system, turns = (turns[:1], turns[1:]) if turns and turns[0]["role"] == "system" else ([], turns)
    name = next((name for name in ("system", "system_prompt") if row.get(name)), None)
    if name and isinstance(row[name], list):  # parts, as Anthropic writes them
        own = conversation([{"role": "system", "content": row[name]}], name)
    else:
        own = [{"role": "system", "content": text_in(row, name)}] if name else []
    if own and system and system[0]["content"] != own[0]["content"]:
        raise Malformed(f"'{name}' and the system message of the conversation differ")
    system = system or own
    prompt = [*system, *_history(row), *turns]
    parts = {name: value for name in OF_CONVERSATION if (value := _of_conversation(row, name))}
    return [with_parts(prompt[0], {**parts_of(prompt[0]), **parts}), *prompt[1:]] if parts and prompt else prompt


def _history(row: Row) -> Messages:
    """Return the earlier turns: pairs of a question and its answer, or messages."""
    history = row.get("history")
    if isinstance(history, str) and history.startswith("["):
        history = parsed(history, "history")
    if not history:
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return conversation(history, "history")
    pairs = [tuple(turn) if isinstance(turn, list) else () for turn in history] if isinstance(history, list) else [()]
    if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise Malformed(f"'history' must be a list of [question, answer] or of messages, got {show_value(history)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _of_conversation(row: Row, name: str) -> Any:
    """Return the tools of a row, or its arguments of the template; JSON in a text is read."""
    value = row.get(name) or (row.get("functions") if name == "tools" else None)
    if isinstance(value, str):
        value = parsed(value, name) if value.strip() else None
    if not value:
        return None
    if name != "tools":
        if not isinstance(value, dict) or value.keys() & {"tokenize", "add_generation_prompt", "chat_template"}:
            raise Malformed(f"'{name}' must be an object of the template's own arguments, got {show_value(value)}")
        return {key: argument for key, argument in value.items() if argument is not None}
    tools = value if isinstance(value, list) else [value]
    tools = [parsed(tool, name) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Malformed(f"'tools' must be a list of functions, got {show_value(value)}")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in map(_without_nulls, tools)
    ]


def _without_nulls(value: Any) -> Any:
    """Return the value without nulls in objects: Arrow writes one for each name that another row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


# Ratings and labels


def _judged(row: Row) -> dict[str, Any]:
    """Return the label of an answer (good or bad) as fields of a record; none where the row has no label.

    Raises:
        Malformed: a label that is neither true nor false.
        Untrainable: the label is missing.
    """
    names = [name for name in _LABELS if name in row] or [*_FLAGS, *_BAD_FLAGS]
    labels = {name: label for name in names if (label := _label(row, name)) is not None}
    if not labels:
        return {}
    if len(set(labels.values())) > 1:
        raise Untrainable(f"{' and '.join(map(repr, labels))} contradict each other")
    rating = float(next(iter(labels.values())))
    rater = name_in(row, "rater") or "label"
    return {"raters": [rater], "rater_ratings": [[rating]], "ratings": [rating], "labelled": True}


def _label(row: Row, name: str) -> bool | None:
    """Return whether a column calls the answer good; None where a flag is empty, or a text of another meaning."""
    value = dict(row).get(name)
    label, is_flag = str(value).strip().lower(), name not in _LABELS
    if label in ("none", ""):
        if is_flag:
            return None
        raise Untrainable(f"no '{name}', which says whether the answer is good")
    good, bad = (_TRUE + _YES, _FALSE + _NO) if is_flag else (_TRUE, _FALSE)
    if label not in good + bad:
        if name in _TEXTS:
            return None
        raise Malformed(
            f"'{name}' beside an answer must be true or false (a good or a bad answer), got {show_value(value)}; if "
            f"it means something else, rename the column (in data.yaml, columns: {{topic: {name}}})"
        )
    row.get(name)  # is read
    return (label in good) != (name in _BAD_FLAGS)


def _rated_response(row: Row, answer: str) -> Record:
    rating, rater = number_in(row, "rating"), name_in(row, "rater") or "unnamed"
    judged: dict[str, Any] = {"raters": [rater], "rater_ratings": [[rating]], "ratings": [rating]}
    return Record(prompt=prompt_of(row), **answers(as_response(row.get(answer), answer)), **judged, **about(row))


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
    responses = answers(*(as_response(value, f"responses[{i}]") for i, value in enumerate(values)))
    return Record(prompt=prompt_of(row), **responses, **judged, **about(row))


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


def answers(*messages: Messages) -> dict[str, Any]:
    """Return answers as fields of a record: their texts, and their parts where one has any."""
    parts = [answer[0].get(PARTS) or "" for answer in messages]
    return {"responses": [answer[0]["content"] for answer in messages], "parts": parts if any(parts) else []}


def _first(row: Row, names: Sequence[str]) -> str | None:
    """Return the first of the columns that is there and not null."""
    plain = dict(row)  # looking is not reading
    return next((name for name in names if plain.get(name) is not None), None)


def about(row: Row) -> dict[str, Any]:
    """Return the fields of a record that splits and limits go by."""
    return {name: name_in(row, name) for name in ("id", "user", "document")}


def text_in(row: Row, name: str) -> str:
    """Return the text in a column; raises `Malformed`."""
    value = row.get(name)
    if not isinstance(value, str):
        raise Malformed(f"'{name}' must be a text, got {show_value(value)}")
    return value


def number_in(row: Row, name: str, *, finite: bool = True) -> float:
    """Return the number in a column, also one that is written as text; raises `Malformed`, as for one that is not finite."""
    value = row.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = None
    if isinstance(value, bool) or number is None or (finite and not math.isfinite(number)):
        raise Malformed(f"'{name}' must be a number, got {show_value(value)}")
    return number


def name_in(row: Row, name: str) -> str | None:
    """Return the value in a column as text, None where it is empty."""
    return None if row.get(name) in (None, "") else str(row[name])
