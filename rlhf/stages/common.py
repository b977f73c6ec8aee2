"""What the three runners share: the run's surroundings, trainer arguments, and the manifest of what they register."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed
from transformers.utils import logging as transformers_logging

from rlhf import checkpoint, distributed, memory, optim
from rlhf.config import StageConfig, TrainingLength
from rlhf.data_prep.loading import NAMED_ROWS, Loaded, joint_fingerprint
from rlhf.doctor.checks import Check, require_all
from rlhf.doctor.preflight import Ground
from rlhf.errors import UserError
from rlhf.interrupt import StopRequest
from rlhf.models import Compute
from rlhf.registry import Artifact, Registry, recipe_hash
from rlhf.tokenization import stop_token_ids, tokenizer_hashes
from rlhf.tracking import MetricsCallback, PhaseTimer, ProgressCallback, Tracker


@dataclass
class Run:
    """One execution of a stage."""

    stage: str
    config: StageConfig
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

        artifact = self.registry.publish(
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
            config=dataclasses.asdict(self.config),
            recipe=self.recipe,
            metrics={
                **metrics,
                "seconds": round(time.perf_counter() - self.started, 1),
                "phases": self.timer.summary(),
            },
            wandb_run_id=self.tracker.run_id,
        )
        distributed.wait()
        self.tracker.log_artifact(artifact.reference, artifact.path, metrics)
        print(f"registered {artifact.reference} in {self.registry.root}", flush=True)
        return artifact


def stage_recipe(config: StageConfig, parents: Sequence[Artifact], data: dict[str, Any]) -> str:
    """Hash of everything that decides the stage's result: options, parents, data."""
    return recipe_hash(config.recipe(), [p.hash for p in parents], data["fingerprint"])


def finished_already(stage: str, config: StageConfig, recipe: str) -> Artifact | None:
    """The registered artefact of the same recipe, if there is one."""
    artifact = Registry(config.registry).find(stage, config.name, recipe)
    if artifact is not None:
        print(f"{stage}: {artifact.reference} has this recipe already, skipped", flush=True)
    return artifact


@contextmanager
def open_run(
    stage: str, config: StageConfig, parents: list[Artifact], data: dict[str, Any], recipe: str
) -> Iterator[Run]:
    """Seeds, chooses device and type, opens the tracker; the run's folder is `output_dir/STAGE`."""
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
        memory.explained(timer),
    ):
        for parent in parents:
            tracker.use_artifact(parent.reference, parent.hash)
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
    """Keeps the libraries' own deprecations, which no user can mend, and progress bars in log files out of the way."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _claim_checkpoints(folder: Path, config: StageConfig, parents: list[Artifact], data: dict[str, Any]) -> None:
    """Makes the folder this run's own, so that checkpoints of another run are neither resumed from nor kept in place of its.

    Raises:
        UserError: with `resume`, when the checkpoints there were made with other options, data or parents.
    """
    inputs = {"dataset": data["fingerprint"], **{parent.stage: parent.hash for parent in parents}}
    made_of, mark = {**config.recipe(), **inputs}, folder / "made_of.json"
    if folder.exists() and not config.resume:
        previous = folder.with_name("checkpoints.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    elif folder.exists():
        before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
        if changed := sorted(k for k, v in made_of.items() if k not in before or before[k] != v):
            raise UserError(
                f"the checkpoints in {folder} were made with other options or inputs ({', '.join(changed)}); "
                "use the same ones again, or start anew without --resume"
            )
        return
    folder.mkdir()
    mark.write_text(json.dumps(made_of, indent=2), encoding="utf-8")


def describe_data(sets: dict[str, Loaded]) -> dict[str, Any]:
    """Rows, drops and one fingerprint of the data sets of a stage, for its manifest; and the fingerprints of their data cards."""
    return {
        "fingerprint": joint_fingerprint(sets),
        "prepared": {name: loaded.prepared for name, loaded in sets.items() if loaded.prepared},
        "rows": {name: len(loaded.rows) for name, loaded in sets.items()},
        "dropped": {name: loaded.dropped for name, loaded in sets.items() if loaded.dropped},
        "dropped_rows": {name: loaded.dropped_rows for name, loaded in sets.items() if loaded.dropped_rows},
    }


def add_dropped(data: dict[str, Any], name: str, dropped: dict[str, list[int]]) -> None:
    """Adds what was left out after loading to `describe_data`'s result: reason -> line or row numbers."""
    if dropped:
        data["rows"][name] -= sum(map(len, dropped.values()))
        data["dropped"].setdefault(name, {}).update({reason: len(numbers) for reason, numbers in dropped.items()})
        named = {reason: numbers[:NAMED_ROWS] for reason, numbers in dropped.items()}
        data["dropped_rows"].setdefault(name, {}).update(named)


def preflight(
    run: Run,
    examine: Callable[[Ground], list[Check]],
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Loaded],
) -> None:
    """Runs a stage's checks, unless they are switched off.

    Args:
        sets: the stage's data; it trains on all but `validation`.

    Raises:
        UserError: checks failed; nothing was trained.
    """
    if not run.config.preflight:
        return
    ground = Ground(
        config=run.config,
        compute=run.compute,
        folder=run.folder,
        registry=run.registry.root,
        parents=run.parents,
        tokenizer=tokenizer,
        training={name: rows for name, rows in sets.items() if name != "validation"},
        validation=sets["validation"],
    )
    with run.timer.phase("preflight"):
        require_all(examine(ground), "preflight")


def trainer_arguments(run: Run, length: TrainingLength) -> dict[str, Any]:
    """The arguments that transformers' Trainer gets in both supervised stages."""
    c = run.config
    return {
        "output_dir": str(run.folder / "checkpoints"),
        "per_device_train_batch_size": length.per_device_train_batch_size,
        "per_device_eval_batch_size": length.per_device_eval_batch_size,
        "gradient_accumulation_steps": length.gradient_accumulation_steps,
        "num_train_epochs": length.num_train_epochs,
        "max_steps": length.max_steps,
        "eval_strategy": "steps",
        "eval_steps": length.eval_steps,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": c.save_steps,
        "save_total_limit": 2,
        "logging_steps": c.logging_steps,
        "learning_rate": c.learning_rate,
        "weight_decay": c.weight_decay,
        "adam_beta1": c.adam_beta1,
        "adam_beta2": c.adam_beta2,
        "adam_epsilon": c.adam_epsilon,
        "max_grad_norm": c.max_grad_norm,
        "lr_scheduler_type": c.lr_scheduler_type,
        "lr_scheduler_kwargs": optim.scheduler_kwargs(c),
        "warmup_steps": c.warmup_steps,
        "optim": "adamw_bnb_8bit" if c.optim == "adamw_8bit" else "adamw_torch",
        "bf16": run.compute.bf16,
        "use_cpu": run.compute.device.type == "cpu",
        "gradient_checkpointing": c.gradient_checkpointing,  # TRL turns it on by default
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": c.seed,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": run.compute.device.type == "cuda",
    }


class _StopCallback(TrainerCallback):
    """Saves and ends the training loop after the update in which a stop was asked for."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.requested:
            control.should_save = control.should_training_stop = True


def train(trainer: Any, run: Run) -> None:
    """Runs a transformers Trainer with this project's progress, metrics, resume and stop rules."""
    from transformers import PrinterCallback

    optim.forget_overrides()
    trainer.remove_callback(PrinterCallback)
    with StopRequest() as stop:
        trainer.add_callback(ProgressCallback(run.stage))
        trainer.add_callback(MetricsCallback(run.tracker, run.stage))
        trainer.add_callback(_StopCallback(stop))
        folder = Path(trainer.args.output_dir)
        last = _last_checkpoint(folder) if run.config.resume else None
        if last is not None:
            run.tracker.truncate(int(last.name.rsplit("-", 1)[1]))
            trainer.args.eval_on_start = False  # that evaluation is in the checkpoint's history already
        with run.timer.phase("train"):
            try:
                if last is None or not _take_finished(trainer, last):
                    trainer.train(resume_from_checkpoint=str(last) if last else None)
            except Exception as error:
                if checkpoint.is_storage_failure(error):
                    raise checkpoint.not_written(folder / f"checkpoint-{trainer.state.global_step}", error) from error
                raise
        stop.raise_if_requested()


def _take_finished(trainer: Any, last: Path) -> bool:
    """Whether the checkpoint holds all updates, and if so, takes it as the result: the trainer would make one more update."""
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(last))
    trainer.state = state
    return True


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is complete: the trainer writes its state last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


class SortedStepSampler(Sampler[int]):
    """Shuffles, then sorts by length *inside* each optimiser step: the same gradient, with less padding in its microbatches."""

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self.lengths, self.step_size, self.seed, self.epoch = list(lengths), step_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader: each epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for first in range(0, len(order), self.step_size):
            yield from sorted(order[first : first + self.step_size], key=lambda i: -self.lengths[i])
