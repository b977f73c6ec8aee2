"""Callbacks for transformers' Trainer: metrics and progress of this project's kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.run.progress import Progress
from rlhf.run.tracker import Tracker

# What the trainers of transformers and trl call things -> the last part of our metric names.
_HOUSE_NAMES = {"mean_token_accuracy": "token_accuracy", "learning_rate": "lr"}


_NOT_METRICS = re.compile(r"^(epoch|total_flos|num_tokens|step|train_.*|eval_(runtime|num_tokens|.*_per_second))$")


def house_metrics(logs: Mapping[str, Any], stage: str) -> dict[str, float]:
    """The log line of a Hugging Face trainer under this project's metric names, e.g. `loss` -> `sft/loss`."""
    metrics = {}
    for name, value in logs.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or _NOT_METRICS.match(name):
            continue
        prefix = "eval_" if name.startswith("eval_") else ""
        bare = name.removeprefix("eval_")
        metrics[f"{stage}/{prefix}{_HOUSE_NAMES.get(bare, bare)}"] = float(value)
    return metrics


class MetricsCallback(TrainerCallback):
    """Sends the logs of a Hugging Face trainer to a `Tracker`, under this project's metric names."""

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer with a mapping of names to numbers."""
        metrics = house_metrics(logs or {}, self.stage)
        if metrics and state.is_world_process_zero:
            self.tracker.log(metrics, state.global_step)


class ProgressCallback(TrainerCallback):
    """`rlhf.run.progress` for Hugging Face trainers: one bar for training, one for each evaluation."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._training: Progress | None = None
        self._evaluation: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar. A resumed run starts where its checkpoint was."""
        if state.is_world_process_zero:
            self._training = Progress(state.max_steps, self.description, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimiser update more."""
        if self._training is not None:
            self._training.update(state.global_step - self._training.done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the newest loss and accuracy."""
        if self._training is not None:
            metrics = house_metrics(logs or {}, "")
            shown = {
                name: metrics[f"/{name}"] for name in ("loss", "token_accuracy", "accuracy") if f"/{name}" in metrics
            }
            self._training.update(0, **{name.removeprefix("token_"): value for name, value in shown.items()})

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """One batch of an evaluation more."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            try:
                total = len(eval_dataloader)
            except TypeError:  # a stream has no length
                total = None
            self._evaluation = Progress(
                total, f"{self.description} evaluation", unit="batch", leave=self._training is None
            )
        self._evaluation.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the evaluation's bar."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Ends the bar of a `predict` call."""
        self.on_evaluate(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar."""
        if self._training is not None:
            self._training.close()
            self._training = None
