"""transformers' Trainer as pretraining and the two supervised stages use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from rlhf.base.interrupt import StopRequest
from rlhf.doctor import statements
from rlhf.doctor.audit.training_live import TrainingAudit
from rlhf.doctor.live import LiveDoctor, ObserverCallback
from rlhf.doctor.statements import Statement
from rlhf.ppo.state import Order
from rlhf.run import checkpoint, optim
from rlhf.run.callbacks import MetricsCallback, ProgressCallback
from rlhf.run.resumable import STATE_FILE, Saved
from rlhf.stages.callbacks import Update, call_back
from rlhf.stages.run import Run

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def trainer_arguments(run: Run[Any]) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer that a run's options and device decide."""
    c = run.config
    return {
        "output_dir": str(run.folder / "checkpoints"),
        "per_device_train_batch_size": c.per_device_train_batch_size,
        "per_device_eval_batch_size": c.per_device_eval_batch_size,
        "gradient_accumulation_steps": c.gradient_accumulation_steps,
        "num_train_epochs": c.num_train_epochs,
        "max_steps": c.max_steps,
        "eval_strategy": "steps",
        "eval_steps": c.eval_steps,
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


def on_one_device(arguments: Arguments) -> Arguments:
    """Return the arguments, held to one device: with several visible, transformers would split each batch over them."""
    arguments._n_gpu = min(arguments.n_gpu, 1)  # reading n_gpu looks for devices, once
    return arguments


def train(trainer: Any, run: Run[Any]) -> None:
    """Run a transformers Trainer with this project's progress, metrics, resume and stop rules."""
    optim.forget_overrides()
    trainer.remove_callback(PrinterCallback)
    with StopRequest() as stop:
        trainer.add_callback(ProgressCallback(run.stage))
        trainer.add_callback(MetricsCallback(run.tracker, run.stage))
        doctor = LiveDoctor(run.stage, run.config.doctor, run.tracker, dataclasses.asdict(run.config))

        def observe(step: int, metrics: Mapping[str, float]) -> Order | None:
            order = doctor.examine(step, metrics)
            return call_back(run.callbacks, Update(stage=run.stage, step=step, metrics=dict(metrics))) or order

        observer = ObserverCallback(run.stage, observe)
        trainer.add_callback(observer)
        audit = None
        if run.config.audit_steps:
            audit = TrainingAudit(
                trainer, run.stage, run.config, run.folder, run.compute, run.parents, doctor.examine_statements
            )
            trainer.add_callback(audit.recorder)
        trainer.add_callback(_StopCallback(stop))
        folder = Path(trainer.args.output_dir)
        last = checkpoint.latest(folder) if run.config.resume else None
        if last:
            checkpoint.verify(last)  # all of it: of the last step, transformers reads the weights alone
        if run.config.resume:
            run.tracker.rewind(checkpoint.load_state(last, Saved)["log"] if last else {})
        if last is not None:
            doctor.read_log()
            trainer.args.eval_on_start = False  # that evaluation is in the checkpoint's history already
        trainer.log_position = run.tracker.position
        with run.timer.phase("train"):
            if last is None or not _restore_finished(trainer, last):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        stop.raise_if_requested()
        if error := observer.error or (audit.error if audit else None):
            raise error


def audit_published(run: Run[Any], results: Sequence[Statement]) -> None:
    """Keep what the audit established of the registered artefact, and print what is wrong with it."""
    statements.append(run.folder, results)
    LiveDoctor(run.stage, run.config.doctor, run.tracker, dataclasses.asdict(run.config)).examine_statements(results)


class _StopCallback(TrainerCallback):
    """Saves and ends the training loop after the update in which a stop was requested."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.requested:
            control.should_save = control.should_training_stop = True


def _restore_finished(trainer: Any, last: Path) -> bool:
    """Restore a finished run from its last checkpoint; return False if that run was not finished.

    Resumed, the trainer would make one more update.
    """
    state = TrainerState.load_from_json(str(last / STATE_FILE))
    if not trainer.finished(state):
        return False
    trainer.state = state
    checkpoint.prune(last.parent, trainer.best_checkpoint())
    best = trainer.best_checkpoint() if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(str(best or last))
    return True


class SortedStepSampler(Sampler[int]):
    """Shuffles, then sorts by length *inside* each optimiser step: the same gradient, with less padding."""

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self.lengths, self.step_size, self.seed, self.epoch = list(lengths), step_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; the data loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for first in range(0, len(order), self.step_size):
            yield from sorted(order[first : first + self.step_size], key=lambda i: -self.lengths[i])
