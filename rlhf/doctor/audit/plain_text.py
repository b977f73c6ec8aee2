"""Prompts and answers as tokens, written plainly: the tokenizer's chat template, and nothing of `rlhf.models`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]

IGNORED = -100
"""Label of a token without a loss."""
_PARTS = "parts_json"
"""Part of a message that holds further ones as JSON."""


def render_prompt(tokenizer: Any, prompt: Messages) -> list[int]:
    """Return the tokens of a prompt, with the header of the answer at its end; nothing is cut."""
    return _tokens(tokenizer, _text(tokenizer, prompt, header=True))


def render_pair(tokenizer: Any, prompt: Messages, answer: Messages) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of its answer, which ends in one stop token.

    What the template writes after the stop token belongs to the next turn. Both are made into tokens by themselves, as where
    the answer is sampled.

    Raises:
        ValueError: with the answer, the template writes the prompt in another way.
    """
    head, whole, stop = _text(tokenizer, prompt, header=True), _text(tokenizer, [*prompt, *answer]), tokenizer.eos_token
    if not whole.startswith(head):
        raise ValueError("the chat template writes the prompt in another way where an answer follows")
    text = whole[len(head) :]
    text = text[: text.rindex(stop)] if stop in text else text
    while text.rstrip().endswith(stop):  # the data had the stop token, too
        text = text.rstrip().removesuffix(stop)
    return _tokens(tokenizer, head), [*_tokens(tokenizer, text), int(tokenizer.eos_token_id)]


def labels_of(prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Return the labels of a row: the answer's own tokens, and no loss on the prompt."""
    return [IGNORED] * len(prompt) + list(answer)


def decode_answer(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of an answer without special tokens and the white space around it."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _text(tokenizer: Any, messages: Messages, *, header: bool = False) -> str:
    written, arguments = [], dict[str, Any]()
    for message in messages:
        parts = json.loads(message.get(_PARTS) or "{}")
        if "tools" in parts:
            arguments["tools"] = parts.pop("tools")
        arguments |= parts.pop("chat_template_kwargs", {})
        if reasoning := parts.pop("reasoning_content", None):
            parts |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning)
        written.append({"role": message["role"], "content": message["content"], **parts})
    return str(tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=header, **arguments))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
