"""Conversations: what of them a model still reads, and how they are kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_value
from rlhf.data_prep.formats.rows import Malformed, Messages, Untrainable, check_turns, conversation

FORMAT = 1


def recent(messages: Messages, limit: int, count: Callable[[Messages], int]) -> Messages:
    """The conversation without as many of its oldest turns (a question and its answer) as it takes to come within the limit.

    The system prompt and the last question are always kept, even if they alone are longer.

    Args:
        limit: tokens.
        count: tokens of a conversation.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system) :]
    while count(system + rest) > limit:
        later = [i for i, message in enumerate(rest) if message["role"] == "user" and i > 0]
        if not later:
            break
        rest = rest[later[0] :]
    return system + rest


def save(file: Path, names: Sequence[str], conversations: Sequence[Messages]) -> None:
    """Writes a conversation with each model as JSON, whole or not at all: `{"format": 1, "conversations": [{"model",
    "messages": [{"role", "content"}]}]}`."""
    pairs = zip(names, conversations, strict=True)
    content = {"format": FORMAT, "conversations": [{"model": name, "messages": said} for name, said in pairs]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"cannot save the conversation in {file}: {error.strerror}") from error


def load(file: Path, count: int) -> list[Messages]:
    """`count` conversations out of a file; one that was held with a single model is given to all.

    Raises:
        UserError: no such file, not what `save` writes, or held with another number of models.
    """
    try:
        content = read_value(file)
        saved = [
            conversation(one["messages"], "messages") if one["messages"] else [] for one in content["conversations"]
        ]
        for messages in saved:
            check_turns(messages)
    except OSError as error:
        raise UserError(f"cannot read the conversation {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, Malformed, Untrainable) as error:
        raise UserError(f"{file} is no saved conversation: {error}") from error
    if len(saved) not in (1, count):
        raise UserError(f"{file} was held with {len(saved)} models, now there are {count}; name as many")
    return saved if len(saved) == count else [list(saved[0]) for _ in range(count)]
