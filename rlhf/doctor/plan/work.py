"""The rows that a stage computes on: read from its data where that is on this machine, else made from its options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, RewardConfig, SFTConfig, TrainingConfig
from rlhf.data_prep.load import Loaded, load_rows
from rlhf.data_prep.stage_rows import Kind
from rlhf.models.tokenization import encode_prompt, encode_response

#: A row: token ids of a prompt and of an answer to it.
Row = tuple[list[int], list[int]]
#: Rows that are tokenised: the longest by characters, and others spread over the data.
LONGEST, SPREAD = 64, 192
KINDS: dict[type[TrainingConfig], Kind] = {
    SFTConfig: "demonstrations",
    RewardConfig: "comparisons",
    PPOConfig: "prompts",
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokenised rows of a stage's data, by prompt, and the size of all of it."""

    groups: Sequence[Sequence[Row]]
    """Rows of some prompts, the longest first; the answers of PPO's are as long as they may be."""
    spread: Sequence[Sequence[Row]]
    """Rows of other prompts, which stand for all."""
    training: int
    """Prompts (rows of blocks, demonstrations) that are trained on."""
    validation: int
    source: str
    """Where the lengths come from, in words."""

    def largest_groups(self, count: int, rows: int = 0) -> list[Sequence[Row]]:
        """Return the longest `count` prompts with their rows, or as many as have at least `rows` rows."""
        chosen: list[Sequence[Row]] = []
        for group in _cycle(self.groups):
            if len(chosen) >= count and sum(map(len, chosen)) >= rows:
                break
            chosen.append(group)
        return chosen

    def usual_groups(self, count: int) -> list[Sequence[Row]]:
        """Return `count` prompts with their rows, of all lengths."""
        step = max(len(self.spread) / count, 1)
        return [self.spread[int(i * step) % len(self.spread)] for i in range(count)]

    def largest(self, count: int) -> list[Row]:
        """Return the longest `count` rows."""
        return [row for group in self.largest_groups(0, count) for row in group][:count]

    def usual(self, count: int) -> list[Row]:
        """Return `count` rows of all lengths."""
        return [row for group in self.usual_groups(count) for row in group][:count]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a prompt's rows together, on average."""
        return sum(len(p) + len(a) for group in self.spread for p, a in group) / len(self.spread)


def _cycle(groups: Sequence[Sequence[Row]]) -> Iterator[Sequence[Row]]:
    while True:
        yield from groups


def work_of_tokens(
    config: TrainingConfig, groups: Sequence[Sequence[Row]], training: int, validation: int, source: str
) -> Work:
    """Return the work of tokenised prompts with their rows; too long ones are left out, as the stage does it."""
    limit = getattr(config, "max_length", None)
    fitting = [group for group in groups if limit is None or all(len(p) + len(a) <= limit for p, a in group)]
    spread = fitting or list(groups)
    ordered = sorted(spread, key=lambda group: -sum(len(p) + len(a) for p, a in group))
    if isinstance(config, PPOConfig):
        ordered = [
            [(p, _ids(config.response_length, number))] for number, group in enumerate(ordered) for p, _ in group[:1]
        ]
    return Work(groups=ordered, spread=spread, training=training, validation=validation, source=source)


def read_work(config: TrainingConfig, dataset: str, tokenizer: PreTrainedTokenizerBase) -> Work:
    """Return the work of data on this machine."""
    kind = KINDS[type(config)]
    return work_of(
        config, {split: load_rows(dataset, split, kind=kind) for split in ("train", "validation")}, tokenizer
    )


def work_of(config: TrainingConfig, sets: Mapping[str, Loaded], tokenizer: PreTrainedTokenizerBase) -> Work:
    """Return the work of loaded data sets, `train` and `validation`."""
    train, validation = sets["train"], sets["validation"]
    answers = _usual_answers(train.source, tokenizer, config) if isinstance(config, PPOConfig) else []
    groups = [_group(config, tokenizer, row, answers, number) for number, row in enumerate(_sample(train))]
    source = f"lengths from {len(groups)} rows of {train.source}"
    return work_of_tokens(config, groups, len(train.rows), len(validation.rows), source)


def _sample(data: Loaded) -> list[dict[str, Any]]:
    """Return the longest rows by characters, and others spread over the data."""
    count = len(data.rows)
    sizes = [len(str(row)) for row in data.rows]
    longest = sorted(range(count), key=lambda number: -sizes[number])[:LONGEST]
    return [data.rows[number] for number in dict.fromkeys([*range(0, count, max(count // SPREAD, 1)), *longest])]


def _group(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, row: Any, answers: Sequence[list[int]], number: int
) -> list[Row]:
    prompt = encode_prompt(tokenizer, row["prompt"])
    if isinstance(config, PPOConfig):
        return [(prompt, answers[number % len(answers)])]
    texts = row["responses"] if isinstance(config, RewardConfig) else [row["completion"]]
    return [(prompt, encode_response(tokenizer, row["prompt"], text)) for text in texts]


def _usual_answers(source: str, tokenizer: PreTrainedTokenizerBase, config: PPOConfig) -> list[list[int]]:
    """Return answers as long as the demonstrations, if the data has any: the SFT policy imitates them."""
    try:
        rows = _sample(load_rows(config.dataset or source, "train", kind="demonstrations"))
    except UserError:
        return [_ids(config.response_length, 0)]
    lengths = [len(encode_response(tokenizer, row["prompt"], row["completion"])) for row in rows]
    return [_ids(min(length, config.response_length), number) for number, length in enumerate(lengths)]


def assumed_work(
    config: TrainingConfig, *, prompt_tokens: int, answer_tokens: int, rows: int, answers: int = 2
) -> Work:
    """Return the work of data that is not here: all prompts and answers are of these lengths."""
    per_prompt = answers if isinstance(config, RewardConfig) else 1
    groups = [
        [(_ids(prompt_tokens, number), _ids(answer_tokens, number * per_prompt + i + 1)) for i in range(per_prompt)]
        for number in range(min(rows, LONGEST))
    ]
    source = f"data not read: {rows} prompts of {prompt_tokens} tokens and answers of {answer_tokens} assumed"
    return Work(groups=groups, spread=groups, training=rows, validation=max(rows // 10, 1), source=source)


def _ids(length: int, seed: int) -> list[int]:
    """Return token ids of no meaning, which share nothing with those of another seed."""
    return torch.randint(4, 1 << 15, (length,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
