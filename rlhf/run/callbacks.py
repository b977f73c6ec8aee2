"""Callbacks for transformers' Trainer: metrics under this project's names, and progress."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerState

from rlhf.run.progress import Progress
from rlhf.run.tracker import Tracker

# Names in the logs of transformers and trl -> the last part of our metric names.
_HOUSE_NAMES = {"mean_token_accuracy": "token_accuracy", "learning_rate": "lr"}

_NOT_METRICS = re.compile(r"^(epoch|total_flos|num_tokens|step|train_.*|eval_(runtime|num_tokens|.*_per_second))$")


def house_metrics(logs: Mapping[str, Any], stage: str) -> dict[str, float]:
    """Return a Hugging Face trainer's log line under this project's metric names, e.g. `loss` -> `sft/loss`."""
    metrics = {}
    for name, value in logs.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or _NOT_METRICS.match(name):
            continue
        prefix = "eval_" if name.startswith("eval_") else ""
        bare = name.removeprefix("eval_")
        metrics[f"{stage}/{prefix}{_HOUSE_NAMES.get(bare, bare)}"] = float(value)
    return metrics


class MetricsCallback(TrainerCallback):
    """Callback that sends a Hugging Face trainer's logs to a `Tracker`, under this project's metric names."""

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log a mapping of names to numbers."""
        metrics = house_metrics(logs or {}, self.stage)
        if metrics and state.is_world_process_zero:
            self.tracker.log(metrics, state.global_step)


class ProgressCallback(TrainerCallback):
    """Callback that shows a bar for a Hugging Face trainer's training, and one for each evaluation."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._training: Progress | None = None
        self._evaluation: Progress | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the bar of the training."""
        if state.is_world_process_zero:
            self._training = Progress(state.max_steps, self.description, unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count optimiser updates; a resumed run begins with those of its checkpoint."""
        if self._training is not None:
            self._training.update(state.global_step - self._training.done)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest loss and accuracy."""
        if self._training is not None:
            metrics = house_metrics(logs or {}, "")
            names = {"/loss": "loss", "/token_accuracy": "accuracy", "/accuracy": "accuracy"}
            self._training.update(0, **{short: metrics[name] for name, short in names.items() if name in metrics})

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count a batch of an evaluation, whose bar opens at the first."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            try:
                total = len(eval_dataloader)
            except TypeError:  # a stream has no length
                total = None
            description = f"{self.description} evaluation"
            self._evaluation = Progress(total, description, unit="batch", leave=self._training is None)
        self._evaluation.update()

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End the evaluation's bar."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_predict(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """End the bar of a `predict` call."""
        self.on_evaluate(args, state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End the bar of the training."""
        if self._training is not None:
            self._training.close()
            self._training = None
