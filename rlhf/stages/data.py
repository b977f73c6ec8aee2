"""Data sets of a stage: loading, encoding, and the manifest's record of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.data_prep.load import NAMED_ROWS, Loaded, joint_fingerprint, load_rows
from rlhf.data_prep.overlap import TrainingPrompts, answer_keys, prompt_keys, shares_few_prompts
from rlhf.data_prep.stage_rows import Kind
from rlhf.data_prep.writable import TextsChanged, writable
from rlhf.models.tokenization import encode_prompt, encode_response
from rlhf.registry import Artifact, Registry
from rlhf.registry.outcome import overlap_lines


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
    """Count the held-out rows that the stage, or a model that it starts from, is trained on.

    A row with answers counts if one of them was trained on as an answer to its prompt, and a prompt without answers if it
    was trained on, except in a task whose few prompts training and evaluation share.

    Returns:
        `held_out`: held-out rows; `by`: answers or prompts; `in_training`: counts by artefact, the stage's own as "its own
        data"; None where the data of a parent is gone or has changed; `shared_prompts`: held-out rows whose prompt is in
        the stage's own training rows.
    """
    held_out, training = list(sets["validation"].rows), training_prompts(sets).values()
    prompts = [key for loaded in training for row in loaded.rows for key in prompt_keys(row)]
    own_prompts, held_out_prompts = set(prompts), [key for row in held_out for key in prompt_keys(row)]
    shared = sum(key in own_prompts for key in held_out_prompts)
    few = shares_few_prompts(prompts, held_out_prompts)
    by = "answers" if few or answer_keys(held_out[0]) else "prompts"
    keys = answer_keys if by == "answers" else prompt_keys
    own = {key for loaded in training for row in loaded.rows for key in keys(row)}
    counts: dict[str, int | None] = {"its own data": sum(not own.isdisjoint(keys(row)) for row in held_out)}
    trained = TrainingPrompts(registry, keys)
    for parent in parents:
        counts |= trained.overlap_of_rows(parent, held_out)
    result = {"held_out": len(held_out), "by": by, "in_training": counts, "shared_prompts": shared}
    if distributed.rank() == 0:
        lines = overlap_lines("", {"overlap": result})
        if by == "answers" and shared and not lines:
            lines = [
                f"held out are the answers, none of which was trained on; {shared:,} of {len(held_out):,} held-out rows share "
                "their prompts with training rows"
            ]
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    return result
