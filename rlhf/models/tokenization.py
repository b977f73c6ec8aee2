"""Text to tokens and back, in one way for all stages: padding, stop token, chat template.

The pad token differs from the stop token, and a response ends in one stop token. Prompt and response are rendered by the
chat template and tokenised *apart*, as in sampling: no token spans the border, so PPO scores the tokens that SFT and the
reward model were trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from itertools import islice
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.base.json_files import decode
from rlhf.models.messages import parts_of, template_arguments, with_parts
from rlhf.models.template_trial import try_templates
from rlhf.models.templates import TEMPLATES, template_text, with_date, writes_date, writing_bos

Message = Mapping[str, str]

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
#: What a model may write itself before an answer: marks, as `<think>`, and names in them, as `to=user<|message|>`.
_OWN_MARKS = re.compile(r"(\s*[\w=]*<[^<>]*>)*\s*")
_END_OF_THINKING = "</think>"
#: Stands in for a text, to see what the template writes around it.
_PROBE = "\u2460text\u2461"


class TemplateRefusal(UserError):
    """The chat template cannot write a conversation, or a part of it; the text is the reason under which it is counted."""


class TemplateChange(UserError):
    """The chat template writes another text than a conversation has."""


def load_tokenizer(
    folder: str,
    *,
    chat_template: str | None = None,
    untrained: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token of its own, a chat template and padding on the left.

    Args:
        folder: local folder or hub name.
        chat_template: name in `TEMPLATES`, path of a Jinja file, or None for the tokenizer's own.
        untrained: no stage has been trained with the tokenizer yet, so its own template may be mended, too.

    Raises:
        UserError: there is no tokenizer, it lacks a stop token, a chat template or a spare token for padding, or the
            template cannot be parsed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at '{folder}': {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is not None:
        try_templates(_templates(tokenizer).values(), f"'{folder}'")
    own_writes_bos = tokenizer.chat_template is not None and _writes_one_bos(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
        try_templates([tokenizer.chat_template], chat_template)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of '{folder}' has no chat template; give one of {sorted(TEMPLATES)} with --chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{folder}' has no stop token (eos_token); set one in its tokenizer_config.json"
        )
    _check_syntax(tokenizer, chat_template or f"of '{folder}'")
    if chat_template is not None or untrained:
        _change_template(tokenizer, lambda text: text.removeprefix("\ufeff"))
        if (own_writes_bos or _adds_bos(tokenizer)) and not _writes_bos(tokenizer):
            _change_template(tokenizer, writing_bos)
    _set_pad_token(tokenizer, folder)
    tokenizer.padding_side = "left"
    return tokenizer


def freeze_date(tokenizer: PreTrainedTokenizerBase, day: date) -> bool:
    """Make a template that writes today's date write this day from now on; return whether it writes dates."""
    if not any(map(writes_date, _templates(tokenizer).values())):
        return False
    _change_template(tokenizer, lambda text: with_date(text, day) if writes_date(text) else text)
    return True


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the templates by name; a tokenizer may have one for tools beside its default."""
    template: Any = tokenizer.chat_template
    return dict(template) if isinstance(template, dict) else {"default": str(template)}


def _change_template(tokenizer: PreTrainedTokenizerBase, change: Callable[[str], str]) -> None:
    changed = {name: change(text) for name, text in _templates(tokenizer).items()}
    tokenizer.chat_template = changed if isinstance(tokenizer.chat_template, dict) else changed["default"]  # type: ignore[assignment]


def _check_syntax(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for text in _templates(tokenizer).values():
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=text, tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template {name} has an error in line {error.lineno}: {error.message}") from error
        except Exception:  # a conversation that it refuses; rows are checked one by one
            continue


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself begins texts with its BOS token."""
    plain = tokenizer("a", add_special_tokens=False)[
        "input_ids"
    ]  # may be the BOS token, where that is an unknown one's
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *plain]


def _writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template begins with the BOS token."""
    bos = tokenizer.bos_token
    try:
        text = _render(tokenizer, [{"role": "user", "content": _PROBE}], answer_header=True)
    except TemplateRefusal:
        return False
    return bos is not None and text.lstrip().startswith(bos)


def _writes_one_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template begins with a BOS token that does not stand before each turn, as some marks do."""
    turns = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user")]
    try:
        text = _render(tokenizer, turns, answer_header=True)
    except TemplateRefusal:
        return False
    return _writes_bos(tokenizer) and text.count(str(tokenizer.bos_token)) == 1


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
        TemplateChange: the template writes the prompt differently when an answer follows.
    """
    tail = _tail(tokenizer, _render(tokenizer, prompt, answer_header=True), prompt, response)
    stop = str(tokenizer.eos_token)
    tail = _without_stops(tail[: tail.rindex(stop)] if stop in tail else tail, stop)
    return [*tokenizer(tail, add_special_tokens=False)["input_ids"], int(tokenizer.eos_token_id)]


def _tail(tokenizer: PreTrainedTokenizerBase, head: str, prompt: Sequence[Message], response: Sequence[Message]) -> str:
    """Return what the template writes after the prompt's text, where an answer follows."""
    whole = _render(tokenizer, [*prompt, *response], answer_header=False)
    if not whole.startswith(head):
        same = next(i for i in range(len(head)) if head[i] != whole[i : i + 1])
        raise TemplateChange(
            "the chat template writes the prompt differently when an answer follows: "
            f"{_shortened(whole[same:])} in place of {_shortened(head[same:])}"
        )
    return whole[len(head) :]


def check_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answers: Sequence[Sequence[Message]]
) -> None:
    """Check that the chat template writes a prompt, and each of its answers, with all their texts and parts.

    White space may differ. Templates may leave out the reasoning of earlier turns.

    Raises:
        TemplateRefusal: it cannot write the conversation or a part of it, or an answer holds the stop token in its middle.
        TemplateChange: a text is another in what it writes, or the prompt begins with two BOS tokens.
    """
    head, bos, stop = _render(tokenizer, prompt, answer_header=True), tokenizer.bos_token, str(tokenizer.eos_token)
    if bos and bos != stop and head.startswith(2 * bos):
        raise TemplateChange(
            f"the prompt begins with two {bos}: the chat template writes one, and the text holds another"
        )
    _check_parts(tokenizer, prompt)
    _require_texts(head, "", prompt)
    for answer in answers:
        tail = _tail(tokenizer, head, prompt, answer)
        _check_parts(tokenizer, [*prompt, *answer], after=len(prompt))
        _require_texts(tail, head, answer)
        if any(stop in _without_stops(message["content"], stop) for message in answer[-1:]):
            raise TemplateRefusal(f"the answer holds the stop token {stop} in its middle")


def _require_texts(text: str, head: str, messages: Sequence[Message]) -> None:
    """Raise `TemplateChange` unless all contents stand in what the template has written.

    Args:
        head: what it wrote before, if the messages are an answer, which may begin there: with `<think>`.
    """
    for number, message in enumerate(messages, start=1):
        content = message["content"]
        if content in text:  # most are, and nothing needs to be joined
            continue
        written, bare = _joined(text), _joined(content)
        is_last_answer = bool(head) and number == len(messages)
        if _holds(_joined(head) if is_last_answer else "", written, bare):
            continue
        shorter = content.rpartition(_END_OF_THINKING)[2] if message["role"] == "assistant" else content
        as_json = json.dumps(content, ensure_ascii=False)[1:-1]  # as results of tools are written
        if not is_last_answer and any(_joined(text) in written for text in (shorter, as_json)):
            continue
        name = "answer" if head else f"text of {message['role']}"
        raise TemplateChange(
            f"the chat template changes the {name} {_shortened(content)}: it writes {_shortened(text)}"
        )


def _holds(head: str, text: str, answer: str) -> bool:
    """Return whether an answer stands in a text, or begins at the end of the header before it: with `<think>`."""
    return answer in (head[1 - len(answer) :] if len(answer) > 1 else "") + text


def check_header(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> None:
    """Raise `UserError` if the template leaves the answer's header out of the prompt, so that it would be trained.

    Formats without a header write nothing between a prompt and its answer. Reasoning models write marks there by themselves.
    """
    head = _render(tokenizer, prompt, answer_header=True)
    try:
        tail = _tail(tokenizer, head, prompt, [{"role": "assistant", "content": _PROBE}])
    except (
        TemplateChange
    ):  # it begins the reasoning of an answer, and this one has none; answers are checked by themselves
        return
    if tail.count(_PROBE) > 1:
        raise UserError(
            f"the chat template writes an answer {tail.count(_PROBE)} times; mend it, or give another --chat_template"
        )
    between = tail.partition(_PROBE)[0].strip()
    has_header = head != _render(tokenizer, prompt, answer_header=False)
    own_marks = has_header and _OWN_MARKS.fullmatch(between) and "assistant" not in between.lower()
    if between and not own_marks:
        raise UserError(
            f"the chat template writes {between!r} between the prompt and the answer, which would be trained and sampled: it has "
            "to write this after the prompt if add_generation_prompt is set; mend it, or give another --chat_template"
        )


def closing_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes between an answer and the stop token, if the vocabulary has no tokens of its own for it.

    Such a mark is trained as text, and sampled answers show it.
    """
    prompt, answer = [{"role": "user", "content": _PROBE}], [{"role": "assistant", "content": _PROBE}]
    try:
        tail = _tail(tokenizer, _render(tokenizer, prompt, answer_header=True), prompt, answer)
    except (TemplateChange, TemplateRefusal):
        return ""
    closing = tail.rpartition(_PROBE)[2].partition(str(tokenizer.eos_token))[0].strip()
    tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
    added = set(tokenizer.get_added_vocab().values())
    return "" if added.intersection(tokens) else closing


def _check_parts(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], after: int = 0) -> None:
    """Raise `TemplateRefusal` where the template does not write a part of the messages beyond the first few.

    A part is written if the text changes without it. The reasoning has to be written where its turn is the last.
    """
    for number, message in enumerate(messages[after:], start=after + 1):
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


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_header: bool, calls_as_text: bool = False
) -> str:
    has_calls = any("tool_calls" in parts_of(message) for message in messages)
    written, arguments = template_arguments(messages, calls_as_text=calls_as_text)
    try:
        return str(
            tokenizer.apply_chat_template(written, add_generation_prompt=answer_header, tokenize=False, **arguments)
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Roles or parts that it refuses, or an error in it.
        if has_calls and not calls_as_text:  # some join the arguments of a call to other texts
            return _render(tokenizer, messages, answer_header=answer_header, calls_as_text=True)
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise TemplateRefusal(
            f"the chat template cannot write a conversation of {roles}: {error}; another --chat_template may"
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
    answer = _without_stops("".join(message["content"] for message in response), str(tokenizer.eos_token))
    decoded = str(tokenizer.decode(tail[:-1], skip_special_tokens=False))
    begun = str(tokenizer.decode(head, skip_special_tokens=False))
    if not _holds(_bare(begun), _bare(decoded), _bare(answer)):
        raise UserError(
            f"the trained tokens read {decoded[:80]!r}, which is not the answer {answer[:80]!r}: the chat template changes it, "
            "or the tokenizer cannot write it; give another --chat_template or tokenizer"
        )
    return head, tail


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[Sequence[Message], Sequence[Message]]]) -> None:
    """Run `check_encoding` on the first few (prompt, answer) of a data set: a wrong template shows in every row."""
    for prompt, answer in islice(rows, CHECKED_ROWS):
        check_encoding(tokenizer, prompt, answer)


def _without_stops(text: str, stop: str) -> str:
    """Return a text less the stop tokens that it ends in: data that was exported with its end marker."""
    while (bare := text.rstrip()).endswith(stop):
        text = bare.removesuffix(stop)
    return text


def _joined(text: str) -> str:
    return "".join(text.split())


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _bare(text: str) -> str:
    """Strip a text of what templates and tokenizers may change: white space, and compatible forms of a character."""
    return _joined(unicodedata.normalize("NFKC", text))


def _show(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(tokens)))
    return repr(text if len(text) <= 80 else text[:77] + "...")
