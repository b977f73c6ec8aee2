"""Overlap of the prompts that models are judged on with those that they were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.base.errors import UserError
from rlhf.config import TextConfig
from rlhf.data_prep.corpus import load_text
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import joint_fingerprint, load_rows
from rlhf.data_prep.stage_rows import Kind
from rlhf.registry import IMPORTED, Artifact, Lineage, Registry

#: Kind of the rows that a stage trains on.
_KINDS: dict[str, Kind] = {"sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}


class TrainingPrompts:
    """Training prompts of artefacts and their ancestors; each data set is read once."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._read: dict[str, set[str] | None] = {}

    def overlap(self, artifact: Artifact, prompts: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, int | None]:
        """Return, by artefact, the count of the prompts that its stage trained on; None where its data is gone or changed."""
        judged = [prompt_key(prompt) for prompt in prompts]
        counts: dict[str, int | None] = {}
        for ancestor in _ancestors(self.registry.lineage(artifact)):
            own = self.of(ancestor)
            counts[ancestor.reference] = None if own is None else sum(key in own for key in judged)
        return counts

    def of(self, artifact: Artifact) -> set[str] | None:
        """Return the keys of the prompts that its stage trained on; None where its data is gone or has changed."""
        if artifact.hash not in self._read:
            self._read[artifact.hash] = _training_prompts(artifact)
        return self._read[artifact.hash]


def _ancestors(line: Lineage) -> list[Artifact]:
    """Return the artefact and its ancestors that still exist, of the stages that train on prompts."""
    own = [line.artifact] if line.artifact is not None and line.artifact.stage in _KINDS else []
    everyone = [*own, *(ancestor for parent in line.parents for ancestor in _ancestors(parent))]
    return list({ancestor.reference: ancestor for ancestor in everyone}.values())


def _training_prompts(artifact: Artifact) -> set[str] | None:
    """Return the keys of an artefact's training prompts; None where its data has another fingerprint, or is gone."""
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
    return {
        prompt_key(row["prompt"])
        for name, loaded in sets.items()
        if name != "validation" and "prompt" in loaded.rows.column_names
        for row in loaded.rows
    }
