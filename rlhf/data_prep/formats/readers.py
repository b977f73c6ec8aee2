"""One small reader for each published shape of feedback: a row in, records out.

A reader is chosen by name, or by asking each in turn for evidence in the first rows: the special ones first, plain columns
last. What a reader does not use of a row is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import (
    Malformed,
    Row,
    Untrainable,
    as_prompt,
    as_response,
    at_last_answer,
    conversation,
    is_transcript,
    prompt_and_answer,
    show_value,
)
from rlhf.data_prep.prepare.recipe import Source


@dataclass(frozen=True)
class Reader:
    """A published shape."""

    about: str
    """What is written like this."""
    needs: tuple[str, ...]
    """Columns that every row has."""
    read: Callable[[Row], Iterable[Record]]
    """Raises `Malformed` or `Untrainable` for a row that it cannot use."""
    evidence: Callable[[Row], str | None]
    """Why a row is taken to be of this shape, or None."""
    gather: str | None = None
    """Column of which neighbouring rows with one value are read together; `read` gets `{"rows": [...]}`."""


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise Malformed(f"'{name}' must be a text, got {show_value(value)}")
    return value


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Malformed(f"'{name}' must be a number, got {show_value(value)}")
    return number


def _name(row: Row, *names: str) -> str | None:
    """The first of the columns that holds something, as text."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), None)


def _user(text: str) -> list[dict[str, str]]:
    return as_prompt([{"role": "user", "content": text}])


def _has(*names: str) -> Callable[[Row], str | None]:
    """Evidence: these columns are there."""
    return lambda row: f"columns {', '.join(names)}" if set(names) <= row.keys() else None


# Preferences


def _hh(row: Row) -> Iterator[Record]:
    prompt, chosen = prompt_and_answer(row, "chosen")
    other_prompt, rejected = prompt_and_answer(row, "rejected")
    if prompt != other_prompt:
        raise Untrainable("chosen and rejected do not answer the same prompt")
    yield Record(prompt=prompt, responses=[chosen[0]["content"], rejected[0]["content"]], ratings=[1.0, 0.0])


def _hh_evidence(row: Row) -> str | None:
    if all(is_transcript(row.get(name)) for name in ("chosen", "rejected")):
        return "chosen and rejected are 'Human: ... Assistant: ...' transcripts"
    return None


def _tldr_prompt(post: Row) -> str:
    """The query of Stiennon et al. 2020 (openai/summarize-from-feedback, tasks.py), without its padding and cuts."""
    return f"SUBREDDIT: r/{_text(post, 'subreddit')}\n\nTITLE: {_text(post, 'title')}\n\nPOST: {_text(post, 'post')}\n\nTL;DR:"


def _tldr_post(row: Row) -> Iterator[Record]:
    answer = " " + _text(row, "summary").strip()
    if not answer.strip():
        raise Untrainable("empty response")
    yield Record(prompt=_user(_tldr_prompt(row)), responses=[answer], document=_name(row, "id"), id=_name(row, "id"))


def _tldr_comparison(row: Row) -> Iterator[Record]:
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Malformed("'info' must be a post and 'summaries' two summaries")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise Malformed(f"'choice' must be 0 or 1, got {show_value(choice)}")
    texts = [" " + _text(summary, "text").strip() for summary in summaries]
    ratings = [float(choice == 0), float(choice == 1)]
    query = f"ARTICLE: {info['article']}\n\nTL;DR:" if info.get("article") else _tldr_prompt(info)
    worker = _name(row, "worker")
    extra = row.get("extra")
    yield Record(
        prompt=_user(query),
        responses=texts,
        ratings=ratings,
        raters=[worker] if worker else [],
        rater_ratings=[[rating] for rating in ratings] if worker else [],
        confidence=_number(extra, "confidence")
        if isinstance(extra, dict) and extra.get("confidence") is not None
        else None,
        document=_name(info, "id"),
    )


def _webgpt(row: Row) -> Iterator[Record]:
    question = row.get("question")
    if not isinstance(question, dict):
        raise Malformed(f"'question' must be an object with full_text, got {show_value(question)}")
    yield Record(
        prompt=_user(_text(question, "full_text")),
        responses=[_text(row, "answer_0"), _text(row, "answer_1")],
        ratings=[_number(row, "score_0"), _number(row, "score_1")],
        document=_name(question, "id"),
    )


def _shp(row: Row) -> Iterator[Record]:
    label = row.get("labels")
    if label not in (0, 1) or isinstance(label, bool):
        raise Malformed(f"'labels' must be 1 (A is preferred) or 0, got {show_value(label)}")
    yield Record(
        prompt=_user(_text(row, "history")),
        responses=[_text(row, "human_ref_A"), _text(row, "human_ref_B")],
        ratings=[float(label == 1), float(label == 0)],
        document=_name(row, "post_id"),
    )


_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def _ultrafeedback(row: Row) -> Iterator[Record]:
    completions = row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise Malformed(f"'completions' must be a list of objects, got {show_value(completions)}")
    rated = [(_text(c, "response"), _aspect_mean(c)) for c in completions]
    kept = [(text, rating) for text, rating in rated if rating is not None and text.strip()]
    if len(kept) < 2:
        raise Untrainable("fewer than two rated responses")
    yield Record(
        prompt=_user(_text(row, "instruction")), responses=[text for text, _ in kept], ratings=[r for _, r in kept]
    )


def _aspect_mean(completion: Row) -> float | None:
    """Mean of the four aspects. Not `overall_score`: it is known to hold 10 for some answers that were rated 1."""
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict):
        raise Malformed(f"'annotations' must be an object, got {show_value(annotations)}")
    values = [(annotations.get(aspect) or {}).get("Rating") for aspect in _ASPECTS]
    numbers = [float(v) for v in values if v is not None and str(v).replace(".", "", 1).isdigit()]  # "N/A" is common
    return sum(numbers) / len(numbers) if numbers else None


def _ultrafeedback_binarized(row: Row) -> Iterator[Record]:
    prompt, chosen = prompt_and_answer(row, "chosen")
    _, rejected = prompt_and_answer(row, "rejected")
    yield Record(
        prompt=prompt,
        responses=[chosen[0]["content"], rejected[0]["content"]],
        ratings=[_number(row, "score_chosen"), _number(row, "score_rejected")],
        document=_name(row, "prompt_id"),
    )


def _pandalm(row: Row) -> Iterator[Record]:
    names = sorted(name for name in row if name.startswith("annotator"))
    verdicts = [row[name] for name in names]
    if not names or not all(v in (0, 1, 2) and not isinstance(v, bool) for v in verdicts):
        raise Malformed(f"annotators' verdicts must be 0 (tie), 1 or 2, got {verdicts}")
    points = {0: (0.5, 0.5), 1: (1.0, 0.0), 2: (0.0, 1.0)}
    matrix: list[list[float | None]] = [[points[v][i] for v in verdicts] for i in (0, 1)]
    yield Record(
        prompt=_instruction(row),
        responses=[_text(row, "response1"), _text(row, "response2")],
        ratings=[sum(points[v][i] for v in verdicts) / len(verdicts) for i in (0, 1)],
        raters=names,
        rater_ratings=matrix,
        id=_name(row, "idx"),
    )


def _instruction(row: Row) -> list[dict[str, str]]:
    extra = _text(row, "input").strip() if row.get("input") else ""
    return _user("\n\n".join(part for part in (_text(row, "instruction").strip(), extra) if part))


# Trees


def _oasst_tree(row: Row) -> Iterator[Record]:
    """Every prompter turn with replies. Two or more ranked siblings are a ranking; a single answer is a demonstration."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise Malformed(f"'prompt' must be the first message of a tree, got {show_value(root)}")
    yield from _oasst_turn(root, [], _name(row, "message_tree_id"))


def _oasst_turn(node: Row, before: list[dict[str, str]], tree: str | None) -> Iterator[Record]:
    path = [*before, {"role": "user", "content": _text(node, "text")}]
    replies = [r for r in node.get("replies") or [] if not r.get("deleted") and r.get("role") == "assistant"]
    ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
    chosen = ranked if len(ranked) > 1 else replies[:1]
    if chosen:
        yield Record(
            prompt=path,
            responses=[_text(r, "text") for r in chosen],
            ratings=[-float(r["rank"]) for r in chosen] if len(ranked) > 1 else None,
            ranked=len(ranked) > 1,
            user=_name(node, "user_id"),
            document=tree,
            id=_name(node, "message_id"),
        )
    for reply in replies:
        said = [*path, {"role": "assistant", "content": _text(reply, "text")}]
        for follow_up in reply.get("replies") or []:
            if not follow_up.get("deleted"):
                yield from _oasst_turn(follow_up, said, tree)


def _oasst_messages(row: Row) -> Iterator[Record]:
    """The flat form: one message a row, `parent_id` the message it answers."""
    nodes = {str(message.get("message_id")): {**message, "replies": []} for message in row["rows"]}
    roots = []
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent is None:
            roots.append(node)
        elif str(parent) in nodes:
            nodes[str(parent)]["replies"].append(node)
        else:
            raise Malformed(f"message {node['message_id']} answers {parent}, which is not among its neighbours")
    for root in roots:
        if not root.get("deleted"):
            yield from _oasst_turn(root, [], _name(root, "message_tree_id"))


# Conversations and instructions


def _alpaca(row: Row) -> Iterator[Record]:
    yield Record(prompt=_instruction(row), responses=[_answer(_text(row, "output"))])


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard"), "assistant"),
    "system": "system",
    "tool": "tool",
}


def _sharegpt(row: Row) -> Iterator[Record]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise Malformed(f"'conversations' must be a list of objects, got {show_value(turns)}")
    unknown = next((t.get("from") for t in turns if t.get("from") not in _SHAREGPT_ROLES), None)
    if unknown is not None:
        raise Malformed(f"'conversations' has a turn from '{unknown}'; known: {', '.join(_SHAREGPT_ROLES)}")
    messages = [{"role": _SHAREGPT_ROLES[t["from"]], "content": _text(t, "value")} for t in turns]
    prompt, answer = at_last_answer(conversation(messages, "conversations"))
    yield Record(prompt=prompt, responses=[answer[0]["content"]], id=_name(row, "id"))


def _messages(row: Row) -> Iterator[Record]:
    """OpenAI's form; content may be a list of parts, of which the texts are taken."""
    turns = row.get("messages")
    if isinstance(turns, list):
        turns = [{**t, "content": _parts(t.get("content"))} if isinstance(t, dict) else t for t in turns]
        turns = [{**t, "role": "system"} if isinstance(t, dict) and t.get("role") == "developer" else t for t in turns]
    prompt, answer = at_last_answer(conversation(turns, "messages"))
    yield Record(prompt=prompt, responses=[answer[0]["content"]], **_about(row))


def _parts(content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(_text(part, "text") for part in content)
    return content


def _answer(text: str) -> str:
    if not text.strip():
        raise Untrainable("empty response")
    return text


# Plain columns


def _about(row: Row) -> dict[str, Any]:
    return {name: _name(row, name) for name in ("id", "user", "document")}


def _columns(row: Row) -> Iterator[Record]:
    """Whatever the columns allow: a ranking, a pair, a rated response, a demonstration, or a prompt."""
    about = _about(row)
    if row.get("responses") is not None:
        yield _ranking(row, about)
    elif row.get("chosen") is not None or row.get("rejected") is not None:
        prompt, chosen = prompt_and_answer(row, "chosen")
        other, rejected = prompt_and_answer(row, "rejected")
        if prompt != other:
            raise Untrainable("chosen and rejected do not answer the same prompt")
        texts, ratings = [chosen[0]["content"], rejected[0]["content"]], [1.0, 0.0]
        rater = _name(row, "rater")
        raters: dict[str, Any] = {"raters": [rater], "rater_ratings": [[1.0], [0.0]]} if rater else {}
        yield Record(prompt=prompt, responses=texts, ratings=ratings, **raters, **about)
    elif row.get("rating") is not None:
        rating, rater = _number(row, "rating"), _name(row, "rater") or "unnamed"
        response = as_response(row.get("response"), "response")[0]["content"]
        yield Record(
            prompt=_with_system(row), responses=[response], raters=[rater], rater_ratings=[[rating]], ratings=[rating],
            **about,
        )  # fmt: skip
    else:
        name = next((n for n in ("completion", "response") if row.get(n) is not None), None)
        responses = [as_response(row[name], name)[0]["content"]] if name else []
        yield Record(prompt=_with_system(row), responses=responses, **about)


def _with_system(row: Row) -> list[dict[str, str]]:
    prompt, system = as_prompt(row.get("prompt")), row.get("system")
    return [{"role": "system", "content": _text(row, "system")}, *prompt] if system else prompt


def _ranking(row: Row, about: dict[str, Any]) -> Record:
    values = row["responses"]
    if not isinstance(values, list):
        raise Malformed(f"'responses' must be a list, got {show_value(values)}")
    responses = [as_response(value, f"responses[{i}]")[0]["content"] for i, value in enumerate(values)]
    name, sign = ("ratings", 1.0) if row.get("ratings") is not None else ("ranks", -1.0)
    numbers = row.get(name)
    if not isinstance(numbers, list):
        raise Malformed(f"'{name}' must be a list of numbers, got {show_value(numbers)}")
    if len(numbers) != len(responses):
        raise Malformed(f"{len(responses)} responses but {len(numbers)} {name}")
    ratings = [sign * _number({name: number}, name) for number in numbers]
    return Record(prompt=_with_system(row), responses=responses, ratings=ratings, ranked=sign < 0, **about)


def _columns_evidence(row: Row) -> str | None:
    if "prompt" not in row and not {"chosen", "rejected"} <= row.keys():
        return None
    used = (
        "prompt",
        "completion",
        "response",
        "rating",
        "rater",
        "chosen",
        "rejected",
        "responses",
        "ratings",
        "ranks",
    )
    return f"columns {', '.join(name for name in used if name in row)}"


READERS: dict[str, Reader] = {
    "hh_rlhf": Reader("Anthropic HH-RLHF: pairs of transcripts", ("chosen", "rejected"), _hh, _hh_evidence),
    "tldr_posts": Reader(
        "OpenAI TL;DR: Reddit posts with their authors' summaries", ("subreddit", "title", "post", "summary"), _tldr_post,
        _has("subreddit", "title", "post", "summary"),
    ),
    "tldr_comparisons": Reader(
        "OpenAI TL;DR: two summaries, a worker's choice and confidence", ("info", "summaries", "choice"), _tldr_comparison,
        _has("info", "summaries", "choice"),
    ),
    "webgpt": Reader(
        "OpenAI WebGPT comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt,
        _has("question", "answer_0", "answer_1", "score_0", "score_1"),
    ),
    "shp": Reader(
        "Stanford SHP: two Reddit comments by their votes", ("history", "human_ref_A", "human_ref_B", "labels"), _shp,
        _has("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "ultrafeedback": Reader(
        "UltraFeedback: completions with four rated aspects", ("instruction", "completions"), _ultrafeedback,
        _has("instruction", "completions"),
    ),
    "ultrafeedback_binarized": Reader(
        "UltraFeedback as pairs with scores", ("chosen", "rejected", "score_chosen", "score_rejected"),
        _ultrafeedback_binarized, _has("chosen", "rejected", "score_chosen", "score_rejected"),
    ),
    "oasst_trees": Reader(
        "OpenAssistant: a tree of messages a row, siblings ranked", ("message_tree_id", "prompt"), _oasst_tree,
        _has("message_tree_id", "tree_state", "prompt"),
    ),
    "oasst_messages": Reader(
        "OpenAssistant: a message a row", ("message_id", "parent_id", "message_tree_id", "text", "role"), _oasst_messages,
        _has("message_id", "parent_id", "message_tree_id", "text", "role"), gather="message_tree_id",
    ),
    "pandalm": Reader(
        "PandaLM: two responses, a verdict of each annotator", ("instruction", "response1", "response2", "annotator1"),
        _pandalm, _has("instruction", "response1", "response2", "annotator1"),
    ),
    "alpaca": Reader("Alpaca: instruction, input, output", ("instruction", "output"), _alpaca, _has("instruction", "output")),
    "sharegpt": Reader("ShareGPT: conversations of from and value", ("conversations",), _sharegpt, _has("conversations")),
    "messages": Reader("OpenAI messages: role and content", ("messages",), _messages, _has("messages")),
    "columns": Reader("plain columns in TRL's names, or mapped to them", (), _columns, _columns_evidence),
}  # fmt: skip


def choose_reader(source: Source, first: Sequence[Any]) -> tuple[str, str]:
    """The reader of a source and the evidence for it.

    Args:
        first: the first rows of the source, columns mapped.

    Raises:
        UserError: no reader of that name, columns that it needs are missing, or none fits.
    """
    rows = [row for row in first if isinstance(row, dict)]
    there = ", ".join(map(str, dict.fromkeys(name for row in rows for name in row))) or "none"
    if source.reader != "auto":
        if source.reader not in READERS:
            near = did_you_mean(source.reader, READERS)
            raise UserError(f"source {source.name}: no reader '{source.reader}'{near}; known: {', '.join(READERS)}")
        needs = READERS[source.reader].needs
        missing = [name for name in needs if rows and not any(name in row for row in rows)]
        if missing:
            raise UserError(
                f"source {source.name}: no column '{missing[0]}', which reader {source.reader} needs; there are: {there}. "
                "Rename with columns: {OURS: THEIRS}, or name another reader"
            )
        return source.reader, "named in the recipe"
    for name, reader in READERS.items():
        found = [evidence for row in rows if (evidence := reader.evidence(row)) is not None]
        if found and 2 * len(found) > len(rows):
            return name, f"{found[0]} ({len(found)} of the first {len(rows)} rows)"
    raise UserError(
        f"source {source.name}: no reader knows rows with the columns {there}; name one with reader: "
        f"({', '.join(READERS)}), or rename columns with columns: {{prompt: THEIRS, completion: THEIRS, ...}}"
    )


def mapped(row: Any, column_map: dict[str, str]) -> Any:
    """The row with our names for columns; `info.id` reaches into an object. Columns that are not named stay.

    Raises:
        Malformed: a column that the map names is not there.
    """
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
    """The records of a row.

    Raises:
        Malformed, Untrainable: with the reason.
    """
    if not isinstance(row, dict):
        raise Malformed(f"must be an object with named columns, got {show_value(row)}")
    missing = next((name for name in reader.needs if name not in row and reader.gather is None), None)
    if missing is not None:
        raise Malformed(f"no column '{missing}'; this row has {', '.join(map(str, row)) or 'none'}")
    records = list(reader.read(row))
    for record in records:
        if any(not response.strip() for response in record.responses):
            raise Untrainable("empty response")
        if len(record.responses) > 1 and len(set(record.responses)) < len(record.responses):
            raise Untrainable("two responses are the same")
    return records
