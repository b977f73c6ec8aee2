"""Conversations cut to a model's context, and saved in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_value
from rlhf.base.storage import write_text
from rlhf.data_prep.formats.rows import Malformed, Messages, Untrainable, check_turns, conversation

FORMAT = 1


def recent(messages: Messages, limit: int, count: Callable[[Messages], int]) -> Messages:
    """Return the conversation without its oldest turns (a question and its answer), so that it fits the limit.

    The system prompt and the last question always stay, even if they alone are longer.

    Args:
        limit: tokens.
        count: returns the tokens of a conversation.
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
    """Write a conversation with each model as JSON, whole or not at all.

    Its form is `{"format": 1, "conversations": [{"model", "messages": [{"role", "content"}]}]}`.
    """
    pairs = zip(names, conversations, strict=True)
    content = {"format": FORMAT, "conversations": [{"model": name, "messages": messages} for name, messages in pairs]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot save the conversation in {file}: {error.strerror}") from error


def load(file: Path, count: int) -> list[Messages]:
    """Return the conversations in a file, one for each of `count` models; a single one is copied for all.

    Raises:
        UserError: no such file, one that `save` did not write, or one with another number of models.
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
        raise UserError(f"{file} is not a saved conversation: {error}") from error
    if len(saved) not in (1, count):
        raise UserError(f"{file} was held with {len(saved)} models, now there are {count}; name as many")
    return saved if len(saved) == count else [list(saved[0]) for _ in range(count)]
