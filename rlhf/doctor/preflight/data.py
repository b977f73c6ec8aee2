"""Preflight, data: what parents were trained on is what is here, and nothing that is judged was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_value
from rlhf.data_prep.formats.rows import comparable, prompt_key
from rlhf.data_prep.load import Loaded, joint_fingerprint, load_rows
from rlhf.data_prep.prepare.folder import CARD
from rlhf.data_prep.stage_rows import Kind
from rlhf.doctor.preflight.check import Check
from rlhf.registry import Artifact

#: What a stage is trained on.
_KIND: dict[str, Kind] = {"sft": "demonstrations", "reward": "comparisons"}
_SHOWN = 80


def load_parents_data(parents: Sequence[Artifact]) -> dict[str, dict[str, Loaded] | str]:
    """The data sets of each parent by its reference, read again from where it read them; or why they cannot be read."""
    found: dict[str, dict[str, Loaded] | str] = {}
    for parent in parents:
        if parent.stage not in _KIND:  # plain text, of which rows are no part
            continue
        place = str(parent.manifest.config["dataset"])
        kind = _KIND[parent.manifest.stage]
        if not Path(place).expanduser().exists():
            found[parent.reference] = ""
            continue
        try:
            found[parent.reference] = {split: load_rows(place, split, kind=kind) for split in ("train", "validation")}
        except UserError as error:
            found[parent.reference] = str(error)
    return found


def check_fingerprints(parents: Sequence[Artifact], data: Mapping[str, dict[str, Loaded] | str]) -> Check:
    """That the data of each parent, where it is still at its place, has the fingerprint that was registered with it."""
    same: list[str] = []
    gone: list[str] = []
    wrong: list[str] = []
    for parent in parents:
        if parent.reference not in data:
            continue
        sets, registered = data[parent.reference], parent.manifest.data["fingerprint"]
        place = parent.manifest.config["dataset"]
        if sets == "":
            gone.append(parent.reference)
        elif isinstance(sets, str):
            wrong.append(f"{place}, that {parent.reference} was trained on, cannot be read any more: {sets}")
        elif (now := joint_fingerprint(sets)) != registered:
            wrong.append(
                f"{place} is {now[:12]} now, and was {registered[:12]} when {parent.reference} was trained on it"
            )
        else:
            same.append(parent.reference)
    told = [f"as registered for {', '.join(same)}"] if same else []
    told += [f"not here for {', '.join(gone)}, so not compared"] if gone else []
    return Check(
        name="data as registered",
        passed=not wrong,
        measured="; ".join(wrong or told),
        cause="the data was prepared or edited again after a stage was trained on it",
        fix="train the stages after one another on the same data, or put back the data of before",
    )


def check_leaks(
    dataset: str,
    validation: Loaded,
    training: Mapping[str, Loaded],
    *,
    by: str,
) -> Check:
    """That nothing which is judged was trained on.

    Args:
        dataset: where the validation rows come from; overlaps that its card tells of are let pass.
        training: name of a training set -> its rows.
        by: `prompt`, or `row` for prompt and answers: a supervised stage may see a prompt again with other answers.
    """
    key = _row if by == "row" else lambda row: prompt_key(row["prompt"])
    held_out = {_digest(key(row)): key(row) for row in validation.rows}
    shared = {
        name: [held_out[d] for d in {_digest(key(row)) for row in loaded.rows} & held_out.keys()]
        for name, loaded in training.items()
    }
    leaks = {name: texts for name, texts in shared.items() if texts}
    known = sorted(name for name in leaks if _allowed(dataset, _kind(training[name]), _kind(validation)))
    told = [
        f"{len(texts)} of {len(held_out)} held-out {by}s are in {name}, first: {min(texts)[:_SHOWN]!r}"
        for name, texts in leaks.items()
        if name not in known
    ]
    right = f"none of {len(held_out)} held-out {by}s is in {', '.join(training)}"
    if known:
        right = f"held-out {by}s in {', '.join(known)}, which the data's card lets pass"
    return Check(
        name="no leak",
        passed=not told,
        measured="; ".join(told) or right,
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
    """Whether the card of a prepared folder tells of an overlap of these sets: its leak gate has let it pass."""
    try:
        card = read_value(Path(dataset).expanduser() / CARD)
        pairs = [set(pair.split(" / ")) for pair in card["leaks"]["overlaps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return {f"{trained}/train", f"{held_out}/validation"} in pairs
