"""What the three runners share: the run's surroundings, trainer arguments, and the manifest of what they register."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from rlhf.base import distributed, storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.base.redaction import redact
from rlhf.config import StageConfig, TrainingConfig
from rlhf.data_prep.load import Loaded
from rlhf.doctor.health.findings import actions
from rlhf.doctor.preflight.check import Check, require_all
from rlhf.doctor.preflight.context import PreflightContext
from rlhf.models.compute import Compute
from rlhf.models.tokenization import stop_token_ids, tokenizer_hashes
from rlhf.registry import MANIFEST, Artifact, Reference, Registry, recipe_hash
from rlhf.run import checkpoint, memory, terminal
from rlhf.run.timing import PhaseTimer
from rlhf.run.tracker import RUN_FILE, Tracker


@dataclass
class Run:
    """One execution of a stage."""

    stage: str
    config: TrainingConfig
    folder: Path
    registry: Registry
    compute: Compute
    tracker: Tracker
    parents: list[Artifact]
    data: dict[str, Any]
    recipe: str
    timer: PhaseTimer
    started: float = field(default_factory=time.perf_counter)

    def publish(
        self,
        write: Callable[[Path], None],
        *,
        base_model: str,
        base_model_revision: str | None,
        tokenizer: PreTrainedTokenizerBase,
        metrics: dict[str, Any],
        name: str | None = None,
        kind: Literal["adapter", "full"] = "adapter",
        reward_mean: float | None = None,
        reward_std: float | None = None,
    ) -> Artifact:
        """Registers what the stage made, with its figures, seconds and phases, under the run's name or another."""

        if distributed.rank() > 0:
            distributed.wait()
            return self.registry.get(f"{self.stage}/{name or self.config.name}")

        def write_all(folder: Path) -> None:
            write(folder)
            tokenizer.save_pretrained(folder)

        artifact = self._registered(name or self.config.name) or self.registry.publish(
            self.stage,
            name or self.config.name,
            write_all,
            kind=kind,
            parents=self.parents,
            base_model=base_model,
            base_model_revision=base_model_revision,
            **tokenizer_hashes(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            stop_token_ids=stop_token_ids(tokenizer),
            reward_mean=reward_mean,
            reward_std=reward_std,
            data=self.data,
            config=redact(dataclasses.asdict(self.config)),
            recipe=self.recipe,
            metrics={
                **metrics,
                "seconds": round(time.perf_counter() - self.started, 1),
                "phases": self.timer.summary(),
            },
            wandb_run_id=self.tracker.run_id,
        )
        distributed.wait()
        self.tracker.log_artifact(artifact.reference, artifact.path, {**metrics, "hash": artifact.hash})
        if artifact.name == self.config.name:
            shutil.copy(artifact.path / MANIFEST, self.folder)  # the run's folder can then speak for itself
        print(f"registered {artifact.reference} in {self.registry.root}", flush=True)
        return artifact

    def _registered(self, name: str) -> Artifact | None:
        """What this very run registered before it was killed and resumed, if it came so far."""
        made = self.registry.find(self.stage, name, self.recipe) if self.config.resume else None
        return made if made and made.manifest.wandb_run_id == self.tracker.run_id else None


def stage_recipe(config: TrainingConfig, parents: Sequence[Artifact], data: dict[str, Any]) -> str:
    """Hash of everything that decides the stage's result: options, parents, data."""
    return recipe_hash(config.recipe(), [p.hash for p in parents], data["fingerprint"])


def finished_already(stage: str, config: TrainingConfig, recipe: str) -> Artifact | None:
    """The registered artefact of the same recipe, if there is one."""
    artifact = Registry(config.registry).find(stage, config.name, recipe)
    if artifact is not None:
        print(f"{stage}: {artifact.reference} has this recipe already, skipped", flush=True)
    return artifact


@contextmanager
def open_run(
    stage: str, config: TrainingConfig, parents: list[Artifact], data: dict[str, Any], recipe: str
) -> Iterator[Run]:
    """Seeds, chooses device and type, opens the tracker; the run's folder is `output_dir/STAGE`."""
    Reference(stage, config.name)  # a name that cannot be registered must not show after the training
    actions(config.doctor)  # nor a slip in `doctor` at the first finding
    _quiet()
    distributed.start()
    set_seed(config.seed)
    compute = Compute.choose(config)
    folder = Path(config.output_dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.rank() == 0:
        _claim_checkpoints(folder / "checkpoints", config, parents, data)
        processes = f" in {distributed.size()} processes" if distributed.size() > 1 else ""
        print(f"{stage}: {config.name} on {compute}{processes}; data {data['rows']}; logs in {folder}", flush=True)
    distributed.wait()
    timer = PhaseTimer()
    with (
        _log_folder(folder) as logs,
        Tracker(
            logs,
            stage=stage,
            name=f"{config.name}-{stage}",
            group=config.wandb_group or config.name,
            config=dataclasses.asdict(config),
            wandb_mode=config.wandb_mode if distributed.rank() == 0 else "disabled",
            wandb_project=config.wandb_project,
            resume=config.resume,
        ) as tracker,
        terminal.view(f"{stage}: {config.name} on {compute}"),
        memory.explained(timer),
    ):
        for parent in parents:
            tracker.use_artifact(parent.reference, parent.hash, parent.path)
        tracker.use_data(config.dataset, data)
        yield Run(stage, config, folder, Registry(config.registry), compute, tracker, parents, data, recipe, timer)


@contextmanager
def _log_folder(folder: Path) -> Iterator[Path]:
    """Where this process logs: only what the first one writes is kept."""
    if distributed.rank() == 0:
        yield folder
        return
    with tempfile.TemporaryDirectory() as passing:
        yield Path(passing)


def require_one_process(stage: str) -> None:
    """Refuses a launcher's several processes: their gradients would not be added up."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"the {stage} stage runs in one process; only ppo can be started with torchrun")


def _quiet() -> None:
    """Keeps the libraries' own deprecations, which no user can mend, and progress bars out of logs and of the live view."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _claim_checkpoints(folder: Path, config: TrainingConfig, parents: list[Artifact], data: dict[str, Any]) -> None:
    """Makes the folder this run's own, so that checkpoints of another run are neither resumed from nor kept in place of its.

    Raises:
        UserError: with `resume`, when the checkpoints there were made with other options, data or parents.
    """
    inputs = {"dataset": data["fingerprint"], **{parent.stage: parent.hash for parent in parents}}
    made_of, mark = redact({**config.recipe(), **inputs}), folder / "made_of.json"
    if not config.resume:
        # The id goes first: killed between these lines, a resumed run must not take the results of the run before for its own.
        (folder.parent / RUN_FILE).unlink(missing_ok=True)
        if folder.exists():
            previous = folder.with_name("checkpoints.previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
    checkpoint.clear(folder)
    if mark.is_file() or checkpoint.latest(folder):
        before = read_object(mark, fix="start anew without --resume") if mark.is_file() else {}
        if changed := sorted(k for k, v in made_of.items() if k not in before or before[k] != v):
            raise UserError(
                f"the checkpoints in {folder} were made with other options or inputs ({', '.join(changed)}); "
                "use the same ones again, or start anew without --resume"
            )
        return
    folder.mkdir(exist_ok=True)
    storage.write_text(mark, json.dumps(made_of, indent=2))


def preflight(
    run: Run,
    examine: Callable[[PreflightContext], list[Check]],
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Loaded],
) -> None:
    """Runs a stage's checks, unless they are switched off.

    Args:
        sets: the stage's data; it trains on all but `validation`. Plain text has no prompts, and is not looked at.

    Raises:
        UserError: checks failed; nothing was trained.
    """

    def checks() -> list[Check]:
        assert isinstance(run.config, StageConfig)
        training = {
            name: rows for name, rows in sets.items() if name != "validation" and "prompt" in rows.rows.column_names
        }
        return examine(
            PreflightContext(
                config=run.config,
                compute=run.compute,
                folder=run.folder,
                registry=run.registry.root,
                parents=run.parents,
                tokenizer=tokenizer,
                training=training,
                validation=sets["validation"],
            )
        )

    passes(run, checks)


def passes(run: Run, checks: Callable[[], list[Check]]) -> None:
    """Makes the checks, unless they are switched off.

    Raises:
        UserError: some failed.
    """
    if run.config.preflight:
        with run.timer.phase("preflight"):
            require_all(checks(), "preflight")
