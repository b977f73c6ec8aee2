"""Preflight, texts: one tokenizer for all stages, the template applied once, and a loss on the answers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.doctor.preflight.check import Check
from rlhf.models.messages import template_arguments
from rlhf.models.tokenization import (
    Message,
    check_encoding,
    encode_prompt,
    encode_response,
    stop_token_ids,
    tokenizer_hashes,
)
from rlhf.ppo.types import Rollout
from rlhf.registry import Artifact

#: Prompts whose template marks are counted.
TEXTS = 64
#: Replaces the text of messages, so that only the template is left.
_WORD = "word"
_MASK_CAUSE = "the collator's labels or the rollout's mask are shifted, inverted, or made from token values"
_MASK_FIX = "take labels and masks from lengths, as rlhf.stages does; drop rows without an answer from the data"


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, parents: Sequence[Artifact], embeddings: int) -> Check:
    """Check that all parents have this tokenizer, template, pad and stop tokens, and the model embeds every token.

    Args:
        embeddings: rows of the model's token embeddings.
    """
    pad, stops = int(tokenizer.pad_token_id), stop_token_ids(tokenizer)
    own = {**tokenizer_hashes(tokenizer), "pad_token_id": pad, "stop_token_ids": stops}
    wrong = [
        f"{name.removesuffix('_hash')} of {parent.reference} is {_short(theirs)}, here {_short(value)}"
        for parent in parents
        for name, value in own.items()
        if (theirs := getattr(parent.manifest, name)) != value
    ]
    if pad in stops:
        wrong.append(f"pad and stop token are both {pad}")
    if (largest := max(tokenizer.get_vocab().values())) >= embeddings:
        wrong.append(f"token {largest} has no embedding, the model has {embeddings}")
    shared = ", ".join(parent.reference for parent in parents)
    return Check(
        name="tokenizer, template, pad and stop tokens",
        passed=not wrong,
        measured="; ".join(wrong) or f"pad {pad}, stop {stops}" + (f", as of {shared}" if shared else ""),
        cause="a stage was trained with another tokenizer or template, or padding ends responses",
        fix="train the stages one after the other from the same SFT policy, with a pad token of its own",
    )


def _short(value: Any) -> str:
    return str(value)[:12]


def check_template(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Sequence[Message]]) -> Check:
    """Check that a prompt's token ids hold the marks of the chat template as often as the template writes them.

    Texts that were exported with their marks, or a template that is applied to its own output, have them twice.
    """
    number, wrong = 0, ""
    for number, prompt in enumerate(islice(prompts, TEXTS), start=1):
        text = _rendered(tokenizer, [{**message, "content": _WORD} for message in prompt])
        expected = _bare(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))
        read = _bare(tokenizer.decode(encode_prompt(tokenizer, prompt)))
        for mark in _marks(tokenizer):
            count, once = read.count(mark), expected.count(mark)
            if count != once and not wrong:
                wrong = f"{mark!r} is {count} times in prompt {number}, where the template writes it {once} times"
        twice = 2 * _bare(tokenizer.bos_token or "")
        if twice and read.startswith(twice) and not expected.startswith(twice):
            wrong = wrong or f"prompt {number} begins with two {tokenizer.bos_token}"
    return Check(
        name="template applied once",
        passed=not wrong,
        measured=wrong or f"in {number} prompts",
        cause="the data already holds the marks of a chat template, or the tokenizer adds a second BOS",
        fix="give plain texts or lists of messages; rlhf data drops rows with such marks (clean: template)",
    )


def _marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the marks that the template puts before messages, without white space; none if it only joins texts."""
    first, second = "\u2460first\u2461", "\u2460second\u2461"
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    opening, _, rest = _rendered(tokenizer, turns, header=False).partition(first)
    marks = [_bare(opening), _bare(rest.partition(second)[0])]
    return [mark for mark in marks if len(mark) > 2]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, header: bool = True) -> str:
    """Render by transformers itself, to compare `encode_prompt` with."""
    written, arguments = template_arguments(messages)
    return str(tokenizer.apply_chat_template(written, add_generation_prompt=header, tokenize=False, **arguments))


def _bare(text: Any) -> str:
    return "".join(str(text).split())


def check_labels(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Sequence[Message], Sequence[Message]]],
    batch: Mapping[str, Tensor],
) -> Check:
    """Check that a collated SFT batch is trained on its answers with their stop tokens, and on nothing else.

    Args:
        pairs: prompt and answer of each row of the batch.
        batch: `input_ids`, `attention_mask`, `labels` (B, T), labels -100 where there is no loss.
    """
    wrong, counted, tokens = "", 0, 0
    for number, (prompt, answer) in enumerate(pairs):
        real = batch["attention_mask"][number].bool()
        ids, labels = batch["input_ids"][number], batch["labels"][number]
        scored = labels != -100
        tokens, counted = tokens + int(real.sum()), counted + int(scored.sum())
        try:
            head, tail = check_encoding(tokenizer, prompt, answer)
        except UserError as error:
            wrong = wrong or f"row {number + 1}: {error}"
            continue
        if ids[real].tolist() != head + tail:
            problem = "its tokens are not those of its prompt and answer"
        elif not bool(scored.any()):
            problem = "no token is trained on"
        elif bool((scored & ~real).any()) or bool(scored[real][: len(head)].any()):
            problem = "the prompt or padding is trained on"
        elif labels[scored].tolist() != tail:
            problem = f"{int(scored.sum())} of the answer's {len(tail)} tokens are trained on"
        else:
            continue
        wrong = wrong or f"row {number + 1}: {problem}"
    return _mask_check(wrong, f"{counted} of {tokens} tokens in {len(pairs)} rows are trained on, all of them answers")


def check_rankings(tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Tensor], pairs: int) -> Check:
    """Check that each response of a batch of rankings is scored at its stop token, and some pair has an order.

    Args:
        batch: `input_ids` and `attention_mask` (M, T).
        pairs: ordered pairs in it.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    stops = torch.tensor(stop_token_ids(tokenizer))
    last = ids[torch.arange(len(ids)), (mask.sum(dim=1) - 1).clamp_min(0)]
    bad = (~torch.isin(last, stops)).nonzero().flatten().tolist()
    wrong = f"response {bad[0] + 1} is scored at token {int(last[bad[0]])}, no stop token" if bad else ""
    if not pairs:
        wrong = wrong or f"{len(ids)} responses, and no two of one prompt are rated differently"
    return _mask_check(wrong, f"{len(ids)} responses scored at their stop tokens, {pairs} ordered pairs")


def check_rollout(rollout: Rollout, pad_token_id: int, stop_token_ids: Sequence[int]) -> Check:
    """Check that a rollout's mask covers its responses, up to their stop tokens, and nothing else.

    The policy may have sampled a padding token, so one inside a response is no fault.
    """
    wrong, stops = "", torch.tensor(list(stop_token_ids), device=rollout.mask.device)
    for number, (row, mask) in enumerate(zip(rollout.responses, rollout.mask, strict=True)):
        length = int(mask.sum())
        answer, rest = row[:length], row[length:]
        if not length or not bool(mask[:length].all()):
            problem = "the mask is no beginning of the response"
        elif bool((rest != pad_token_id).any()):
            problem = "the mask ends before the response"
        elif bool(torch.isin(answer[:-1], stops).any()):
            problem = "it goes on after a stop token"
        else:
            continue
        wrong = wrong or f"response {number + 1}: {problem}"
    tokens = int(rollout.mask.sum())
    return _mask_check(wrong, f"{tokens} tokens in {len(rollout)} responses, to their ends and no further")


def _mask_check(problem: str, sound: str) -> Check:
    return Check(name="loss mask", passed=not problem, measured=problem or sound, cause=_MASK_CAUSE, fix=_MASK_FIX)


def fitting_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], max_length: int, count: int
) -> list[tuple[list[Message], list[Message]]]:
    """Return prompt and answer of the first rows that are not too long, with which the stage's tokenised data begins."""
    pairs: list[tuple[list[Message], list[Message]]] = []
    for row in rows:
        prompt, answer = row["prompt"], row["completion"]
        if len(encode_prompt(tokenizer, prompt)) + len(encode_response(tokenizer, prompt, answer)) <= max_length:
            pairs.append((prompt, answer))
        if len(pairs) == count:
            break
    return pairs
