"""Preflight, data: the parents' data is unchanged, and no held-out row was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_value
from rlhf.data_prep.formats.rows import comparable, prompt_key
from rlhf.data_prep.load import Loaded, joint_fingerprint, load_rows
from rlhf.data_prep.overlap import shares_few_prompts
from rlhf.data_prep.prepare.folder import CARD
from rlhf.data_prep.stage_rows import Kind
from rlhf.doctor.preflight.check import Check
from rlhf.registry import Artifact

#: Kind of rows that a stage is trained on.
_KIND: dict[str, Kind] = {"sft": "demonstrations", "reward": "comparisons"}
_SHOWN = 80


def load_parents_data(parents: Sequence[Artifact]) -> dict[str, dict[str, Loaded] | str]:
    """Load the data sets of each parent again, by its reference.

    Returns:
        The sets by split; the message of an error where they cannot be read; "" where they are gone. Parents that were
        pretrained on plain text have none.
    """
    data: dict[str, dict[str, Loaded] | str] = {}
    for parent in parents:
        if parent.stage not in _KIND:
            continue
        place, kind = str(parent.manifest.config.get("dataset", "")), _KIND[parent.stage]
        if not place or not Path(place).expanduser().exists():  # an imported parent has none
            data[parent.reference] = ""
            continue
        try:
            data[parent.reference] = {split: load_rows(place, split, kind=kind) for split in ("train", "validation")}
        except UserError as error:
            data[parent.reference] = str(error)
    return data


def check_fingerprints(parents: Sequence[Artifact], data: Mapping[str, dict[str, Loaded] | str]) -> Check:
    """Check that the data of each parent, where it is still in place, has its registered fingerprint."""
    same: list[str] = []
    gone: list[str] = []
    changed: list[str] = []
    for parent in (parent for parent in parents if parent.reference in data):
        sets, registered = data[parent.reference], str(parent.manifest.data.get("fingerprint"))
        place = parent.manifest.config.get("dataset")
        if sets == "":
            gone.append(parent.reference)
        elif isinstance(sets, str):
            changed.append(f"{place}, that {parent.reference} was trained on, cannot be read any more: {sets}")
        elif (now := joint_fingerprint(sets)) != registered:
            changed.append(
                f"{place} is {now[:12]} now, and was {registered[:12]} when {parent.reference} was trained on it"
            )
        else:
            same.append(parent.reference)
    sound = [f"as registered for {', '.join(same)}"] if same else []
    sound += [f"not here for {', '.join(gone)}, so not compared"] if gone else []
    return Check(
        name="data as registered",
        passed=not changed,
        measured="; ".join(changed or sound),
        cause="the data was prepared or edited again after a stage was trained on it",
        fix="train the stages after one another on the same data, or put back the earlier data",
    )


def check_leaks(dataset: str, validation: Loaded, training: Mapping[str, Loaded], *, by: str) -> Check:
    """Check that no held-out row was trained on.

    Args:
        dataset: source of the validation rows; overlaps that its card lists are let pass.
        training: training sets by name.
        by: `prompt`, or `row` for prompt and answers: a supervised stage may see a prompt again with other answers, and so may
            PPO in a task of few prompts.
    """
    key = _row if by == "row" else lambda row: prompt_key(row["prompt"])
    held_out = {_digest(key(row)): key(row) for row in validation.rows}
    shared = {
        name: [held_out[d] for d in {_digest(key(row)) for row in loaded.rows} & held_out.keys()]
        for name, loaded in training.items()
    }
    overlaps = {name: texts for name, texts in shared.items() if texts}
    allowed = sorted(name for name in overlaps if _allowed(dataset, _kind(training[name]), _kind(validation)))
    leaks = [
        f"{len(texts)} of {len(held_out)} held-out {by}s are in {name}, first: {min(texts)[:_SHOWN]!r}"
        for name, texts in overlaps.items()
        if name not in allowed
    ]
    sound = f"none of {len(held_out)} held-out {by}s is in {', '.join(training)}"
    if allowed:
        sound = f"held-out {by}s in {', '.join(allowed)}, which the data's card lets pass"
    own = [prompt_key(row["prompt"]) for row in training["train"].rows] if by == "prompt" else []
    if leaks and shares_few_prompts(own, list(map(prompt_key, validation.rows["prompt"]))):
        leaks, sound = (
            [],
            f"a task of {len(set(own))} prompts, which training and evaluation share; answers are sampled anew",
        )
    return Check(
        name="no leak",
        passed=not leaks,
        measured="; ".join(leaks) or sound,
        cause="a held-out row was trained on, so evaluation would measure memory",
        fix="split the data by prompt for all stages at once: rlhf data",
    )


def _row(row: Mapping[str, Any]) -> str:
    answers = row["responses"] if "responses" in row else [row["completion"]]
    texts = sorted(comparable("\n".join(message["content"] for message in answer)) for answer in answers)
    return "\n".join([prompt_key(row["prompt"]), *texts])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _kind(loaded: Loaded) -> Kind:
    columns = loaded.rows.column_names
    return "comparisons" if "responses" in columns else "demonstrations" if "completion" in columns else "prompts"


def _allowed(dataset: str, trained: Kind, held_out: Kind) -> bool:
    """Return whether the leak gate of a prepared folder let an overlap of these sets pass, by its card."""
    try:
        card = read_value(Path(dataset).expanduser() / CARD)
        pairs = [set(pair.split(" / ")) for pair in card["leaks"]["overlaps"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return {f"{trained}/train", f"{held_out}/validation"} in pairs
