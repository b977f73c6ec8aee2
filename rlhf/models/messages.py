"""Parts of a message beyond role and content: tool calls, reasoning, and the tools that a conversation may call.

They travel as JSON in one text of the message (`parts_json`), so that messages stay tables of texts in Arrow and Parquet.
What belongs to the whole conversation (`tools`, `chat_template_kwargs`) stands in the first message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PARTS = "parts_json"
#: Parts that belong to the conversation: arguments of the chat template.
OF_CONVERSATION = ("tools", "chat_template_kwargs")
#: Names under which templates look for the reasoning before an answer.
REASONING = ("reasoning_content", "reasoning", "thinking")


def parts_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a message beyond role and content."""
    return json.loads(message[PARTS]) if message.get(PARTS) else {}


def with_parts(message: Mapping[str, str], parts: Mapping[str, Any]) -> dict[str, str]:
    """Return the message with these parts in place of its own."""
    plain = {key: message[key] for key in ("role", "content")}
    return {**plain, PARTS: json.dumps(parts, sort_keys=True, ensure_ascii=False)} if parts else plain


def template_arguments(
    messages: Sequence[Mapping[str, Any]], *, calls_as_text: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and further arguments of `apply_chat_template`.

    Args:
        calls_as_text: write the arguments of tool calls as JSON texts, which some templates join to other texts.
    """
    written, arguments = [], dict[str, Any]()
    for message in messages:
        parts = parts_of(message)
        for name in OF_CONVERSATION:
            if name in parts:
                value = parts.pop(name)
                arguments |= value if name == "chat_template_kwargs" else {name: value}
        reasoning = parts.pop("reasoning_content", None)
        names = dict.fromkeys(REASONING, reasoning) if reasoning else {}
        for call in parts.get("tool_calls", []) if calls_as_text else []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        written.append({"role": message["role"], "content": message["content"], **parts, **names})
    return written, arguments


def map_texts(parts: str, change: Callable[[str], str]) -> str:
    """Return parts, as JSON, with each text in them changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(part) for key, part in value.items()}
        if isinstance(value, list):
            return [changed(part) for part in value]
        return change(value) if isinstance(value, str) else value

    return json.dumps(changed(json.loads(parts)), sort_keys=True, ensure_ascii=False) if parts else parts
