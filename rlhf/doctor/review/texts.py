"""Figures of prompts and answers: what is empty, repeated, cut, garbled or out of place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ftfy.badness import is_bad
from transformers import PreTrainedTokenizerBase

from rlhf.data_prep.formats.rows import comparable, prompt_key
from rlhf.data_prep.load import Loaded
from rlhf.models.tokenization import encode_prompt, encode_response, last_user_text

#: Rows that are read, spread over the data, and rows whose tokens are counted.
READ, TOKENISED = 20_000, 256
#: Distinct answers below which a task is a choice among few, so that repeated answers are no fault; one is no choice.
FEW_ANSWERS = 20
#: Rows below which statistics of the texts say nothing.
ENOUGH = 30
#: Marks of chat templates, as exported data holds them.
_MARKS = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|\[/?INST\]|<start_of_turn>|<\|start_header_id\|>|<\|(user|assistant|system)\|>"
    r"|<\|endoftext\|>|<\|eot_id\|>|<end_of_turn>|</s>\s*$"
)
_ENDS = re.compile(r"[.!?…。！？؟۔।։።:;)\]}>\"'”’»`*|~]\s*$|\d\s*$")
_SENTENCE = re.compile(r"[.!?…]\s|[。！？؟۔।։።]")
#: Characters and words from which on answers of one length are cut ones, whether or not they hold the end of a sentence.
_LONG_CHARACTERS, _LONG_WORDS = 20, 10
_WORD = re.compile(r"\w+")
#: Characters that stand for bytes which could not be read, and control characters.
_BROKEN = re.compile("[\ufffd\x00-\x08\x0e-\x1f]")


@dataclass
class Figures:
    """Figures by name, and words that explain some of them."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, detail: str = "") -> None:
        """Add a figure; its detail, if there is one, follows it in the review."""
        self.values[name] = float(value)
        if detail:
            self.details[name] = detail


def spread_rows(data: Loaded, most: int) -> list[Mapping[str, Any]]:
    """Return at most this many rows, spread over the data."""
    count = len(data.rows)
    return data.rows.select(range(0, count, -(-count // most))).to_list() if count > most else data.rows.to_list()


def left_out(data: Loaded, figures: Figures) -> None:
    """Add the shares of rows that were left out in loading: empty ones, ties, contradictions."""
    total = len(data.rows) + sum(data.dropped.values())
    reasons = {
        "empty": "empty",
        "ties": "rated the same",
        "contradictions": "contradicts",
        "same_responses": "rated twice|chosen and rejected are the same",
    }
    for name, words in reasons.items():
        count = sum(number for reason, number in data.dropped.items() if re.search(words, reason))
        figures.add(name, count / total, f"{count:,} of {total:,} rows, left out")


def of_prompts(rows: Sequence[Mapping[str, Any]], figures: Figures) -> None:
    """Add figures of prompts."""
    texts = [last_user_text(row["prompt"]) for row in rows]
    keys = Counter(prompt_key(row["prompt"]) for row in rows)
    figures.add("distinct_prompts", len(keys))
    figures.add("rendered", _share([_MARKS.search(text) is not None for text in texts]))
    figures.add("garbled", _share(list(map(_is_garbled, texts))))


def of_demonstrations(rows: Sequence[Mapping[str, Any]], figures: Figures) -> None:
    """Add figures of prompts and answers."""
    of_prompts(rows, figures)
    prompts = [last_user_text(row["prompt"]) for row in rows]
    answers = ["\n".join(message["content"] for message in row["completion"]) for row in rows]
    of_answers(prompts, answers, figures)
    pairs = Counter((prompt_key(row["prompt"]), comparable(answer)) for row, answer in zip(rows, answers, strict=True))
    figures.add("repeated_rows", 1 - len(pairs) / len(rows))


def of_answers(prompts: Sequence[str], answers: Sequence[str], figures: Figures) -> None:
    """Add figures of answers."""
    keys = [comparable(answer) for answer in answers]
    same = [key == comparable(prompt) for key, prompt in zip(keys, prompts, strict=True)]
    figures.add("echoes", _share(same))
    figures.values["rendered"] = max(
        figures.values.get("rendered", 0), _share([bool(_MARKS.search(a)) for a in answers])
    )
    figures.values["garbled"] = max(figures.values.get("garbled", 0), _share(list(map(_is_garbled, answers))))
    (common, count), *_ = Counter(keys).most_common(1)
    if len(answers) >= ENOUGH and not 1 < len(set(keys)) <= FEW_ANSWERS:
        figures.add("commonest_answer", count / len(answers), f"{count:,} times {common[:40]!r}")
        figures.add("cut_answers", _cut(answers))
    if (score := relatedness(prompts, answers)) is not None:
        figures.add("related", score)


def _cut(answers: Sequence[str]) -> float:
    """Return the share of answers that are as long as the longest, in characters or words, and end in the middle.

    Headlines, labels and some languages do without a full stop: an open end counts where shorter answers are closed, and
    where nearly all are as long as the longest, if sentences end inside or they are too long for a form.
    """
    is_open = [not _ENDS.search(answer) for answer in answers]
    sizes = ([len(answer) for answer in answers], [len(answer.split()) for answer in answers])
    return max(
        _open_at_longest(answers, own, is_open, long)
        for own, long in zip(sizes, (_LONG_CHARACTERS, _LONG_WORDS), strict=True)
    )


def _open_at_longest(answers: Sequence[str], sizes: Sequence[int], is_open: Sequence[bool], long: int) -> float:
    # The longest but for one in a hundred: some cuts leave a rest that is longer.
    longest = int(np.quantile(sizes, 0.99))
    cut = [longest - size in (0, 1) and open for size, open in zip(sizes, is_open, strict=True)]
    shorter = [open for size, open in zip(sizes, is_open, strict=True) if size < longest - 1]
    if len(shorter) >= max(ENOUGH / 3, len(answers) / 20):
        return _share(cut) if _share(shorter) < 0.5 else 0.0
    return _share(
        [flag and (longest >= long or bool(_SENTENCE.search(a))) for flag, a in zip(cut, answers, strict=True)]
    )


def relatedness(prompts: Sequence[str], answers: Sequence[str]) -> float | None:
    """Return by how many standard errors answers share more words with their own prompt than with another one.

    None where prompts have no words of their own, or there are few rows.
    """
    pairs = [
        (set(_WORD.findall(p.casefold())), set(_WORD.findall(a.casefold())))
        for p, a in zip(prompts, answers, strict=True)
    ]
    pairs = pairs[:4000]
    counts = Counter(word for prompt, _ in pairs for word in prompt)
    rare = [({word for word in prompt if counts[word] <= len(pairs) / 5}, answer) for prompt, answer in pairs]
    rare = [(prompt, answer) for prompt, answer in rare if prompt]
    if len(rare) < ENOUGH:
        return None
    shift = max(1, len(rare) // 3)
    differences = []
    for i, (prompt, answer) in enumerate(rare):
        other = rare[(i + shift) % len(rare)][1]
        differences.append((len(prompt & answer) - len(prompt & other)) / len(prompt))
    spread = float(np.std(differences))
    return float(np.mean(differences)) / spread * len(differences) ** 0.5 if spread else 0.0


def lengths(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of each row's prompt, and of each of its answers."""
    prompts = [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    texts = [
        row["responses"] if "responses" in row else [row["completion"]] if "completion" in row else [] for row in rows
    ]
    return prompts, [
        [len(encode_response(tokenizer, row["prompt"], answer)) for answer in own]
        for row, own in zip(rows, texts, strict=True)
    ]


def _is_garbled(text: str) -> bool:
    return _BROKEN.search(text) is not None or (not text.isascii() and is_bad(text))


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
