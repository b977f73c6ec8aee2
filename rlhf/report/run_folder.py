"""The content of a run's folder, as far as it can be read, and whether several runs can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import entries, finite_number, parse_object, read_bytes, section
from rlhf.base.reading import FolderReader
from rlhf.registry import MANIFEST
from rlhf.registry.outcome import overlap_lines
from rlhf.report import kinds
from rlhf.run.metrics import LogRow

STAGES = ("sft", "reward", "ppo")
"""Stages of every run; pretraining comes before them where a run has it."""
TITLES = {"pretrain": "Pretraining", "sft": "SFT", "reward": "Reward model", "ppo": "PPO"}
"""Names of all stages, in their order."""


@dataclass
class RunFolder(FolderReader):
    """The content of one folder, as far as it can be read."""

    label: str = ""
    places: dict[str, Path] = field(default_factory=dict)
    """Folder of each stage; those of parents may lie elsewhere."""
    results: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows of `metrics.jsonl` by stage."""
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: the manifest's fields, and its `hash`."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`tracking.json` by stage."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """PPO's `comparison.jsonl`: answers to the held-out prompts before and after."""
    reward_card: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """`evaluation.json`, as `rlhf.evaluation` describes it."""
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    """`samples.jsonl` beside it, which only the comparison reads."""

    @property
    def stages(self) -> list[str]:
        """Stages with a log, a manifest or a record."""
        return [s for s in TITLES if self.metrics.get(s) or self.manifests.get(s) or self.records.get(s)]

    @property
    def expected(self) -> tuple[str, ...]:
        """Stages that a run in this folder has when it is done: all, or the one whose own folder it is."""
        return tuple(self.places) if self.folder in self.places.values() else STAGES

    @property
    def is_run(self) -> bool:
        """True for all folders but those that hold nothing besides an evaluation of other runs."""
        return bool(self.stages or self.results) or not self.evaluation

    def config(self, stage: str) -> dict[str, Any]:
        """Return the resolved options of a stage."""
        return section(self.manifests.get(stage, {}), "config") or section(self.records.get(stage, {}), "config")

    @property
    def rewards(self) -> list[str]:
        """PPO's rewards, as its options name them; older runs have one, which is no list."""
        names = self.config("ppo").get("reward") or []
        return [str(name) for name in ([names] if isinstance(names, str) else names)]

    def figures(self, stage: str) -> dict[str, Any]:
        """Return the final figures of a stage."""
        return section(self.results, stage) or section(self.manifests.get(stage, {}), "metrics")

    def phases(self) -> list[dict[str, Any]]:
        """Return seconds and peak memory of the phases, each with its stage."""
        return mappings(self.results, "phases") or [
            {"stage": stage, **row}
            for stage, manifest in self.manifests.items()
            for row in mappings(section(manifest, "metrics"), "phases")
        ]

    def run_id(self, stage: str) -> str:
        """Return the W&B run id, or an empty string."""
        return str(self.records.get(stage, {}).get("run_id") or self.manifests.get(stage, {}).get("wandb_run_id") or "")

    def parents(self, stage: str) -> dict[str, str]:
        """Return the artefacts that a stage started from: reference -> hash."""
        if stage in self.manifests:
            parents = mappings(self.manifests[stage], "parents")
            return {f"{p.get('stage')}/{p.get('name')}@{p.get('version')}": str(p.get("hash")) for p in parents}
        return {str(k): str(v) for k, v in section(self.records.get(stage, {}), "inputs").items()}

    def source(self, stage: str) -> dict[str, str]:
        """Return the origin of a stage's figures: `run_id` and `manifest`, its hash."""
        digest = self.manifests.get(stage, {}).get("hash") or self.artifact(stage).get("hash")
        return {"run_id": self.run_id(stage), "manifest": str(digest or "")}

    def artifact(self, stage: str) -> dict[str, Any]:
        """Return what the results name as a stage's artefact: `reference` and `hash`."""
        return section(section(self.results, "artifacts"), stage)

    def evaluated_models(self) -> list[dict[str, str]]:
        """Return the models of the evaluation: `label`, `run_id` and `manifest`."""
        return [
            {"label": str(m.get("name")), "run_id": str(m.get("run_id") or ""), "manifest": str(m.get("hash") or "")}
            for m in mappings(self.evaluation, "models")
        ]


def mappings(tree: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in the list under a name, without its other entries."""
    return [entry for entry in entries(tree, name) if isinstance(entry, dict)]


def series(rows: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[Any, float]]:
    """Return the steps and values of a metric, for the log lines that have it."""
    return [(row.get("step"), value) for row in rows if (value := finite_number(row.get(metric))) is not None]


def read_run(folder: Path, registry: Path | None = None) -> RunFolder:
    """Read a run as far as possible.

    Args:
        registry: where manifests are looked for when the folder has none.

    Raises:
        UserError: there is no such folder, or no file of a run in it.
    """
    if not folder.is_dir():
        siblings = [str(p) for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"no run {folder}{did_you_mean(str(folder), siblings)}; give the folder that a run wrote")
    run = RunFolder(folder)
    places = {stage: f"{stage}/" for stage in TITLES if (folder / stage).is_dir()}
    if (folder / "tracking.json").is_file() or (folder / "metrics.jsonl").is_file():
        stage = RunFolder(folder).read_object("tracking.json", kinds.Record).get("stage")
        places = {stage if stage in TITLES else folder.name: ""}
    run.places = {stage: folder / place for stage, place in places.items()}
    run.results = run.read_object("results.json", kinds.Results)
    run.evaluation = run.read_object("evaluation.json", kinds.Evaluation)
    if not places and not run.results and not run.evaluation and not run.problems:
        raise UserError(
            f"{folder} holds no run: no folder sft, reward, ppo or pretrain, no results.json and no evaluation.json is in it"
        )
    for stage, place in places.items():
        run.records[stage] = run.read_object(f"{place}tracking.json", kinds.Record)
        run.metrics[stage] = run.read_rows(f"{place}metrics.jsonl", LogRow)
        if manifest := _manifest(run, stage, folder / place, registry):
            run.manifests[stage] = manifest
    if "reward" in places:
        run.reward_card = run.read_object(f"{places['reward']}card.json", kinds.Card)
    if "ppo" in places:
        run.samples = run.read_rows(f"{places['ppo']}comparison.jsonl", kinds.Answers, expected=False)
    return run


def _manifest(run: RunFolder, stage: str, place: Path, registry: Path | None) -> dict[str, Any]:
    """Return the manifest beside the stage's log, or a registry's of the artefact that the results name; {} for none."""
    artifact = run.artifact(stage)
    roots = [run.folder / "registry", *([registry] if registry else [])]
    candidates = [place / MANIFEST, *_registered(roots, str(artifact.get("reference", "")))]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return {}
    content = _read_manifest(run, stage, file)
    if content and artifact.get("hash") not in (None, content["hash"]):
        run.problems.append(f"{file.name} of its {stage} stage is not the one that results.json names")
    return content


def _registered(roots: Iterable[Path], reference: str) -> list[Path]:
    """Return the places of an artefact's manifest in registries."""
    name, _, version = reference.partition("@")
    return [root / name / f"v{version}" / MANIFEST for root in roots] if version else []


def _read_manifest(run: RunFolder, stage: str, file: Path) -> dict[str, Any]:
    """Return a manifest's fields and its `hash`; {} for one that cannot be read, which is noted."""
    try:
        raw = read_bytes(file)
        content = parse_object(raw, file, nan_as_none=True)
    except (OSError, UserError):
        run.problems.append(f"{file.name} of its {stage} stage is corrupt")
        return {}
    fields = run.fit(content, kinds.Manifest, f"{file.name} of its {stage} stage")
    return {**fields, "hash": hashlib.sha256(raw).hexdigest()}


def read_parents(run: RunFolder, registry: Path | None = None) -> None:
    """Add the stages that a run was made from and that ran in other folders, as far as they are still there.

    Manifest and report card come from the registry, the log from the folder that the manifest names.
    """
    waiting = [parent for stage in run.stages for parent in run.parents(stage).items()]
    for reference, digest in waiting:
        stage = reference.partition("/")[0]
        if stage not in TITLES or stage in run.stages:
            continue
        options = (run.config(own).get("registry") for own in run.stages)
        roots = [run.folder / "registry", *([registry] if registry else []), *(Path(str(o)) for o in options if o)]
        file = next((file for file in _registered(roots, reference) if file.is_file()), None)
        content = _read_manifest(run, stage, file) if file else {}
        if file is None or content.get("hash") != digest:
            continue
        run.manifests[stage] = content
        waiting += run.parents(stage).items()
        if stage == "reward":
            run.reward_card = RunFolder(file.parent).read_object("card.json", kinds.Card)
        place = RunFolder(Path(str(run.config(stage).get("output_dir", ""))) / stage)
        record = place.read_object("tracking.json", kinds.Record)
        if record.get("run_id") and record["run_id"] == content.get("wandb_run_id"):
            run.places[stage], run.records[stage] = place.folder, record
            run.metrics[stage] = place.read_rows("metrics.jsonl", LogRow)


def judge_of(run: RunFolder) -> str:
    """Return the name of the judge from outside that PPO's answers were shown to."""
    function = str(run.config("ppo").get("gold") or run.config("reward").get("gold") or "")
    name = function.rpartition(":")[2]
    return {"": "the independent judge", "vader": "VADER"}.get(name, name)


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from one another; equal paths get numbers."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, 1)]


def comparability(runs: Sequence[RunFolder]) -> list[str]:
    """Return why figures of these runs must not be compared, a line each; [] where they may be."""
    marks = []
    for kind, identity in (("reward models", _rewards), ("held-out prompts", _held_out_prompts)):
        identities = {run.label: value for run in runs if (value := identity(run)) is not None}
        if len({key for key, _ in identities.values()}) > 1:
            names = ", ".join(f"{label}: {name}" for label, (_, name) in identities.items())
            marks.append(f"the runs have different {kind}, so that their scores cannot be compared ({names})")
    return marks


def _rewards(run: RunFolder) -> tuple[str, str] | None:
    """Return a key of PPO's rewards, equal for equal ones, and their names; None for a run that left neither."""
    adapters = {ref: digest for ref, digest in run.parents("ppo").items() if ref.startswith("reward/")}
    artifact = run.artifact("reward")
    if not adapters and not run.parents("ppo") and artifact.get("hash"):
        adapters = {str(artifact.get("reference")): str(artifact["hash"])}
    others = [reward for reward in run.rewards if not reward.startswith("reward/")]
    if not adapters and not others:
        return None
    names = [*(f"{ref} {digest[:8]}" for ref, digest in adapters.items()), *others]
    return json.dumps([sorted(adapters.values()), sorted(others)]), " + ".join(names)


def _held_out_prompts(run: RunFolder) -> tuple[str, str] | None:
    """Return a key of the prompts of a run's samples, and a name; None for a run without samples."""
    prompts = [str(row.get("prompt")) for row in run.samples]
    if not prompts:
        return None
    digest = hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()
    return digest, f"{len(prompts)} prompts {digest[:8]}"


def overlaps(runs: Sequence[RunFolder]) -> list[str]:
    """Return the reasons to distrust held-out figures, a line each: prompts that were trained on, and an evaluation's own."""
    marks = []
    for run in runs:
        prefix = f"{run.label}: " if run.label else ""
        for stage, manifest in run.manifests.items():
            lines = overlap_lines(stage, section(manifest, "data"), f" of its {stage} stage")
            marks += [f"{prefix}{line}, so that its figures flatter it" for line in lines]
        marks += [f"{prefix}{mark}" for mark in entries(run.evaluation, "marks")]
        for model in mappings(run.evaluation, "models"):
            marks += [f"{prefix}{model.get('name')}: {mark}" for mark in entries(model, "marks")]
    return marks
