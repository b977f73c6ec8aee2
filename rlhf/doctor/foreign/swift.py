"""Figures of ms-swift's `logging.jsonl`, whose trainers are TRL's with some names of their own."""

from __future__ import annotations

import dataclasses

from rlhf.doctor.foreign import trl
from rlhf.doctor.foreign.figure import Figure, Kind, words

_MARK = words("global_step/max_steps")


def _of_swift(kind: Kind, *, marks: tuple[frozenset[str], ...] | None = None, figures: tuple[Figure, ...] = ()) -> Kind:
    return dataclasses.replace(
        kind,
        project="ms-swift",
        marks=(_MARK, *(kind.marks if marks is None else marks)),
        figures=(*figures, *kind.figures),
    )


_PAIRS = "swift/rlhf_trainers/reward_trainer.py: compute_loss"
REWARD = _of_swift(
    trl.REWARD,
    marks=(words("rlhf_type=rm", "stage=reward"), words("rewards/accuracies", "eval_rewards/accuracies")),
    figures=(
        Figure(theirs=("rewards/accuracies",), ours=("reward/accuracy",), source=_PAIRS),
        Figure(theirs=("eval_rewards/accuracies",), ours=("reward/eval_accuracy",), source=_PAIRS),
        Figure(theirs=("rewards/margins",), ours=("reward/margin",), source=_PAIRS),
    ),
)
SFT = _of_swift(
    trl.SFT,
    figures=(
        Figure(
            theirs=("token_acc",),
            ours=("sft/token_accuracy",),
            source="swift/trainers/mixin.py: _compute_acc",
        ),
    ),
)
PREFERENCE = dataclasses.replace(_of_swift(trl.PREFERENCE), trainer="DPO, KTO, CPO, ORPO, or a reward model")
KINDS = (_of_swift(trl.PPO), _of_swift(trl.GRPO), REWARD, PREFERENCE, SFT)
