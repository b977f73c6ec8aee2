"""Text to tokens and back, in one way for all stages: padding, stop token, chat template.

The pad token differs from the stop token, and a response ends in one stop token. Prompt and response are rendered by the
chat template and tokenised *apart*, as in sampling: no token spans the border, so PPO scores the tokens that SFT and the
reward model were trained on.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import decode
from rlhf.models.messages import parts_of, template_arguments, with_parts

Message = Mapping[str, str]

#: Templates for models without one, or whose own adds an unwanted system prompt.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # For models pretrained here: their vocabulary has no tokens for turns, so words mark them.
    "dialogue": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    # For base models: contents follow each other, with the stop token after the answer (TL;DR style).
    "plain": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
#: Ends a document in pretraining, and a response in later stages.
END_OF_TEXT = "<|endoftext|>"
#: Rows of a data set whose encoding a stage checks before it trains.
CHECKED_ROWS = 8
_PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
)
#: Parts of a message that an answer depends on; others, such as the id of a call, templates may leave out.
_NEEDED_PARTS = ("tools", "tool_calls", "reasoning_content")


class TemplateRefusal(UserError):
    """The chat template cannot write a conversation, or a part of it; the text is the reason under which it is counted."""


def load_tokenizer(
    folder: str, *, chat_template: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token of its own, a chat template and padding on the left.

    Args:
        folder: local folder or hub name.
        chat_template: name in `TEMPLATES`, path of a Jinja file, or None for the tokenizer's own.

    Raises:
        UserError: there is no tokenizer, or it lacks a stop token, a chat template or a spare token for padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at '{folder}': {str(error).splitlines()[0]}") from error
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of '{folder}' has no chat template; give one of {sorted(TEMPLATES)} with --chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{folder}' has no stop token (eos_token); set one in its tokenizer_config.json"
        )
    _set_pad_token(tokenizer, folder)
    tokenizer.padding_side = "left"
    return tokenizer


def template_text(name: str) -> str:
    """Return the Jinja text of a template's name in `TEMPLATES` or of a file."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise UserError(
        f"no chat template '{name}'{did_you_mean(name, TEMPLATES)}: give a file or one of {sorted(TEMPLATES)}"
    )


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Make pad a token of its own, out of the vocabulary, so that embeddings need not grow.

    Padding with the stop token is the classic silent bug: a mask made from `token != pad` then drops the stop token, and a
    sequence classifier reads its score one token too early.
    """
    stops = set(stop_token_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stops:
        return
    vocabulary = tokenizer.get_vocab()
    for candidate in (*_PAD_CANDIDATES, tokenizer.unk_token):
        if candidate in vocabulary and vocabulary[candidate] not in stops:
            tokenizer.pad_token = candidate
            return
    raise UserError(
        f"the tokenizer of '{folder}' pads with its stop token and has no spare special token; add a pad_token to it"
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that end a response."""
    return [int(tokenizer.eos_token_id)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Return token ids of a prompt, up to and including the header of the answer."""
    return tokenizer(_render(tokenizer, prompt, answer_header=True), add_special_tokens=False)["input_ids"]


def encode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: Sequence[Message]
) -> list[int]:
    """Return token ids of an answer as the policy should produce it, ending in exactly one stop token.

    Text that the template writes after the stop token (often a line break) belongs to the next turn and is left out.

    Raises:
        UserError: the template writes the prompt differently when an answer follows.
    """
    head = _render(tokenizer, prompt, answer_header=True)
    whole = _render(tokenizer, [*prompt, *response], answer_header=False)
    if not whole.startswith(head):
        raise UserError(
            "the chat template writes the prompt differently when an answer follows; give another --chat_template"
        )
    tail = whole[len(head) :]
    stop = str(tokenizer.eos_token)
    tail = tail[: tail.rindex(stop)] if stop in tail else tail
    while (bare := tail.rstrip()).endswith(stop):  # data that was exported with its end marker
        tail = bare.removesuffix(stop)
    return [*tokenizer(tail, add_special_tokens=False)["input_ids"], int(tokenizer.eos_token_id)]


def check_written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Raise `TemplateRefusal` where the chat template cannot write a conversation with all its parts.

    A part is written if the text changes without it. Templates may leave out the reasoning of earlier turns: it has to be
    written where its turn is the last.
    """
    _render(tokenizer, messages, answer_header=messages[-1]["role"] != "assistant")
    for number, message in enumerate(messages, start=1):
        parts = parts_of(message)
        for name in parts.keys() & set(_NEEDED_PARTS):
            bare = with_parts(message, {key: value for key, value in parts.items() if key != name})
            end = number if name == "reasoning_content" else len(messages)
            texts = [
                _render(tokenizer, [*messages[: number - 1], each, *messages[number:end]], answer_header=False)
                for each in (message, bare)
            ]
            if texts[0] == texts[1]:
                raise TemplateRefusal(f"the chat template does not write '{name}'")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_header: bool) -> str:
    written, arguments = template_arguments(messages)
    try:
        return str(
            tokenizer.apply_chat_template(written, add_generation_prompt=answer_header, tokenize=False, **arguments)
        )
    except (TemplateError, TypeError) as error:  # roles or parts that it refuses, or an error in it
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateRefusal(
            f"the chat template cannot write a conversation of {roles}: {error}; leave these out, or give another --chat_template"
        ) from error


def decode_response(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer, without special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def last_user_text(prompt: Sequence[Message]) -> str:
    """Return the last message of the user, by which tables show a prompt."""
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return hashes of vocabulary (with merges and special tokens) and chat template, which all stages must share."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = decode(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(content, dict):  # settings of the last call, not of the tokenizer
        content = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    vocabulary = json.dumps([content, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return {
        "tokenizer_hash": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template_hash": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def check_encoding(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Return token ids of a prompt and its answer, checked as a person would.

    Raises:
        UserError: the prompt begins with two BOS tokens, the answer does not end in its only stop token, or its tokens do
            not decode to it.
    """
    head, tail = encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, response)
    bos, stops = tokenizer.bos_token_id, set(stop_token_ids(tokenizer))
    if bos is not None and bos not in stops and head[:2] == [bos, bos]:
        raise UserError(
            "the prompt begins with two BOS tokens: the chat template writes one, and the text holds another"
        )
    ends = [token for token in tail if token in stops]
    if len(ends) != 1 or tail[-1] != ends[0]:
        raise UserError(
            f"the answer must end in one stop token and hold no other; it holds {len(ends)}: {_show(tokenizer, tail)}"
        )
    answer = "".join(message["content"] for message in response)
    while answer.rstrip().endswith(str(tokenizer.eos_token)):
        answer = answer.rstrip().removesuffix(str(tokenizer.eos_token))
    decoded = str(tokenizer.decode(tail[:-1], skip_special_tokens=False))
    if _bare(answer) not in _bare(decoded):
        raise UserError(
            f"the trained tokens read {decoded[:80]!r}, which is not the answer {answer[:80]!r}: the chat template changes it, "
            "or the tokenizer cannot write it; give another --chat_template or tokenizer"
        )
    return head, tail


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[Sequence[Message], Sequence[Message]]]) -> None:
    """Run `check_encoding` on the first few (prompt, answer) of a data set: a wrong template shows in every row."""
    for prompt, answer in islice(rows, CHECKED_ROWS):
        check_encoding(tokenizer, prompt, answer)


def _bare(text: str) -> str:
    """Strip a text of what templates and tokenizers may change: white space, and compatible forms of a character."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _show(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(tokens)))
    return repr(text if len(text) <= 80 else text[:77] + "...")
