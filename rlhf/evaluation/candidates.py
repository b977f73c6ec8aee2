"""Policies of a comparison: registered ones and snapshots of PPO runs, checked for comparability."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object
from rlhf.base.storage import sha256_file
from rlhf.config import EvaluationConfig, is_registered_reward
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.registry import Artifact, Registry
from rlhf.run import checkpoint


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy to be measured."""

    name: str
    """`ppo/demo@1`, or `RUN:UPDATE` of a snapshot."""
    hash: str
    """Hash of the manifest, or of a snapshot's weights."""
    sft: Artifact | None
    """The SFT policy itself, or the one below its adapter; None: a whole model."""
    folder: Path | None
    """Folder of the adapter or the whole model; None: an SFT policy."""
    artifact: Artifact | None = None
    """None: a snapshot."""
    run: str | None = None
    """The PPO run of a snapshot."""
    update: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The policies of a comparison, their reference and their proxy reward."""

    models: list[Candidate]
    """The reference and the baseline, then the others as named."""
    snapshots: list[Candidate]
    reference: Artifact
    """The SFT policy to which KL is measured."""
    reward: str
    """Name of the proxy, the reward that scores the answers."""
    baseline: str
    """Name of the model with which the others are compared."""
    marks: list[str]
    """Warnings for readers of the comparison."""


@dataclass(frozen=True)
class _Origin:
    """Properties that PPO policies must share to be comparable."""

    sft: str
    """Hash of the SFT policy."""
    rewards: tuple[str, ...]
    """Hash of the reward model, then names of other rewards."""
    prompts: str
    """Fingerprint of the training prompts."""


@dataclass(frozen=True)
class _Run:
    """A PPO run's folder that has snapshots."""

    name: str
    snapshots: dict[int, Path]
    sft: Artifact
    reward: str
    """Name of the (first) reward."""
    origin: _Origin


def gather(config: EvaluationConfig, registry: Registry) -> Comparison:
    """Return the models and snapshots that the options name.

    Raises:
        UserError: a model or run that does not exist (the nearest name is offered); PPO policies of different SFT policies,
            rewards or prompts without `force`; no reward to use; different tokenizers.
    """
    named = [_policy(registry, name) for name in config.models]
    runs, broken = _read_runs(config.runs, registry)
    reference = _reference(config, registry, named, runs)
    baseline = _policy(registry, config.baseline) if config.baseline else reference
    artifacts = {artifact.reference: artifact for artifact in (reference, baseline, *named)}
    for artifact in artifacts.values():
        _check_tokenizer(artifact, reference)
    origins = {a.reference: _origin(a) for a in artifacts.values() if a.stage == "ppo"}
    differences = _differences({**origins, **{run.name: run.origin for run in runs}})
    if differences and not config.force:
        raise UserError(
            f"{'; '.join(differences)}: their figures are not comparable. Leave some out, or add --force true and the result "
            "will be marked"
        )
    reward = config.reward or _default_reward(named, runs)
    reward = registry.get(reward).reference if is_registered_reward(reward) else reward
    return Comparison(
        models=[_candidate(artifact, registry) for artifact in artifacts.values()],
        snapshots=[_snapshot(run, update, path) for run in runs for update, path in run.snapshots.items()],
        reference=reference,
        reward=reward,
        baseline=baseline.reference,
        marks=[
            *broken,
            *_proxy_marks(named, reward),
            *(f"compared by force: {difference}" for difference in differences),
        ],
    )


# Models


def _policy(registry: Registry, name: str) -> Artifact:
    artifact = registry.get(name)
    if artifact.stage not in ("pretrain", "sft", "ppo"):
        raise UserError(f"{artifact.reference} is no policy; give pretrain/NAME, sft/NAME or ppo/NAME")
    return artifact


def _parent(artifact: Artifact, stage: str) -> str | None:
    """Return the name of the parent of a stage, `sft/demo@1`."""
    return next((str(parent.reference) for parent in artifact.manifest.parents if parent.stage == stage), None)


def _candidate(artifact: Artifact, registry: Registry) -> Candidate:
    sft = artifact if artifact.stage == "sft" else None
    if artifact.stage == "ppo" and artifact.manifest.kind == "adapter" and (parent := _parent(artifact, "sft")):
        sft = registry.get(parent)
    return Candidate(
        name=artifact.reference,
        hash=artifact.hash,
        sft=sft,
        folder=None if artifact.stage == "sft" else artifact.path,
        artifact=artifact,
    )


def _reference(config: EvaluationConfig, registry: Registry, named: list[Artifact], runs: list[_Run]) -> Artifact:
    """Return the SFT policy in the options, else that of the first PPO policy or run, else the first SFT policy."""
    if config.reference:
        return registry.get(config.reference, expect_stage="sft")
    parents = [parent for artifact in named if artifact.stage == "ppo" and (parent := _parent(artifact, "sft"))]
    if parents:
        return registry.get(parents[0])
    policies = [*(run.sft for run in runs), *(artifact for artifact in named if artifact.stage == "sft")]
    if not policies:
        raise UserError("KL needs an SFT policy as reference; name one: --reference sft/NAME")
    return policies[0]


def _default_reward(named: list[Artifact], runs: list[_Run]) -> str:
    """Return the reward of the first PPO policy or run."""
    for artifact in named:
        if artifact.stage == "ppo":
            return trained_on(artifact)
    if runs:
        return runs[0].reward
    raise UserError(
        "no model here was trained on a reward; name one to use: --reward reward/NAME, package.module:function or a URL"
    )


def trained_on(artifact: Artifact) -> str:
    """Return the (first) reward that a PPO policy was trained on."""
    return _parent(artifact, "reward") or str((artifact.option("reward") or [""])[0])


def _proxy_marks(named: list[Artifact], proxy: str) -> list[str]:
    """Return a warning for each policy that was trained on other rewards than the proxy alone."""
    marks = []
    for artifact in named:
        if artifact.stage == "ppo":
            adapter = _parent(artifact, "reward")
            own = [adapter or r if is_registered_reward(r) else str(r) for r in artifact.option("reward")]
            if own != [proxy]:
                marks.append(f"{artifact.reference} was trained on {' + '.join(own)}; the proxy here is {proxy}")
    return marks


def _check_tokenizer(artifact: Artifact, reference: Artifact) -> None:
    own, other = artifact.manifest, reference.manifest
    if (own.tokenizer_hash, own.chat_template_hash) != (other.tokenizer_hash, other.chat_template_hash):
        raise UserError(
            f"{artifact.reference} and {reference.reference} have different tokenizers or chat templates, so there is no KL "
            "between them; compare models of one base"
        )


def _origin(artifact: Artifact) -> _Origin:
    hashes = {parent.stage: parent.hash for parent in artifact.manifest.parents}
    others = [r for r in artifact.option("reward") if not is_registered_reward(r)]
    return _origin_of(hashes, others, str(artifact.manifest.data.get("fingerprint")))


def _origin_of(hashes: dict[str, Any], others: list[str], prompts: str) -> _Origin:
    adapters = [str(hashes["reward"])] if "reward" in hashes else []
    return _Origin(str(hashes["sft"]), (*adapters, *others), prompts)


def _differences(origins: dict[str, _Origin]) -> list[str]:
    """Return a sentence for each policy or run that differs from the first."""
    if not origins:
        return []
    words = {"sft": "SFT policies", "rewards": "reward models", "prompts": "training prompts"}
    (first, one), *others = origins.items()
    kinds = {name: [w for key, w in words.items() if getattr(one, key) != getattr(o, key)] for name, o in others}
    return [f"{first} and {name} have different {' and '.join(kind)}" for name, kind in kinds.items() if kind]


# Runs


def _read_runs(folders: list[str], registry: Registry) -> tuple[list[_Run], list[str]]:
    """Return the runs, and a warning for each that cannot be read: a broken folder does not cost the rest.

    Raises:
        UserError: a folder that does not exist, or two of the same name.
    """
    runs: list[_Run] = []
    broken: list[str] = []
    for name in folders:
        place = Path(name)
        if not place.is_dir():
            siblings = [str(p) for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
            raise UserError(f"no run folder {name}{did_you_mean(name, siblings)}; give the output_dir of a PPO run")
        folder = place if (place / "checkpoints").is_dir() else place / "ppo"
        try:
            runs.append(_read_run(folder, registry))
        except UserError as error:
            broken.append(f"run {name} left out: {error}")
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two runs are called {twice[0]}; rename the output folder of one")
    return runs, broken


def _read_run(folder: Path, registry: Registry) -> _Run:
    """Return a run, described by `made_of.json` beside its checkpoints."""
    mark = folder / "checkpoints" / "made_of.json"
    try:
        made_of = read_object(mark)
        others = [str(reward) for reward in made_of["other_rewards"]]
        origin = _origin_of(made_of, others, str(made_of["dataset"]))
    except (OSError, UserError, KeyError, TypeError) as error:
        raise UserError(f"{mark} is missing or half-written ({type(error).__name__})") from error
    whole = {
        update: path
        for update, path in checkpoint.snapshots(folder / "checkpoints").items()
        if (path / ADAPTER_FILE).is_file()
    }
    if not whole:
        raise UserError(f"no snapshots in {folder / 'checkpoints'}; PPO takes them with --snapshot_steps N")
    sft = _by_hash(registry, str(origin.sft))
    reward = _by_hash(registry, str(made_of["reward"])).reference if "reward" in made_of else others[0]
    return _Run(folder.resolve().parent.name, whole, sft, reward, origin)


def _by_hash(registry: Registry, digest: str) -> Artifact:
    for artifact in registry.list():
        if artifact.hash == digest:
            return registry.get(artifact.reference)
    raise UserError(f"registry {registry.root} holds no artefact with the hash {digest:.12} of its origin")


def _snapshot(run: _Run, update: int, path: Path) -> Candidate:
    return Candidate(
        name=f"{run.name}:{update}",
        hash=sha256_file(path / ADAPTER_FILE),
        sft=run.sft,
        folder=path,
        run=run.name,
        update=update,
    )
