"""Answers of models to prompts, and the one loop that samples them batch by batch.

Legend: P prompts, S samples a prompt, M = P S answers, prompt after prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.errors import require
from rlhf.base.intervals import Array
from rlhf.models.sampling import SAMPLED_AT_ONCE, Sampled, sample
from rlhf.models.sequences import Sequences, pad
from rlhf.models.tokenization import Message, decode_response, encode_prompt, stop_token_ids

#: Samples a batch: takes the token ids of its prompts, and the number of the first of them among all.
Draw = Callable[[Sequence[Sequence[int]], int], Sampled]


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    """Without special tokens."""
    tokens: list[int]
    """Token ids, the stop token included."""
    stopped: bool
    """True if it ended in a stop token or stop string, not at the length limit."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """M answers of one model as plain data, which JSON can hold."""

    samples: int = 1
    """S"""
    texts: list[str]
    """(M,) without special tokens."""
    tokens: list[list[int]]
    """(M,) token ids, the stop token included."""
    stopped: list[bool]
    """(M,) True where the answer ended in a stop token or stop string."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums over the tokens of each answer, (M,) nats: `kl` (k1), `kl_k3`, `kl_full`, `entropy`; empty if not measured."""

    @classmethod
    def of(cls, rows: Iterable[Answer], samples: int = 1) -> Self:
        """Return single answers as one object."""
        rows = list(rows)
        return cls(
            samples=samples,
            texts=[row.text for row in rows],
            tokens=[row.tokens for row in rows],
            stopped=[row.stopped for row in rows],
        )

    @property
    def rows(self) -> list[Answer]:
        """(M,) the single answers."""
        return [Answer(*row) for row in zip(self.texts, self.tokens, self.stopped, strict=True)]

    @property
    def prompt(self) -> Array:
        """(M,) int64: number of the prompt that each answer belongs to."""
        return np.arange(len(self.texts)) // self.samples

    @property
    def lengths(self) -> Array:
        """(M,) tokens, the stop token included."""
        return np.array([len(tokens) for tokens in self.tokens])

    def sequences(self, prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> Sequences:
        """Return the answers with their prompts (token ids, P rows) as padded tensors of M rows."""
        ids, prompt_mask = pad([prompts[i] for i in self.prompt], pad_token_id, side="left")
        responses, mask = pad(self.tokens, pad_token_id, side="right")
        return Sequences(prompts=ids, prompt_mask=prompt_mask, responses=responses, mask=mask).to(device)


def sample_in_batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    *,
    samples: int = 1,
    at_once: int = SAMPLED_AT_ONCE,
    on_batch: Callable[[int], Any] = lambda _: None,
) -> Answers:
    """Sample S answers to each of P prompts (token ids), `at_once` answers a batch.

    Args:
        on_batch: called after each batch with its number of answers.
    """
    repeated = [ids for ids in prompts for _ in range(samples)]
    rows: list[Answer] = []
    for first in range(0, len(repeated), at_once):
        batch = repeated[first : first + at_once]
        rows += single_answers(tokenizer, draw(batch, first))
        on_batch(len(batch))
    return Answers.of(rows, samples)


def single_answers(tokenizer: PreTrainedTokenizerBase, sampled: Sampled) -> list[Answer]:
    """Return the responses of a batch without their padding, as tokens and as text."""
    rows = [row[real].tolist() for row, real in zip(sampled.responses, sampled.mask, strict=True)]
    stopped = sampled.stopped.tolist()
    return [Answer(decode_response(tokenizer, row), row, end) for row, end in zip(rows, stopped, strict=True)]


def sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], **options: Any
) -> Sampled:
    """Sample one response to each prompt (token ids), all in one batch; options are those of `sample`."""
    pad_id = int(tokenizer.pad_token_id)
    ids, mask = pad(prompts, pad_id, side="left")
    options = {"stop_token_ids": stop_token_ids(tokenizer), **options}
    return sample(model, ids.to(model.device), mask.to(model.device), pad_token_id=pad_id, **options)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    response_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    at_once: int = SAMPLED_AT_ONCE,
) -> Answers:
    """Sample one answer to each prompt from a plain model.

    Args:
        prompts: token ids, with room for an answer in the model's context (`answerable`).
        response_length: longest answer, tokens.
        temperature: 0 takes the likeliest tokens, and draws nothing.
        at_once: answers a batch.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(batch: Sequence[Sequence[int]], first: int) -> Sampled:
        return sample_batch(
            model, tokenizer, batch, max_new_tokens=response_length, temperature=temperature, generator=generator
        )

    return sample_in_batches(tokenizer, prompts, draw, at_once=at_once)


def answerable(
    prompts: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, context: int, response_length: int
) -> list[Sequence[Message]]:
    """Return the prompts that leave room for an answer in a context; print the number of the others.

    Args:
        context, response_length: tokens.

    Raises:
        UserError: no prompt leaves room.
    """
    fitting = [prompt for prompt in prompts if len(encode_prompt(tokenizer, prompt)) + response_length <= context]
    require(
        bool(fitting),
        f"no prompt leaves room for response_length={response_length} tokens in the model's context of {context}; "
        "lower response_length",
    )
    if dropped := len(prompts) - len(fitting):
        print(
            f"{dropped} of {len(prompts)} prompts leave no room for response_length={response_length} tokens in the model's "
            f"context of {context}, and are not answered",
            flush=True,
        )
    return fitting
