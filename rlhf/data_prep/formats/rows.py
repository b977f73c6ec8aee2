"""Prompts and answers as messages, from any of the usual forms, and the key by which prompts are compared."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.base.errors import did_you_mean
from rlhf.base.json_files import decode
from rlhf.models.messages import PARTS, REASONING, parts_of, with_parts

Row = dict[str, Any]
Messages = list[dict[str, str]]

#: Roles by their names in the formats of other trainers.
_ROLE_OF = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
#: Turns whose text is a call in JSON.
_CALL_ROLES = ("function_call", "tool_call")
TEXT_KEYS = ("content", "value", "parts")
#: Keys of a message, beside role and text, that the template is given.
KEPT_PARTS = (PARTS, "tool_calls", "function_call", *REASONING, "tool_call_id", "name")
#: Keys of an answer that say whether it is trained: OpenAI's, LLaMA-Factory's, Axolotl's, ms-swift's.
TRAINED_FLAGS = ("weight", "loss_weight", "train", "training", "loss")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPACE = re.compile(r"\s+")

_MESSAGE_KEYS = {"role", "from", *TEXT_KEYS, *KEPT_PARTS, *TRAINED_FLAGS}


class Columns(Row):
    """A row that notes which of its columns are read: the others are named as not used."""

    def __init__(self, row: Mapping[str, Any], used: set[str] | None = None) -> None:
        super().__init__(row)
        self.used = set[str]() if used is None else used
        self.left_out = set[str]()
        """Names of parts that a reader left out, for people."""

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        """Return a column, noted as read."""
        self.used.add(name)
        return super().get(name, default)

    def unused(self) -> set[str]:
        """Return the columns that hold something and were not read, keys of messages as `messages.KEY`."""
        rest = {name for name, value in self.items() if name not in self.used and value not in (None, "", [], {})}
        return (
            rest
            | self.left_out
            | {f"{name}.{key}" for name in self.used & self.keys() for key in _unread_keys(dict(self)[name])}
        )


def _unread_keys(value: Any) -> set[str]:
    """Return the keys of messages that are not read."""
    turns = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    return {
        key
        for turn in filter(is_message, turns)
        for key, part in turn.items()
        if key not in _MESSAGE_KEYS and part is not None
    }


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
    return comparable("\n".join(message["content"] + (message.get(PARTS) or "") for message in prompt))


def at_last_answer(messages: Messages) -> tuple[Messages, Messages]:
    """Return the turns before the last assistant turn, and that turn; later ones are left out."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise Untrainable("no assistant turn")
    return _checked_prompt(messages[:last]), _checked_response([messages[last]])


def as_prompt(value: Any, name: str = "prompt") -> Messages:
    """Return a prompt as messages, without answers after it."""
    value = unpacked(value)
    if isinstance(value, str) and not is_transcript(value):
        return _checked_prompt([{"role": "user", "content": value}])
    return without_answers(conversation(value, name))


def without_answers(messages: Messages) -> Messages:
    """Return the messages less the answers after the last turn of the user."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return _checked_prompt(messages)


def as_response(value: Any, name: str) -> Messages:
    """Return an answer, a text or one assistant message, as a list of one message."""
    value = unpacked(value)
    if isinstance(value, str):
        return _checked_response([{"role": "assistant", "content": value}])
    messages = conversation(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Malformed(
            f"'{name}' must be a string or one assistant message, got roles {[m['role'] for m in messages]}"
        )
    return _checked_response(messages)


def _checked_prompt(messages: Messages) -> Messages:
    if not any(message["role"] != "system" and not is_blank(message["content"]) for message in messages):
        raise Untrainable("empty prompt")
    return messages


def _checked_response(messages: Messages) -> Messages:
    if is_blank(messages[0]["content"]) and not parts_of(messages[0]):
        raise Untrainable("empty response")
    return messages


def conversation(value: Any, name: str) -> Messages:
    """Return the messages of a transcript, of a list of messages in OpenAI's or ShareGPT's keys, or of one message.

    Tool calls and reasoning stay with their messages, as `rlhf.models.messages` holds them. Turns after the last answer that
    may be trained (`weight`, `train` and the like say which) are left out.

    Raises:
        Malformed: another value.
        Untrainable: no message, no answer that may be trained, or parts that no stage can use.
    """
    if isinstance(value, str) and is_transcript(value):
        return transcript(value)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parsed(value, name)
    turns = [value] if isinstance(value, dict) else value
    if name == "conversations" and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):  # LIMA
        roles = itertools.cycle(("user", "assistant"))
        turns = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    if not isinstance(turns, list):
        raise Malformed(f"'{name}' must be a string or a list of {{role, content}} messages, got {show_value(value)}")
    messages = [_message(turn, name) for turn in turns]
    if not messages:
        raise Untrainable("empty conversation")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in answers if _is_trained(turns[i])]
    if answers and not trained:
        raise Untrainable("no answer whose weight is above 0")
    if answers and trained[-1] != answers[-1]:
        messages = messages[: trained[-1] + 1]
    return messages


def _message(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Malformed(f"'{name}' must hold messages with the texts 'role' and 'content', got {show_value(turn)}")
    theirs = turn.get("role") or turn.get("from")
    role = _ROLE_OF.get(theirs) if isinstance(theirs, str) else None
    parts = {key: turn[key] for key in KEPT_PARTS if turn.get(key)}
    content = next((turn[key] for key in TEXT_KEYS if turn.get(key) is not None), None)
    if role is None and isinstance(theirs, str):
        near = did_you_mean(theirs, _ROLE_OF)
        raise Malformed(f"'{name}' has a message of role '{theirs}'{near}; known: {', '.join(_ROLE_OF)}")
    if isinstance(content, list):
        content = _joined(content, parts)
    if theirs in _CALL_ROLES and isinstance(content, str):
        parts["tool_calls"], content = parsed(content, theirs), ""
    if parts.get("function_call"):
        parts["tool_calls"] = parts.pop("function_call")
    if content is None and parts.get("tool_calls"):
        content = ""
    if role is None or not isinstance(content, str):
        raise Malformed(f"'{name}' must hold messages with the texts 'role' and 'content', got {show_value(turn)}")
    return with_parts({"role": role, "content": content}, _as_template_parts(parts))


def _as_template_parts(parts: Row) -> Row:
    """Return parts under the names that templates know; arguments of calls as objects, which OpenAI writes as texts."""
    parts = {**parsed(parts.pop(PARTS), PARTS), **parts} if PARTS in parts else parts
    reasoning = [parts.pop(key) for key in REASONING if key in parts]
    if reasoning:
        parts["reasoning_content"] = reasoning[0]
    if calls := parts.get("tool_calls"):
        parts["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return parts


def _call(call: Any) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f"a tool call must be an object with a function's name, got {show_value(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parsed(arguments, "arguments")
    about = {"id": call["id"]} if call.get("id") else {}
    return {**about, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def is_message(value: Any) -> bool:
    """Return True for an object with a role."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def unpacked(value: Any) -> Any:
    """Return the messages that a text holds as JSON, another value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        messages = decode(value)
    except ValueError:
        return value
    turns = messages if isinstance(messages, list) else [messages]
    readable = [
        is_message(turn) and (turn.get("role") or turn.get("from")) in _ROLE_OF and bool(turn.keys() & {*TEXT_KEYS})
        for turn in turns
    ]
    return messages if readable and all(readable) else value


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: white space, control characters and the invisible ones of Unicode's class Cf."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def parsed(text: Any, name: str) -> Any:
    """Return the value of a JSON text; raises `Malformed`."""
    try:
        return decode(text)
    except (TypeError, ValueError):
        raise Malformed(f"'{name}' must be JSON, got {show_value(text)}") from None


def _joined(content: list[Any], parts: Row) -> str:
    """Return the texts of a list of parts; reasoning and calls among them are added to `parts`."""
    texts = []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "?"
        value = part.get(kind, part.get("value")) if isinstance(part, dict) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in REASONING and isinstance(value, str):
            parts["reasoning"] = value
        elif kind == "tool_call" and isinstance(value, str):
            parts["tool_calls"] = [*parts.get("tool_calls", []), parsed(value, kind)]
        else:
            raise Untrainable(f"a message with a part of type '{kind}', which no stage can use")
    return "".join(texts)


def _is_trained(turn: Row) -> bool:
    flags = {key: turn[key] for key in TRAINED_FLAGS if turn.get(key) is not None}
    if any(flag not in (0, 1) for flag in flags.values()):
        raise Malformed(f"a message's weight must be 0 or 1, got {show_value(flags)}")
    return all(flags.values())


def is_transcript(value: Any) -> bool:
    """Return True for a text written as in Anthropic/hh-rlhf, or a prompt of this form after a text for the system."""
    if not isinstance(value, str):
        return False
    return value.lstrip().startswith("Human:") or ("\n\nHuman:" in value and value.rstrip().endswith("\n\nAssistant:"))


def transcript(text: str) -> Messages:
    r"""Return the messages of `\n\nHuman: ...\n\nAssistant: ...`."""
    preamble, *parts = _TURN.split("\n\n" + text.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    system = [{"role": "system", "content": preamble.strip()}] if preamble.strip() else []
    return system + [
        {"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]


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
