"""transformers' Trainer with the checkpoints of `rlhf.run.checkpoint`, as in PPO.

Its own are written in place, file by file, with optimiser, random states and arguments as pickles; a kill leaves a folder that
looks whole, and loading it may run code. Checkpoints here also hold the sums since the last line of metrics, so that the next
line of a resumed run equals that of a run without a stop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from rlhf.run import checkpoint

STATE_FILE = "trainer_state.json"
"""transformers reads its own account of the run out of this file of a checkpoint."""


class AddedUp(TypedDict):
    """Sums since the last line of metrics."""

    loss: Any
    total_loss: Any
    since: int
    tokens: Any
    metrics: dict[str, list[Any]]


class Saved(TypedDict):
    """State in a checkpoint of this trainer, beside its tensors."""

    optimizer: checkpoint.OptimizerSettings
    scheduler: dict[str, Any]
    generators: dict[str, Any]
    added_up: AddedUp
    log: dict[str, int]


class ResumableTrainer:
    """Mixin for a class of `transformers.Trainer`, before which it is named; it overrides the methods that touch checkpoints."""

    log_position: Callable[[], dict[str, int]] = staticmethod(dict)
    """Returns the sizes of the run's logs, which a checkpoint keeps (`Tracker.position`)."""
    on_microbatch: Callable[[Any, torch.Tensor], None] | None = None
    """Is shown each microbatch with its loss, once the gradients are added."""
    data_rows: Any = None
    """Data rows that the training rows were made of, where those do not hold them."""

    # Attributes of transformers.Trainer and of the trainers of TRL.
    args: Any
    model: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    _metrics: dict[str, Any]
    _tr_loss: torch.Tensor

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add the gradients of a microbatch, and show it to `on_microbatch`."""
        trainer: Any = super()
        loss: torch.Tensor = trainer.training_step(model, inputs, num_items_in_batch)
        if self.on_microbatch is not None:
            self.on_microbatch(inputs, loss)
        return loss

    def finished(self, state: Any) -> bool:
        """Return True if a run with this `TrainerState` had ended."""
        return bool(state.global_step >= state.max_steps)

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint of the best evaluation, saved or about to be; the folder may have been moved since."""
        state, folder = self.state, Path(self.args.output_dir)
        best = folder / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best.is_dir() or state.best_global_step == state.global_step):
            return best
        # evaluations may come more often than checkpoints
        earlier = folder / Path(state.best_model_checkpoint or "none").name
        return earlier if earlier.is_dir() else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state, best = self.state, self.best_checkpoint()
        state.best_model_checkpoint = str(best) if best else None
        moments, groups = checkpoint.pack_optimizer(self.optimizer)
        generators, rest = checkpoint.pack_generators()
        checkpoint.save(
            Path(self.args.output_dir),
            state.global_step,
            {"weights": dict(self._trained()), "optimizer": moments, "generators": generators},
            {
                "optimizer": groups,
                "scheduler": self.lr_scheduler.state_dict(),
                "generators": rest,
                "added_up": self._added_up(),
                "log": self.log_position(),
            },
            texts={STATE_FILE: json.dumps(dataclasses.asdict(state), indent=2)},
            keep=best,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = checkpoint.load_tensors(Path(resume_from_checkpoint), "weights")
        for name, parameter in self._trained().items():
            parameter.data.copy_(weights[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            state = checkpoint.load_state(Path(folder), Saved)
            checkpoint.unpack_optimizer(
                self.optimizer, checkpoint.load_tensors(Path(folder), "optimizer"), state["optimizer"]
            )
            self.lr_scheduler.load_state_dict(state["scheduler"])
            best = self.best_checkpoint()
            self.state.best_model_checkpoint = str(best) if best else None

    def _load_rng_state(self, folder: str | None) -> None:
        """Restore random states and sums; the trainer calls this last, once its data is in place and its sums are 0."""
        if folder is not None:
            state = checkpoint.load_state(Path(folder), Saved)
            checkpoint.unpack_generators(checkpoint.load_tensors(Path(folder), "generators"), state["generators"])
            self._go_on_adding(state["added_up"])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _added_up(self) -> dict[str, Any]:
        trainer: Any = self
        return {
            "loss": self._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "since": trainer._globalstep_last_logged,
            "tokens": trainer._total_train_tokens,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }

    def _go_on_adding(self, added_up: dict[str, Any]) -> None:
        trainer: Any = self
        self._tr_loss.fill_(added_up["loss"])
        trainer._total_loss_scalar = added_up["total_loss"]
        trainer._globalstep_last_logged = added_up["since"]
        trainer._total_train_tokens = added_up["tokens"]
        self._metrics["train"].update({name: list(values) for name, values in added_up["metrics"].items()})
