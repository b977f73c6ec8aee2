"""Published shapes of feedback: a function for each that turns a row, as published, into records.

All raise `Malformed` or `Untrainable` for a row that they cannot use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from rlhf.data_prep.formats.columns import (
    answers,
    name_in,
    number_in,
    prompt_and_answer,
    prompt_of,
    read_columns,
    text_in,
)
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import (
    Columns,
    Malformed,
    Messages,
    Row,
    Untrainable,
    parsed,
    show_value,
)


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


# Preferences


def _tldr_prompt(post: Row) -> str:
    """Return the query of Stiennon et al. 2020 (openai/summarize-from-feedback, tasks.py), without its padding and cuts."""
    subreddit, title, text = (text_in(post, name) for name in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {text}\n\nTL;DR:"


def tldr_post(row: Row) -> Iterator[Record]:
    """Yield a Reddit post with its author's summary."""
    summary, post = " " + text_in(row, "summary").strip(), name_in(row, "id")
    yield Record(prompt=_user(_tldr_prompt(row)), responses=[summary], document=post, id=post)


def tldr_comparison(row: Row) -> Iterator[Record]:
    """Yield two summaries of a post or an article, one of them chosen by a worker."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Malformed("'info' must be a post and 'summaries' two summaries")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise Malformed(f"'choice' must be 0 or 1, got {show_value(choice)}")
    texts = [" " + text_in(summary, "text").strip() for summary in summaries]
    ratings = [float(choice == 0), float(choice == 1)]
    query = f"ARTICLE: {info['article']}\n\nTL;DR:" if info.get("article") else _tldr_prompt(info)
    worker, extra = name_in(row, "worker"), row.get("extra")
    rates_confidence = isinstance(extra, dict) and extra.get("confidence") is not None
    yield Record(
        prompt=_user(query),
        responses=texts,
        ratings=ratings,
        raters=[worker] if worker else [],
        rater_ratings=[[rating] for rating in ratings] if worker else [],
        confidence=number_in(row["extra"], "confidence") if rates_confidence else None,
        document=name_in(info, "id"),
    )


def webgpt(row: Row) -> Iterator[Record]:
    """Yield two answers to a question with their scores."""
    question = row.get("question")
    if not isinstance(question, dict):
        raise Malformed(f"'question' must be an object with full_text, got {show_value(question)}")
    yield Record(
        prompt=_user(text_in(question, "full_text")),
        responses=[text_in(row, "answer_0"), text_in(row, "answer_1")],
        ratings=[number_in(row, "score_0"), number_in(row, "score_1")],
        document=name_in(question, "id"),
    )


def arena(row: Row) -> Iterator[Record]:
    """Yield the answers of two models to the last of several prompts, with one of three columns that marks the vote."""
    votes = [number_in(row, name) for name in ("winner_model_a", "winner_model_b", "winner_tie") if name in row]
    if sorted(votes)[-2:] != [0, 1]:
        raise Malformed(f"one of the columns winner_* must be 1 and the others 0, got {votes}")
    if votes[:2] == [0, 0]:
        raise Untrainable("no preference: a tie")
    prompts, *sides = (_texts(row, name) for name in ("prompt", "response_a", "response_b"))
    if any(len(side) != len(prompts) for side in sides):
        raise Malformed("'prompt', 'response_a' and 'response_b' must hold as many texts")
    if sides[0][:-1] != sides[1][:-1]:
        raise Untrainable("the two responses do not answer the same prompt")
    turns = [
        [*_user(text), {"role": "assistant", "content": answer}] for text, answer in zip(prompts, sides[0], strict=True)
    ]
    prompt = [turn for pair in turns for turn in pair][:-1]
    yield Record(prompt=prompt, responses=[side[-1] for side in sides], ratings=votes[:2], id=name_in(row, "id"))


def _texts(row: Row, name: str) -> list[str]:
    """Return the texts of a column, which may stand as JSON in a text."""
    value = row.get(name)
    with suppress(Malformed):
        value = parsed(value, name) if isinstance(value, str) and value.startswith("[") else value
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and None in texts:
        raise Untrainable("empty response")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Malformed(f"'{name}' must be a text or a list of texts, got {show_value(value)}")
    return texts


def shp(row: Row) -> Iterator[Record]:
    """Yield two comments on a post, one of them preferred by votes."""
    label = row.get("labels")
    if label not in (0, 1) or isinstance(label, bool):
        raise Malformed(f"'labels' must be 1 (A is preferred) or 0, got {show_value(label)}")
    yield Record(
        prompt=_user(text_in(row, "history")),
        responses=[text_in(row, "human_ref_A"), text_in(row, "human_ref_B")],
        ratings=[float(label == 1), float(label == 0)],
        document=name_in(row, "post_id"),
    )


_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def ultrafeedback(row: Row) -> Iterator[Record]:
    """Yield the completions that have a rating, the mean of their aspects."""
    completions = row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise Malformed(f"'completions' must be a list of objects, got {show_value(completions)}")
    means = [(text_in(c, "response"), _aspect_mean(c)) for c in completions]
    rated = [(text, rating) for text, rating in means if rating is not None and text.strip()]
    if len(rated) < 2:
        raise Untrainable("fewer than two rated responses")
    texts, ratings = [text for text, _ in rated], [rating for _, rating in rated]
    yield Record(prompt=_user(text_in(row, "instruction")), responses=texts, ratings=ratings)


def _aspect_mean(completion: Row) -> float | None:
    """Return the mean of the four aspects, None where none is rated."""
    # Not overall_score: it holds 10 for some answers that were rated 1.
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict):
        raise Malformed(f"'annotations' must be an object, got {show_value(annotations)}")
    values = [(annotations.get(aspect) or {}).get("Rating") for aspect in _ASPECTS]
    numbers = [float(v) for v in values if v is not None and str(v).replace(".", "", 1).isdigit()]  # "N/A" is common
    return sum(numbers) / len(numbers) if numbers else None


def ultrafeedback_binarized(row: Row) -> Iterator[Record]:
    """Yield the better and a worse completion with their scores."""
    prompt, chosen = prompt_and_answer(row, "chosen")
    _, rejected = prompt_and_answer(row, "rejected")
    yield Record(
        prompt=prompt,
        **answers(chosen, rejected),
        ratings=[number_in(row, "score_chosen"), number_in(row, "score_rejected")],
        document=name_in(row, "prompt_id"),
    )


def pandalm(row: Row) -> Iterator[Record]:
    """Yield two responses with the verdict of each annotator; a tie is half a point for both."""
    names = sorted(name for name in row if name.startswith("annotator"))
    verdicts = [row[name] for name in names]
    if not names or not all(v in (0, 1, 2) and not isinstance(v, bool) for v in verdicts):
        raise Malformed(f"annotators' verdicts must be 0 (tie), 1 or 2, got {verdicts}")
    points = {0: (0.5, 0.5), 1: (1.0, 0.0), 2: (0.0, 1.0)}
    matrix: list[list[float | None]] = [[points[v][i] for v in verdicts] for i in (0, 1)]
    yield Record(
        prompt=prompt_of(row),
        responses=[text_in(row, "response1"), text_in(row, "response2")],
        ratings=[sum(points[v][i] for v in verdicts) / len(verdicts) for i in (0, 1)],
        raters=names,
        rater_ratings=matrix,
        id=name_in(row, "idx"),
    )


# Trees


def oasst_tree(row: Row) -> Iterator[Record]:
    """Yield every prompter turn with its replies: a ranking of ranked siblings, else a demonstration of the first."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise Malformed(f"'prompt' must be the first message of a tree, got {show_value(root)}")
    yield from _oasst_turn(root, [], name_in(row, "message_tree_id"))


def _oasst_turn(node: Row, history: Messages, tree: str | None) -> Iterator[Record]:
    path = [*history, *_user(text_in(node, "text"))]
    replies = [r for r in node.get("replies") or [] if not r.get("deleted") and r.get("role") == "assistant"]
    ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
    chosen = ranked if len(ranked) > 1 else replies[:1]
    if chosen:
        yield Record(
            prompt=path,
            responses=[text_in(r, "text") for r in chosen],
            ratings=[-float(r["rank"]) for r in chosen] if len(ranked) > 1 else None,
            ranked=len(ranked) > 1,
            user=name_in(node, "user_id"),
            document=tree,
            id=name_in(node, "message_id"),
        )
    for reply in replies:
        answered = [*path, {"role": "assistant", "content": text_in(reply, "text")}]
        for follow_up in reply.get("replies") or []:
            if not follow_up.get("deleted"):
                yield from _oasst_turn(follow_up, answered, tree)


def _node(message: Row) -> Row:
    node = Columns(message, message.used if isinstance(message, Columns) else None)
    node["replies"] = []
    return node


def oasst_messages(row: Row) -> Iterator[Record]:
    """Yield the records of trees whose messages are rows; `parent_id` names the message that one answers."""
    nodes = {str(message.get("message_id")): _node(message) for message in row["rows"]}
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
            yield from _oasst_turn(root, [], name_in(root, "message_tree_id"))


# Rankings and ratings


def nectar(row: Row) -> Iterator[Record]:
    """Yield the answers to a prompt with their ranks."""
    ranked = row["answers"]
    if not isinstance(ranked, list) or not all(isinstance(answer, dict) for answer in ranked):
        raise Malformed(f"'answers' must be a list of objects with answer and rank, got {show_value(ranked)}")
    yield Record(
        prompt=prompt_of(row),
        responses=[text_in(answer, "answer").strip() for answer in ranked],
        ratings=[-number_in(answer, "rank") for answer in ranked],
        ranked=True,
    )


def helpsteer(row: Row) -> Iterator[Record]:
    """Yield a response with its helpfulness; all of a prompt are put together."""
    rating = number_in(row, "helpfulness")
    yield Record(
        prompt=prompt_of(row),
        responses=[text_in(row, "response")],
        ratings=[rating],
        raters=["helpfulness"],
        rater_ratings=[[rating]],
    )


def alpaca(row: Row) -> Iterator[Record]:
    """Yield an instruction, its input below it, and the output; a label or a worse answer beside it counts."""
    text_in(row, "output")
    yield from read_columns(row)
