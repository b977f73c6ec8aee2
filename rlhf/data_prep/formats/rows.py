"""Prompts and answers as messages, from any of the usual forms, and the key by which prompts are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.base.errors import did_you_mean

Row = dict[str, Any]
Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPACE = re.compile(r"\s+")


class Untrainable(Exception):
    """Raised for a well-formed row that nothing can be learned from; its text is the reason under which it is counted."""


class Malformed(Exception):
    """Raised for a row of a wrong type or form; its text names the slip."""


def comparable(text: str) -> str:
    """Return a text as it is compared: Unicode NFKC, without case, runs of white space as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _SPACE.sub(" ", text.casefold()).strip()


def prompt_key(prompt: Sequence[Mapping[str, str]]) -> str:
    """Return the text by which prompts are compared everywhere: in splits, leaks, overlaps and report cards.

    Prompts that differ only in case, white space, the width of letters or in roles have one key.
    """
    return comparable("\n".join(message["content"] for message in prompt))


def prompt_and_answer(row: Row, column: str) -> tuple[Messages, Messages]:
    """Return prompt and answer of a preference: an answer beside `prompt`, or a conversation that includes its prompt."""
    value, prompt = row.get(column), row.get("prompt")
    if isinstance(value, str) and not is_transcript(value):
        if prompt is None:
            raise Malformed(f"'{column}' is an answer without its prompt; add a 'prompt' column")
        # transcripts have a blank between "Assistant:" and the answer
        return as_prompt(prompt), as_response(value.strip() if is_transcript(prompt) else value, column)
    messages = conversation(value, column)
    if messages[0]["role"] == "assistant" and prompt is not None:
        messages = as_prompt(prompt) + messages
    if messages[-1]["role"] != "assistant":
        raise Untrainable("the conversation does not end with an answer")
    return at_last_answer(messages)


def at_last_answer(messages: Messages) -> tuple[Messages, Messages]:
    """Return the turns before the last assistant turn, and that turn; later ones are left out."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise Untrainable("no assistant turn")
    return _checked_prompt(messages[:last]), _checked_response([messages[last]])


def as_prompt(value: Any, name: str = "prompt") -> Messages:
    """Return a prompt as messages, without answers after it."""
    if isinstance(value, str) and not is_transcript(value):
        return _checked_prompt([{"role": "user", "content": value}])
    messages = conversation(value, name)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return _checked_prompt(messages)


def as_response(value: Any, name: str) -> Messages:
    """Return an answer, a text or one assistant message, as a list of one message."""
    if isinstance(value, str):
        return _checked_response([{"role": "assistant", "content": value}])
    messages = conversation(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Malformed(
            f"'{name}' must be a string or one assistant message, got roles {[m['role'] for m in messages]}"
        )
    return _checked_response(messages)


def _checked_prompt(messages: Messages) -> Messages:
    if not any(message["role"] != "system" and message["content"].strip() for message in messages):
        raise Untrainable("empty prompt")
    return messages


def _checked_response(messages: Messages) -> Messages:
    if not messages[0]["content"].strip():
        raise Untrainable("empty response")
    return messages


def conversation(value: Any, name: str) -> Messages:
    """Return the roles and texts of a transcript or a list of messages; raises `Malformed` for other values."""
    if isinstance(value, str) and is_transcript(value):
        return transcript(value)
    if not isinstance(value, list):
        raise Malformed(f"'{name}' must be a string or a list of {{role, content}} messages, got {show_value(value)}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise Malformed(
                f"'{name}' must hold messages with the texts 'role' and 'content', got {show_value(message)}"
            )
        if message["role"] not in ROLES:
            near = did_you_mean(message["role"], ROLES)
            raise Malformed(f"'{name}' has a message of role '{message['role']}'{near}; known: {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages:
        raise Untrainable("empty conversation")
    return messages


def is_transcript(value: Any) -> bool:
    """Return True for a text written as in Anthropic/hh-rlhf."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def transcript(text: str) -> Messages:
    r"""Return the messages of `\n\nHuman: ...\n\nAssistant: ...`."""
    parts = _TURN.split("\n\n" + text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def check_turns(messages: Sequence[dict[str, str]]) -> None:
    """Raise `Malformed` for a conversation whose turns are out of order.

    At most one system message comes first, then user and assistant in turn, the user first; tool results follow an
    assistant turn and are followed by one.
    """
    previous = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        allowed = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "tool": ("assistant", "tool")}
        expected = allowed.get(previous, ("user", "tool"))
        if role not in expected:
            raise Malformed(f"roles out of order: turn {number} is of '{role}', expected '{expected[0]}'")
        previous = role


def is_number(value: Any) -> bool:
    """Return True for a number or None, but not for a bool."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def show_value(value: Any) -> str:
    """Return type and beginning of a value, for error messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
