"""Prompts and responses as padded tensors, and batches of rows.

Legend: B responses, P padded prompt, R padded response, T = P + R, M rows. Masks are boolean, True = counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from rlhf.models.packing import Layout


def prompt_numbers(nested: Sequence[Sequence[Any]]) -> Tensor:
    """Return the number of each response's prompt, (M,) int64, for responses that are listed prompt by prompt."""
    return torch.tensor([i for i, inner in enumerate(nested) for _ in inner])


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts (left-padded) with their responses (right-padded)."""

    prompts: Tensor
    """(B, P) int64, padded on the left."""
    prompt_mask: Tensor
    """(B, P) bool: True at the prompt's tokens."""
    responses: Tensor
    """(B, R) int64, the stop token included, padded on the right."""
    mask: Tensor
    """(B, R) bool: True at the response's tokens: a prefix of at least one token."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """Tokens (B,) of prompt and response together."""
        return self.prompt_mask.sum(dim=1) + self.mask.sum(dim=1)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns (N,) of the responses' tokens. Their number is asked of the device, so it is best once a batch."""
        rows, columns = self.mask.nonzero(as_tuple=True)
        return rows, columns

    @cached_property
    def layout(self) -> Layout:
        """Places of the tokens in a packed row."""
        return Layout.of(self.input_ids, self.attention_mask)

    @property
    def input_ids(self) -> Tensor:
        """Token ids (B, T)."""
        return torch.cat([self.prompts, self.responses], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """Mask (B, T) bool of prompts and responses."""
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def select(self, rows: Tensor) -> Self:
        """Return some rows of every field, without the padding that they do not need."""
        first = int(self.prompts.shape[1] - self.prompt_mask[rows].sum(dim=1).max())
        width = int(self.mask[rows].sum(dim=1).max())

        def cut(name: str) -> Tensor:
            tensor = getattr(self, name)[rows]
            if tensor.dim() == 1:
                return tensor
            return tensor[:, first:] if name.startswith("prompt") else tensor[:, :width]

        return type(self)(**{f.name: cut(f.name) for f in dataclasses.fields(self)})


def length_sorted_batches(lengths: Tensor, size: int, tokens: int | None = None) -> list[Tensor]:
    """Return row numbers in batches of at most `size` rows of similar lengths, so that little of it is padding.

    With `tokens`, rows times the longest of them is at most that, too; a longer row is a batch of its own.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    if tokens is None:
        return list(order.split(size))
    counts: list[int] = []
    longest = 0
    for length in lengths[order].tolist():
        if not counts or counts[-1] == size or (counts[-1] + 1) * longest > tokens:
            counts.append(0)
            longest = length
        counts[-1] += 1
    return list(order.split(counts))


def prompt_batches(prompt: Tensor, size: int, lengths: Tensor | None = None, tokens: int | None = None) -> list[Tensor]:
    """Return row numbers in batches of at most `size` that keep a prompt's responses together where they fit.

    The prompt is then computed once.

    Args:
        prompt: (M,) int64, number of each row's prompt; rows of a prompt are neighbours.
        lengths, tokens: (M,) tokens of each row; rows times the longest of them is at most `tokens`, unless a single row
            is longer.
    """
    batches: list[Tensor] = []

    def room(rows: Tensor) -> int:
        """Return how many such rows a batch may have."""
        return size if lengths is None or tokens is None else min(size, max(1, tokens // int(lengths[rows].max())))

    counts = torch.unique_consecutive(prompt, return_counts=True)[1].tolist()
    for rows in torch.arange(len(prompt), device=prompt.device).split(counts):
        together = torch.cat([batches[-1], rows]) if batches else rows
        if batches and len(together) <= room(together):
            batches[-1] = together
        else:
            batches += rows.split(room(rows))
    return batches


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Return ragged token rows as `(ids, mask)`, both (B, longest); the mask comes from lengths, True at real tokens.

    Args:
        side: where the padding is, `left` or `right`.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return ids, mask
