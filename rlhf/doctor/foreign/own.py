"""Figures of this project's own runs, in W&B's and TensorBoard's files, where the run's folder is gone."""

from __future__ import annotations

from rlhf.doctor.foreign.figure import Figure, Kind, words
from rlhf.run.metrics import METRICS, Stage

_MARKS: dict[Stage, str] = {
    "pretrain": "pretrain/loss",
    "sft": "sft/loss",
    "reward": "reward/loss",
    "ppo": "ppo/first_ratio_error",
}
KINDS = tuple(
    Kind(
        project="rlhf",
        trainer=stage,
        stage=stage,
        marks=(words(mark),),
        figures=tuple(
            Figure(theirs=(name,), ours=(name,)) for name, metric in METRICS.items() if metric.stage == stage
        ),
        settings={
            name: (name,) for name in ("learning_rate", "kl_coef", "kl_target", "max_grad_norm", "rollout_batch_size")
        },
    )
    for stage, mark in _MARKS.items()
)
