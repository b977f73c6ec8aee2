"""Rows that a chat template can write, apart from those that it refuses or would cut."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.data_prep.load import NAMED_ROWS, Loaded
from rlhf.models.tokenization import TemplateChange, TemplateRefusal, check_header, check_texts


class TextsChanged(UserError):
    """The chat template changes texts, from a row of a file on."""

    def __init__(self, source: str, number: int, change: TemplateChange, rows: int, total: int) -> None:
        self.number = number
        super().__init__(
            f"{source}, row {number}: {change}; so from this row on, in {rows} of {total} rows; give another --chat_template, "
            "or leave these rows out"
        )


def writable(data: Loaded, tokenizer: PreTrainedTokenizerBase) -> tuple[Loaded, dict[str, list[int]]]:
    """Return the rows that the chat template can write, and the others: reason -> line or row numbers.

    Raises:
        TextsChanged: it writes other texts than the rows have.
        UserError: it can write none, or leaves the header of answers to the policy.
    """
    refused: defaultdict[str, list[int]] = defaultdict(list)
    changed: list[tuple[int, TemplateChange]] = []
    places: list[int] = []
    for place, (number, row) in enumerate(zip(data.numbers, data.rows, strict=True)):
        try:
            check_texts(tokenizer, row["prompt"], answers(row))
            if not places:
                check_header(tokenizer, row["prompt"])
            places.append(place)
        except TemplateRefusal as refusal:
            refused[str(refusal)].append(number)
        except TemplateChange as change:
            changed.append((number, change))
    if changed:
        raise TextsChanged(data.source, *min(changed, key=lambda each: each[0]), len(changed), len(data.rows))
    if not refused:
        return data, {}
    if not places:
        counts = "; ".join(f"{reason}: {len(numbers)}" for reason, numbers in refused.items())
        raise UserError(f"the chat template can write none of the {len(data.rows)} rows ({counts})")
    for reason, numbers in refused.items():
        first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        rows = f"row {first}" if len(numbers) == 1 else f"{len(numbers)} rows, {first}"
        print(f"left out: {reason} ({rows} of {data.source})", flush=True)
    written = replace(
        data,
        rows=data.rows.select(places),
        numbers=[data.numbers[place] for place in places],
        dropped=data.dropped | {reason: len(numbers) for reason, numbers in refused.items()},
        dropped_rows=data.dropped_rows | {reason: numbers[:NAMED_ROWS] for reason, numbers in refused.items()},
    )
    return written, dict(refused)


def answers(row: Any) -> list[list[dict[str, str]]]:
    """Return the answers of a stage's row; none of a prompt."""
    return [row["completion"]] if row.get("completion") else list(row.get("responses") or [])
