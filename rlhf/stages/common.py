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
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed
from transformers.utils import logging as transformers_logging

from rlhf import checkpoint, distributed, live, memory, optim, storage
from rlhf.config import StageConfig, TrainingConfig, TrainingLength
from rlhf.data_prep.loading import NAMED_ROWS, Loaded, joint_fingerprint
from rlhf.doctor.checks import Check, require_all
from rlhf.doctor.live import DoctorCallback, LiveDoctor
from rlhf.doctor.preflight import Ground
from rlhf.errors import UserError
from rlhf.evaluation.overlap import TrainingPrompts, prompt_key
from rlhf.interrupt import StopRequest
from rlhf.models import Compute
from rlhf.redaction import redact
from rlhf.registry import MANIFEST, Artifact, Reference, Registry, recipe_hash
from rlhf.resumable import STATE_FILE
from rlhf.tokenization import stop_token_ids, tokenizer_hashes
from rlhf.tracking import RUN_FILE, MetricsCallback, PhaseTimer, ProgressCallback, Tracker


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
        live.view(f"{stage}: {config.name} on {compute}"),
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
        before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
        if changed := sorted(k for k, v in made_of.items() if k not in before or before[k] != v):
            raise UserError(
                f"the checkpoints in {folder} were made with other options or inputs ({', '.join(changed)}); "
                "use the same ones again, or start anew without --resume"
            )
        return
    folder.mkdir(exist_ok=True)
    storage.write_text(mark, json.dumps(made_of, indent=2))


def describe_data(sets: dict[str, Loaded]) -> dict[str, Any]:
    """Rows, drops and one fingerprint of the data sets of a stage, for its manifest; and the fingerprints of their data cards."""
    return {
        "fingerprint": joint_fingerprint(sets),
        "prepared": {name: loaded.prepared for name, loaded in sets.items() if loaded.prepared},
        "rows": {name: len(loaded.rows) for name, loaded in sets.items()},
        "dropped": {name: loaded.dropped for name, loaded in sets.items() if loaded.dropped},
        "dropped_rows": {name: loaded.dropped_rows for name, loaded in sets.items() if loaded.dropped_rows},
    }


def overlap(sets: dict[str, Loaded], parents: Sequence[Artifact], registry: Registry) -> dict[str, Any]:
    """How many held-out prompts are among those that the stage, or a model that it starts from, is trained on.

    Returns:
        `held_out`: how many there are; `in_training`: counts by artefact, the stage's own as "its own data"; None where the
        data of a parent is gone or has changed.
    """
    held_out = [row["prompt"] for row in sets["validation"].rows]
    trained = [d.rows for name, d in sets.items() if name != "validation" and "prompt" in d.rows.column_names]
    own = {prompt_key(row["prompt"]) for rows in trained for row in rows}
    counts: dict[str, int | None] = {"its own data": sum(prompt_key(prompt) in own for prompt in held_out)}
    training = TrainingPrompts(registry)
    for parent in parents:
        counts |= training.overlap(parent, held_out)
    for name, count in counts.items():
        if count and distributed.rank() == 0:
            print(f"{count} of {len(held_out)} held-out prompts are among those that {name} was trained on", flush=True)
    return {"held_out": len(held_out), "in_training": counts}


def add_dropped(data: dict[str, Any], name: str, dropped: dict[str, list[int]]) -> None:
    """Adds what was left out after loading to `describe_data`'s result: reason -> line or row numbers."""
    dropped = {reason: numbers for reason, numbers in dropped.items() if numbers}
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
            Ground(
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


def trainer_arguments(run: Run, length: TrainingLength) -> dict[str, Any]:
    """The arguments that transformers' Trainer gets in pretraining and in both supervised stages."""
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
        doctor = LiveDoctor(run.stage, run.config.doctor, run.tracker, dataclasses.asdict(run.config))
        checked = DoctorCallback(doctor)
        trainer.add_callback(checked)
        trainer.add_callback(_StopCallback(stop))
        folder = Path(trainer.args.output_dir)
        last = checkpoint.latest(folder) if run.config.resume else None
        if run.config.resume:
            run.tracker.rewind(checkpoint.load_state(last)["log"] if last else {})
        if last is not None:
            doctor.read_log()
            trainer.args.eval_on_start = False  # that evaluation is in the checkpoint's history already
        trainer.log_position = run.tracker.position
        with run.timer.phase("train"):
            if last is None or not _take_finished(trainer, last):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        stop.raise_if_requested()
        if checked.stopped is not None:
            raise checked.stopped


def _take_finished(trainer: Any, last: Path) -> bool:
    """Whether the checkpoint is of a run's end, and if so, takes it as the result: the trainer would make one more update."""
    state = TrainerState.load_from_json(str(last / STATE_FILE))
    if not trainer.finished(state):
        return False
    trainer.state = state
    best = trainer.best_checkpoint() if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(str(best or last))
    return True


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
