"""What a stage's manifest records of its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.base import distributed
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import NAMED_ROWS, Loaded, joint_fingerprint
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.registry import Artifact, Registry


def describe_data(sets: dict[str, Loaded]) -> dict[str, Any]:
    """Rows, drops and one fingerprint of the data sets of a stage, for its manifest; and the fingerprints of their data cards."""
    return {
        "fingerprint": joint_fingerprint(sets),
        "prepared": {name: loaded.prepared for name, loaded in sets.items() if loaded.prepared},
        "rows": {name: len(loaded.rows) for name, loaded in sets.items()},
        "dropped": {name: loaded.dropped for name, loaded in sets.items() if loaded.dropped},
        "dropped_rows": {name: loaded.dropped_rows for name, loaded in sets.items() if loaded.dropped_rows},
    }


def overlap(sets: dict[str, Loaded], parents: Sequence[Artifact], registry: Registry) -> dict[str, Any]:
    """How many held-out prompts are among those that the stage, or a model that it starts from, is trained on.

    Returns:
        `held_out`: how many there are; `in_training`: counts by artefact, the stage's own as "its own data"; None where the
        data of a parent is gone or has changed.
    """
    held_out = [row["prompt"] for row in sets["validation"].rows]
    trained = [d.rows for name, d in sets.items() if name != "validation" and "prompt" in d.rows.column_names]
    own = {prompt_key(row["prompt"]) for rows in trained for row in rows}
    counts: dict[str, int | None] = {"its own data": sum(prompt_key(prompt) in own for prompt in held_out)}
    training = TrainingPrompts(registry)
    for parent in parents:
        counts |= training.overlap(parent, held_out)
    for name, count in counts.items():
        if count and distributed.rank() == 0:
            print(f"{count} of {len(held_out)} held-out prompts are among those that {name} was trained on", flush=True)
    return {"held_out": len(held_out), "in_training": counts}


def add_dropped(data: dict[str, Any], name: str, dropped: dict[str, list[int]]) -> None:
    """Adds what was left out after loading to `describe_data`'s result: reason -> line or row numbers."""
    dropped = {reason: numbers for reason, numbers in dropped.items() if numbers}
    if dropped:
        data["rows"][name] -= sum(map(len, dropped.values()))
        data["dropped"].setdefault(name, {}).update({reason: len(numbers) for reason, numbers in dropped.items()})
        named = {reason: numbers[:NAMED_ROWS] for reason, numbers in dropped.items()}
        data["dropped_rows"].setdefault(name, {}).update(named)
