"""Replay of an artefact from its manifest, compared with the original: `rlhf registry reproduce REF`

The replay uses the recorded options, data and copies of the recorded parents, in a registry of its own. On the same machine
with the same libraries it gives the same bytes. With `--ancestors` each ancestor is replayed from its recorded parents, too:
if each step gives the same files, so does the whole chain.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rlhf.base.errors import UserError
from rlhf.config import STAGE_CONFIGS, TrainingConfig, is_registered_reward
from rlhf.registry import IMPORTED, Artifact, Registry, library_versions
from rlhf.registry.lineage import ancestors, different_files
from rlhf.sharing.hub import install
from rlhf.stages.data import describe_data


class Outcome(NamedTuple):
    """Result of a replay."""

    reference: str
    """The recorded artefact."""
    different: list[str]
    """Files that differ; empty for a reproduction."""
    software: list[str]
    """Libraries whose version differs from the record: `torch 2.13.0, was 2.12.0`."""


def reproduce(
    registry: Registry,
    artifact: Artifact,
    folder: Path,
    *,
    whole_chain: bool = False,
    log: Callable[[str], None] = print,
) -> list[Outcome]:
    """Replay an artefact, after its ancestors if `whole_chain`, and return an outcome for each replay.

    Args:
        artifact: verified.
        folder: new or empty folder for the replays' `registry` and `outputs`.
        log: called with a line before each replay.

    Raises:
        UserError: a stage without training, data that are missing or changed, or options of another version.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --into")
    lines = ancestors(registry.lineage(artifact))
    chain = [line.artifact for line in lines if line.artifact is not None] if whole_chain else [artifact]
    for one in chain:
        if one.stage not in STAGE_CONFIGS or IMPORTED in one.manifest.config:
            raise UserError(f"{one.reference} was not made by training, so it cannot be replayed")
        _check_data(one)  # of all, before the first one trains
    outcomes = []
    for one in chain:
        log(f"replaying {one.reference}")
        outcomes.append(_replay(registry, one, folder / f"{one.stage}-{one.name}-{one.version}"))
    return outcomes


def _replay(registry: Registry, artifact: Artifact, folder: Path) -> Outcome:
    scratch = Registry(folder / "registry")
    for line in ancestors(registry.lineage(artifact))[:-1]:
        assert line.artifact is not None, "a verified artefact has all its parents"
        install(scratch, line.artifact.path, line.artifact)
    config = replayed_config(artifact, folder)
    stage: Any = importlib.import_module(f"rlhf.stages.{artifact.stage}")
    stage.run(config)
    replayed = scratch.get(f"{artifact.stage}/{artifact.name}")
    different = different_files(artifact.manifest.files, replayed.manifest.files)
    recorded, now = artifact.manifest.library_versions, library_versions()
    software = [
        f"{name} {now.get(name)}, was {version}" for name, version in recorded.items() if now.get(name) != version
    ]
    return Outcome(artifact.reference, different, software)


def replayed_config(artifact: Artifact, folder: Path) -> TrainingConfig:
    """Return the recorded options with another registry and output folder, and with parents by their exact versions."""
    kind, recorded = STAGE_CONFIGS[artifact.stage], artifact.manifest.config
    if unknown := sorted(set(recorded) - {field.name for field in dataclasses.fields(kind)}):
        raise UserError(f"{artifact.reference} was made by another version of rlhf: no option {', '.join(unknown)}")
    parents = {parent.stage: str(parent.reference) for parent in artifact.manifest.parents}
    inputs: dict[str, Any] = {}
    if "pretrain" in parents:
        inputs["model_name_or_path"] = parents["pretrain"]
    if recorded.get("policy"):
        inputs["policy"] = parents["sft"]
    if recorded.get("selection_reward"):
        inputs["selection_reward"] = parents["reward"]
    if isinstance(recorded.get("reward"), list):
        inputs["reward"] = [parents["reward"] if is_registered_reward(r) else r for r in recorded["reward"]]
    place = {"registry": str(folder / "registry"), "output_dir": str(folder / "outputs")}
    return kind(**{**recorded, **inputs, **place, "resume": False, "trackers": ["none"]})


def _check_data(artifact: Artifact) -> None:
    """Raise `UserError` if the data have changed, before hours of training on them."""
    stage: Any = importlib.import_module(f"rlhf.stages.{artifact.stage}")
    config = replayed_config(artifact, Path())
    now, recorded = (
        describe_data(stage.data_sets(config))["fingerprint"],
        str(artifact.manifest.data.get("fingerprint")),
    )
    if now != recorded:
        raise UserError(
            f"the data in {config.dataset} changed since {artifact.reference} was made from them (fingerprint {now[:12]}, not "
            f"{recorded[:12]}); restore them to reproduce it"
        )


def command(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Replay an artefact and print the differences: the verb `reproduce`."""
    artifact = registry.get(arguments.ref)
    outcomes = reproduce(registry, artifact, arguments.into, whole_chain=arguments.ancestors)
    for one in outcomes:
        console.print(f"{'DIFFERS' if one.different else 'same'}  {one.reference}", soft_wrap=True)
        for line in (*one.different, *one.software):
            console.print(f"    {line}", soft_wrap=True)
    if any(one.different for one in outcomes):
        raise UserError("the replay differs; see the lines above (another machine or other libraries?)")
