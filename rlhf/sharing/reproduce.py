"""Makes an artefact again from its manifest, and says whether it came out the same: `python -m rlhf.registry reproduce REF`

The recorded options, data and parents are replayed in a registry of their own, next to copies of the recorded parents. On the
same machine with the same libraries the files are the same to the last byte. With `ancestors`, everything that the artefact
was made from is made again as well, each from its recorded parents: if each step gives the same files, so does the chain.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, PretrainConfig, RewardConfig, SFTConfig, TrainingConfig, reward_kind
from rlhf.registry import Artifact, Registry, library_versions
from rlhf.registry.lineage import ancestors, same_files
from rlhf.sharing.hub import install
from rlhf.stages.data import describe_data

CONFIGS: dict[str, type[TrainingConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
}


class Outcome(NamedTuple):
    """What a replay gave."""

    reference: str
    """The recorded artefact."""
    made: Artifact
    """The new one, in the registry of the replay."""
    different: list[str]
    """Files that are not the same to the last byte; empty for a reproduction."""
    software: list[str]
    """Libraries that are not those of the record: `torch 2.13.0, was 2.12.0`."""


def reproduce(
    registry: Registry,
    artifact: Artifact,
    folder: Path,
    *,
    whole_chain: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Replays an artefact, or everything it was made from and then it.

    Args:
        artifact: verified, of any stage that trains.
        folder: for the replay: `registry` and `outputs`; must not hold a replay yet.

    Raises:
        UserError: a stage that cannot be replayed, data that are gone or changed, or options of another version.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --into")
    lines = ancestors(registry.lineage(artifact))
    chain = [line.artifact for line in lines if line.artifact is not None] if whole_chain else [artifact]
    for one in chain:
        if one.stage not in CONFIGS:
            raise UserError(f"{one.reference} was not made by a stage, so it cannot be replayed")
        _check_data(one)  # all of them before the first trains
    outcomes = []
    for one in chain:
        say(f"replaying {one.reference}")
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
    made = scratch.get(f"{artifact.stage}/{artifact.name}")
    different = same_files(artifact.manifest.files, made.manifest.files)
    recorded, now = artifact.manifest.library_versions, library_versions()
    software = [
        f"{name} {now.get(name)}, was {version}" for name, version in recorded.items() if now.get(name) != version
    ]
    return Outcome(artifact.reference, made, list(different), software)


def replayed_config(artifact: Artifact, folder: Path) -> TrainingConfig:
    """The recorded options; only where the run is kept is another place, and parents are named by their exact versions."""
    kind, recorded = CONFIGS[artifact.stage], artifact.manifest.config
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(recorded) - known):
        raise UserError(f"{artifact.reference} was made by another version of rlhf: no option {', '.join(unknown)}")
    parents = {parent.stage: str(parent.reference) for parent in artifact.manifest.parents}
    named: dict[str, Any] = {}
    if "pretrain" in parents:
        named["model_name_or_path"] = parents["pretrain"]
    if recorded.get("policy"):
        named["policy"] = parents["sft"]
    if recorded.get("selection_reward"):
        named["selection_reward"] = parents["reward"]
    if isinstance(recorded.get("reward"), list):
        named["reward"] = [parents["reward"] if reward_kind(r) == "adapter" else r for r in recorded["reward"]]
    place = {"registry": str(folder / "registry"), "output_dir": str(folder / "outputs")}
    return kind(**{**recorded, **named, **place, "resume": False, "wandb_mode": "disabled"})


def _check_data(artifact: Artifact) -> None:
    """Refuses data that are not those of the record, before hours are spent on them."""
    stage: Any = importlib.import_module(f"rlhf.stages.{artifact.stage}")

    config = replayed_config(artifact, Path())
    now, recorded = describe_data(stage.data_sets(config))["fingerprint"], artifact.manifest.data["fingerprint"]
    if now != recorded:
        raise UserError(
            f"the data in {config.dataset} are not those that {artifact.reference} was made from (fingerprint {now[:12]}, not "
            f"{recorded[:12]}); bring them back to reproduce it"
        )
