"""Rows that a chat template can write, apart from those that it refuses or would cut."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.data_prep.load import NAMED_ROWS, Loaded
from rlhf.models.tokenization import TemplateRefusal, check_written


def writable(data: Loaded, tokenizer: PreTrainedTokenizerBase) -> tuple[Loaded, dict[str, list[int]]]:
    """Return the rows that the chat template can write, and the others: reason -> line or row numbers.

    Raises:
        UserError: it can write none.
    """
    refused: defaultdict[str, list[int]] = defaultdict(list)
    places: list[int] = []
    for place, (number, row) in enumerate(zip(data.numbers, data.rows, strict=True)):
        try:
            for conversation in conversations(row):
                check_written(tokenizer, conversation)
            places.append(place)
        except TemplateRefusal as refusal:
            refused[str(refusal)].append(number)
    if not refused:
        return data, {}
    if not places:
        counts = "; ".join(f"{reason}: {len(numbers)}" for reason, numbers in refused.items())
        raise UserError(f"the chat template can write none of the {len(data.rows)} rows ({counts})")
    for reason, numbers in refused.items():
        first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        print(f"{len(numbers)} rows are left out: {reason} (rows {first} of {data.source})", flush=True)
    written = replace(
        data,
        rows=data.rows.select(places),
        numbers=[data.numbers[place] for place in places],
        dropped=data.dropped | {reason: len(numbers) for reason, numbers in refused.items()},
        dropped_rows=data.dropped_rows | {reason: numbers[:NAMED_ROWS] for reason, numbers in refused.items()},
    )
    return written, dict(refused)


def conversations(row: Any) -> list[list[dict[str, str]]]:
    """Return the prompt of a stage's row with each of its answers, or alone."""
    answers = [row["completion"]] if row.get("completion") else row.get("responses") or [[]]
    return [[*row["prompt"], *answer] for answer in answers]
