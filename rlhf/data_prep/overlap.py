"""Overlap of what models are judged on with what they were trained on: answers where there are any, else prompts.

Prompts alone prove nothing in a task of few prompts, which all its answers share: there the answers are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf.base.errors import UserError
from rlhf.config import TextConfig
from rlhf.data_prep.corpus import load_text
from rlhf.data_prep.formats.rows import comparable, prompt_key
from rlhf.data_prep.hashes import sha256
from rlhf.data_prep.load import joint_fingerprint, load_rows
from rlhf.data_prep.stage_rows import Kind
from rlhf.registry import IMPORTED, Artifact, Lineage, Registry

#: Kind of the rows that a stage trains on.
_KINDS: dict[str, Kind] = {"sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}
#: Rows for each prompt, on average, from which on a task has few prompts.
ROWS_A_PROMPT = 4
#: Least share of the held-out prompts that training has, in a task of few prompts.
SHARED = 0.9
Row = Mapping[str, Any]
#: Function of a row to the texts by which it is compared.
Keys = Callable[[Row], Iterable[str]]


def prompt_keys(row: Row) -> list[str]:
    """Return the key of a row's prompt, alone in a list; none for a row of plain text."""
    return [prompt_key(row["prompt"])] if "prompt" in row else []


def answer_keys(row: Row) -> list[str]:
    """Return hashes of a row's answers, each with the prompt; none for a row without answers."""
    answers = row["responses"] if "responses" in row else [row["completion"]] if "completion" in row else []
    texts = (comparable("\n".join(message["content"] for message in answer)) for answer in answers)
    return [sha256(prompt_key(row["prompt"]), text) for text in texts]


def shares_few_prompts(training: Sequence[str], held_out: Sequence[str]) -> bool:
    """Return True for the prompts' keys of a task in which few prompts, the same in training and evaluation, have many rows."""
    prompts = set(training)
    few = len(training) >= ROWS_A_PROMPT * len(prompts)
    return few and sum(key in prompts for key in held_out) >= SHARED * len(held_out)


class TrainingPrompts:
    """Training prompts of artefacts and their ancestors, or other keys of rows; each data set is read once."""

    def __init__(self, registry: Registry, keys: Keys = prompt_keys) -> None:
        self.registry, self.keys = registry, keys
        self._read: dict[str, set[str] | None] = {}

    def overlap(self, artifact: Artifact, prompts: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, int | None]:
        """Return, by artefact, the count of the prompts that its stage trained on; None where its data is gone or changed."""
        return self.overlap_of_rows(artifact, [{"prompt": prompt} for prompt in prompts])

    def overlap_of_rows(self, artifact: Artifact, rows: Sequence[Row]) -> dict[str, int | None]:
        """Return, by artefact, the count of the rows with a key that its stage trained on, as `overlap` does."""
        judged = [set(self.keys(row)) for row in rows]
        counts: dict[str, int | None] = {}
        for ancestor in _ancestors(self.registry.lineage(artifact)):
            own = self.of(ancestor)
            counts[ancestor.reference] = None if own is None else sum(not keys.isdisjoint(own) for keys in judged)
        return counts

    def of(self, artifact: Artifact) -> set[str] | None:
        """Return the keys of the rows that its stage trained on; None where its data is gone or has changed."""
        if artifact.hash not in self._read:
            self._read[artifact.hash] = _training_keys(artifact, self.keys)
        return self._read[artifact.hash]


def _ancestors(line: Lineage) -> list[Artifact]:
    """Return the artefact and its ancestors that still exist, of the stages that train on prompts."""
    own = [line.artifact] if line.artifact is not None and line.artifact.stage in _KINDS else []
    everyone = [*own, *(ancestor for parent in line.parents for ancestor in _ancestors(parent))]
    return list({ancestor.reference: ancestor for ancestor in everyone}.values())


def _training_keys(artifact: Artifact, keys: Keys) -> set[str] | None:
    """Return the keys of an artefact's training rows; None where its data has another fingerprint, or is gone."""
    config, kind = artifact.manifest.config, _KINDS[artifact.stage]
    if IMPORTED in config:  # trained elsewhere
        return None
    sources: dict[str, tuple[Any, str, Kind]] = {
        "train": (artifact.option("dataset"), "train", kind),
        "validation": (artifact.option("dataset"), "validation", kind),
    }
    text = config.get("ptx_text") if config.get("ptx_coef") else None
    if config.get("ptx_coef") and not text:
        sources["ptx"] = (config["ptx_dataset"] or config["dataset"], "train", "demonstrations")
    try:
        sets = {name: load_rows(path, split, kind=of) for name, (path, split, of) in sources.items()}
        if text:
            sets["ptx"] = load_text(text, TextConfig(text_field=config["text_field"], documents=config["documents"]))[
                "train"
            ]
    except UserError:
        return None
    if joint_fingerprint(sets) != artifact.manifest.data.get("fingerprint"):
        return None
    return {key for name, loaded in sets.items() if name != "validation" for row in loaded.rows for key in keys(row)}
