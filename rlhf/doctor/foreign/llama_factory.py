"""Figures of LLaMA-Factory's `trainer_log.jsonl`; its `trainer_state.json` has those of TRL's trainers."""

from __future__ import annotations

from rlhf.doctor.foreign import trl
from rlhf.doctor.foreign.figure import Figure, Kind, words
from rlhf.doctor.health.check import Stage

_LOG = "src/llamafactory/train/callbacks.py: LogCallback.on_log"
_MARKS = (words("current_steps"), words("loss", "eval_loss"))


def _figures(stage: Stage) -> tuple[Figure, ...]:
    loss = f"{stage}/policy_loss" if stage == "ppo" else f"{stage}/loss"
    return (
        Figure(theirs=("loss",), ours=(loss,), source=_LOG),
        Figure(theirs=("lr",), ours=(f"{stage}/lr",), zero_counts=True, source=_LOG),
    )


PPO = Kind(
    project="LLaMA-Factory",
    trainer="PPO",
    stage="ppo",
    marks=(*_MARKS, words("reward")),
    figures=(
        *_figures("ppo"),
        Figure(
            theirs=("reward",),
            ours=("objective/score", "objective/raw_score"),
            source="src/llamafactory/train/ppo/trainer.py: ppo_train",
        ),
    ),
    settings=trl.TRAINER_SETTINGS,
)
PREFERENCE = Kind(
    project="LLaMA-Factory",
    trainer="DPO, KTO, ORPO, SimPO",
    stage="reward",
    marks=(*_MARKS, words("accuracy")),
    figures=(
        *_figures("reward"),
        Figure(theirs=("eval_loss",), ours=("reward/eval_loss",), source=_LOG),
        Figure(
            theirs=("accuracy",),
            near=("reward/eval_accuracy",),
            meaning="the accuracy of the policy's implicit reward on training pairs",
            source=_LOG,
        ),
    ),
    settings=trl.TRAINER_SETTINGS,
)
REWARD = Kind(
    project="LLaMA-Factory",
    trainer="reward model",
    stage="reward",
    marks=(*_MARKS, words("stage=reward", "stage=rm")),
    figures=(*_figures("reward"), Figure(theirs=("eval_loss",), ours=("reward/eval_loss",), source=_LOG)),
    settings=trl.TRAINER_SETTINGS,
)
SFT = Kind(
    project="LLaMA-Factory",
    trainer="SFT, pretraining or a reward model",
    stage="sft",
    marks=_MARKS,
    figures=(*_figures("sft"), Figure(theirs=("eval_loss",), ours=("sft/eval_loss",), source=_LOG)),
    settings=trl.TRAINER_SETTINGS,
)
KINDS = (PPO, PREFERENCE, REWARD, SFT)
