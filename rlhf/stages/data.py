"""Data sets of a stage: loading, encoding, and the manifest's record of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import NAMED_ROWS, Loaded, joint_fingerprint, load_rows
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.data_prep.stage_rows import Kind
from rlhf.data_prep.writable import TextsChanged, writable
from rlhf.models.tokenization import encode_prompt, encode_response
from rlhf.registry import Artifact, Registry


def load_splits(dataset: str, kind: Kind) -> dict[str, Loaded]:
    """Return the rows to train on and to evaluate with, as `train` and `validation`."""
    return {split: load_rows(dataset, split, kind=kind) for split in ("train", "validation")}


def training_prompts(sets: dict[str, Loaded]) -> dict[str, Loaded]:
    """Return the data sets with prompts that a stage trains on: all but `validation`, and no plain text."""
    return {
        name: loaded for name, loaded in sets.items() if name != "validation" and "prompt" in loaded.rows.column_names
    }


def describe_data(sets: dict[str, Loaded]) -> dict[str, Any]:
    """Return what a manifest records of data sets: one fingerprint of all, rows, drops, and fingerprints of data cards."""
    return {
        "fingerprint": joint_fingerprint(sets),
        "prepared": {name: loaded.prepared for name, loaded in sets.items() if loaded.prepared},
        "rows": {name: len(loaded.rows) for name, loaded in sets.items()},
        "dropped": {name: loaded.dropped for name, loaded in sets.items() if loaded.dropped},
        "dropped_rows": {name: loaded.dropped_rows for name, loaded in sets.items() if loaded.dropped_rows},
    }


def writable_sets(
    sets: dict[str, Loaded], tokenizer: PreTrainedTokenizerBase, data: dict[str, Any]
) -> dict[str, Loaded]:
    """Return the sets less rows that the chat template cannot write, which are added to `describe_data`'s result.

    Raises:
        TextsChanged: it changes texts; the sets may be parts of one file, so the first row of all is named.
    """
    written = dict(sets)
    changes: list[TextsChanged] = []
    for name, loaded in sets.items():
        if "prompt" in loaded.rows.column_names:
            try:
                written[name], refused = writable(loaded, tokenizer)
            except TextsChanged as change:
                changes.append(change)
            else:
                add_dropped(data, name, refused, "chat_template")
    if changes:
        raise min(changes, key=lambda change: change.number)
    return written


def add_dropped(data: dict[str, Any], name: str, dropped: dict[str, list[int]], options: str) -> None:
    """Add rows that were left out after loading to `describe_data`'s result, and print how many.

    Args:
        dropped: reason -> line or row numbers.
        options: names of the options that decide it.
    """
    dropped = {reason: numbers for reason, numbers in dropped.items() if numbers}
    if dropped:
        if distributed.rank() == 0:
            reasons = "; ".join(f"{len(numbers):,} {reason}" for reason, numbers in dropped.items())
            total = sum(map(len, dropped.values()))
            print(f"{total:,} of {data['rows'][name]:,} {name} rows are left out ({options}): {reasons}", flush=True)
        data["rows"][name] -= sum(map(len, dropped.values()))
        data["dropped"].setdefault(name, {}).update({reason: len(numbers) for reason, numbers in dropped.items()})
        first = {reason: numbers[:NAMED_ROWS] for reason, numbers in dropped.items()}
        data["dropped_rows"].setdefault(name, {}).update(first)


def encode_demonstrations(
    data: Loaded, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None = None
) -> tuple[list[tuple[list[int], list[int]]], dict[str, list[int]]]:
    """Return token ids (prompt, answer) of demonstrations, and those left out: reason -> line or row numbers.

    Demonstrations of more than `max_length` tokens are left out; nothing is read beyond the first `limit` others.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    too_long: list[int] = []
    for number, row in zip(data.numbers, data.rows, strict=True):
        prompt = encode_prompt(tokenizer, row["prompt"])
        answer = encode_response(tokenizer, row["prompt"], row["completion"])
        if len(prompt) + len(answer) <= max_length:
            pairs.append((prompt, answer))
        else:
            too_long.append(number)
        if len(pairs) == limit:
            break
    return pairs, {f"prompt and answer of more than {max_length} tokens": too_long}


def overlap(sets: dict[str, Loaded], parents: Sequence[Artifact], registry: Registry) -> dict[str, Any]:
    """Count the held-out prompts that the stage, or a model that it starts from, is trained on.

    Returns:
        `held_out`: held-out prompts; `in_training`: counts by artefact, the stage's own as "its own data"; None where the
        data of a parent is gone or has changed.
    """
    held_out = [row["prompt"] for row in sets["validation"].rows]
    own = {prompt_key(row["prompt"]) for loaded in training_prompts(sets).values() for row in loaded.rows}
    counts: dict[str, int | None] = {"its own data": sum(prompt_key(prompt) in own for prompt in held_out)}
    training = TrainingPrompts(registry)
    for parent in parents:
        counts |= training.overlap(parent, held_out)
    for name, count in counts.items():
        if count and distributed.rank() == 0:
            print(f"{count} of {len(held_out)} held-out prompts are among those that {name} was trained on", flush=True)
    return {"held_out": len(held_out), "in_training": counts}
