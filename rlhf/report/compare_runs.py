"""What the folder of a run holds, as far as it can be read, and whether several runs can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import decode, entries, read_jsonl, read_object, section
from rlhf.report.figures import STAGES


@dataclass
class RunFolder:
    """What one folder holds, as far as it can be read."""

    folder: Path
    label: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: the manifest's fields, its `hash`, and the `file` it was read from."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: `tracking.json`."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    reward_card: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """`evaluation.json`, as `rlhf.evaluation` describes it."""
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    """`samples.jsonl` beside it."""
    problems: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[str]:
        """The stages of which anything is known."""
        return [s for s in STAGES if self.metrics.get(s) or self.manifests.get(s) or self.records.get(s)]

    @property
    def is_run(self) -> bool:
        """Whether it gets a column of its own: a folder that holds an evaluation only speaks of other runs."""
        return bool(self.stages or self.results) or not self.evaluation

    def config(self, stage: str) -> dict[str, Any]:
        """The resolved options of a stage."""
        return section(self.manifests.get(stage, {}), "config") or section(self.records.get(stage, {}), "config")

    def figures(self, stage: str) -> dict[str, Any]:
        """The final figures of a stage."""
        return section(self.results, stage) or section(self.manifests.get(stage, {}), "metrics")

    def phases(self) -> list[dict[str, Any]]:
        """Seconds and peak memory of the phases, with their stage."""
        return mappings(self.results, "phases") or [
            {"stage": stage, **row}
            for stage, manifest in self.manifests.items()
            for row in mappings(section(manifest, "metrics"), "phases")
        ]

    def run_id(self, stage: str) -> str:
        """The W&B run id, or an empty string."""
        return str(self.records.get(stage, {}).get("run_id") or self.manifests.get(stage, {}).get("wandb_run_id") or "")

    def parents(self, stage: str) -> dict[str, str]:
        """Reference -> hash of what a stage started from."""
        if stage in self.manifests:
            listed = mappings(self.manifests[stage], "parents")
            return {f"{p.get('stage')}/{p.get('name')}@{p.get('version')}": str(p.get("hash")) for p in listed}
        return {str(k): str(v) for k, v in section(self.records.get(stage, {}), "inputs").items()}

    def source(self, stage: str) -> dict[str, str]:
        """Run id and manifest hash: where a figure of this stage comes from."""
        named = section(section(self.results, "artifacts"), stage).get("hash")
        return {"run_id": self.run_id(stage), "manifest": str(self.manifests.get(stage, {}).get("hash") or named or "")}


def mappings(tree: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects in a list of a JSON object, as far as there are any."""
    return [entry for entry in entries(tree, name) if isinstance(entry, dict)]


def read_run(folder: Path, registry: Path | None = None) -> RunFolder:
    """Whatever can be read of a run.

    Raises:
        UserError: there is no such folder, or nothing in it was written by a run.
    """
    if not folder.is_dir():
        siblings = [str(p) for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"no run {folder}{did_you_mean(str(folder), siblings)}; give the folder that a run wrote")
    run = RunFolder(folder)
    places = {stage: folder / stage for stage in STAGES if (folder / stage).is_dir()}
    if (folder / "tracking.json").is_file() or (folder / "metrics.jsonl").is_file():
        stage = _object(folder / "tracking.json", RunFolder(folder)).get("stage")
        places = {stage if stage in STAGES else folder.name: folder}
    run.results = _object(folder / "results.json", run)
    run.evaluation = _object(folder / "evaluation.json", run)
    if not places and not run.results and not run.evaluation and not run.problems:
        raise UserError(
            f"{folder} holds no run: no sft, reward or ppo folder, no results.json and no evaluation.json is in it"
        )
    for stage, place in places.items():
        run.records[stage] = _object(place / "tracking.json", run)
        run.metrics[stage] = _rows(place / "metrics.jsonl", run, expected=True)
        manifest = _manifest(stage, place, run, registry)
        if manifest:
            run.manifests[stage] = manifest
    if unregistered := [stage for stage in places if stage not in run.manifests]:
        run.problems.append(
            f"no readable manifest of {', '.join(unregistered)}: options and parents are known only as far as the run logged them"
        )
    if run.evaluation:
        run.evaluated = _rows(folder / "samples.jsonl", run, expected=True)
    if "reward" in places:
        run.reward_card = _object(places["reward"] / "card.json", run)
    if "ppo" in places:
        run.samples = _rows(places["ppo"] / "comparison.jsonl", run, expected=False)
    return run


def _object(file: Path, run: RunFolder) -> dict[str, Any]:
    """A JSON object; {} where there is none, with a note where there is something else."""
    name = str(file.relative_to(run.folder))
    try:
        return read_object(file, fix="the page is made without it", nan_as_none=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        run.problems.append(f"{name} cannot be read ({error.strerror})")
    except UserError as error:
        run.problems.append(str(error).replace(str(file), name))
    return {}


def _rows(file: Path, run: RunFolder, *, expected: bool) -> list[dict[str, Any]]:
    name = file.relative_to(run.folder)
    try:
        rows, bad = read_jsonl(file)
    except FileNotFoundError:
        rows, bad = [], 0
        if expected:
            run.problems.append(f"{name} is not there")
    except OSError as error:
        run.problems.append(f"{name} cannot be read ({error.strerror})")
        return []
    if bad:
        run.problems.append(f"{name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    return rows


def _manifest(stage: str, place: Path, run: RunFolder, registry: Path | None) -> dict[str, Any]:
    """The manifest that the run left beside its log, or that a registry has of what its results name."""
    made = section(section(run.results, "artifacts"), stage)
    name, _, version = str(made.get("reference", "")).partition("@")
    candidates = [place / "manifest.json"]
    if version:
        roots = [run.folder / "registry", *([registry] if registry else [])]
        candidates += [root / name / f"v{version}" / "manifest.json" for root in roots]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return {}
    try:
        raw = file.read_bytes()
        content = decode(raw)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        run.problems.append(f"{file.name} of its {stage} stage is corrupt")
        return {}
    digest = hashlib.sha256(raw).hexdigest()
    if made.get("hash") not in (None, digest):
        run.problems.append(f"{file.name} of its {stage} stage is not the one that results.json names")
    return {**content, "hash": digest, "file": str(file)}


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a folder that is given twice gets a number."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, 1)]


def comparability(runs: Sequence[RunFolder]) -> list[str]:
    """Why figures of these runs must not be held against each other; empty when they may."""
    marks = []
    for what, identity in (("reward models", _scored_by), ("held-out prompts", _asked)):
        known = {run.label: value for run in runs if (value := identity(run)) is not None}
        if len({key for key, _ in known.values()}) > 1:
            named = ", ".join(f"{label}: {name}" for label, (_, name) in known.items())
            marks.append(f"the runs have different {what}, so that their scores cannot be compared ({named})")
    return marks


def _scored_by(run: RunFolder) -> tuple[str, str] | None:
    """The rewards of PPO: a key that is equal for equal ones, and what to call them; None where nothing is known."""
    adapters = {ref: digest for ref, digest in run.parents("ppo").items() if ref.startswith("reward/")}
    made = section(section(run.results, "artifacts"), "reward")
    if not adapters and not run.parents("ppo") and made.get("hash"):
        adapters = {str(made.get("reference")): str(made["hash"])}
    configured = run.config("ppo").get("reward") or []
    rewards = [configured] if isinstance(configured, str) else configured
    others = [str(reward) for reward in rewards if not str(reward).startswith("reward/")]
    if not adapters and not others:
        return None
    names = [*(f"{ref} {digest[:8]}" for ref, digest in adapters.items()), *others]
    return json.dumps([sorted(adapters.values()), sorted(others)]), " + ".join(names)


def _asked(run: RunFolder) -> tuple[str, str] | None:
    """The held-out prompts that were answered, as above."""
    prompts = [str(row.get("prompt")) for row in run.samples]
    if not prompts:
        return None
    digest = hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()
    return digest, f"{len(prompts)} prompts {digest[:8]}"


def overlaps(runs: Sequence[RunFolder]) -> list[str]:
    """Runs whose held-out prompts are among the prompts that they, or the models they come from, were trained on; and what
    an evaluation says about its own."""
    marks = []
    for run in runs:
        prefix = f"{run.label}: " if run.label else ""
        for stage, manifest in run.manifests.items():
            overlap = section(section(manifest, "data"), "overlap")
            for trained_on, count in section(overlap, "in_training").items():
                if count:
                    marks.append(
                        f"{prefix}{count} of the {overlap.get('held_out')} held-out prompts of its {stage} stage are among "
                        f"those that {trained_on} was trained on, so that its figures flatter it"
                    )
        marks += [f"{prefix}{mark}" for mark in entries(run.evaluation, "marks")]
        for model in mappings(run.evaluation, "models"):
            marks += [f"{prefix}{model.get('name')}: {mark}" for mark in entries(model, "marks")]
    return marks
