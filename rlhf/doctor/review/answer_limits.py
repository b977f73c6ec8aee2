"""Limits on the SFT model's answers and their scores, which PPO samples before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from rlhf.config import is_registered_reward
from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.limits import Limit, Side
from rlhf.doctor.review.ppo_limits import PPO_LIMITS
from rlhf.doctor.review.texts import Figures

#: Answers below which a correlation says nothing.
ENOUGH = 20
#: Limits on options that the measured spread and length decide anew.
_REPEATED = ("kl_coef", "value_clip", "reward_clip", "gamma", "missing_eos_penalty", "short_penalty")
#: Symptoms of scores of the wrong size.
SCALE = (
    *(
        "reward_scale",
        "value_dead",
        "value_useless",
        "value_untrained",
        "kl_jump",
        "steps_too_large",
        "kl_high",
        "gradient_spike",
    ),
    *("no_kl_penalty", "over_optimised", "entropy_collapse", "responses_alike", "reward_saturated", "length_rewarded"),
    *("advantages_vanished", "reward_constant", "policy_unmoved", "reward_falling", "stop_rate_falling", "length_up"),
    *("length_down", "repeated_text", "kl_coef", "value_clip", "no_penalty", "short_penalty", "missing_eos_penalty"),
)


def of_answers(
    scores: Tensor, lengths: ArrayLike, stopped: Sequence[bool], config: Any, gold: Tensor | None = None
) -> Figures:
    """Return figures of the SFT model's answers: spread and mean of the scores, what is clipped, lengths.

    Args:
        scores: (B,) of the run's reward, without penalties and clip.
        lengths: (B,) tokens.
        stopped: answers that ended in a stop token.
        gold: (B,) scores of the independent judge, if there is one.
    """
    figures, values, sizes = Figures(), scores.double().numpy(), np.asarray(lengths, dtype=np.float64)
    figures.add("score_spread", values.std())
    words = (
        f"scores {values.mean():.3g} on average, spread {values.std():.3g}, of {len(values)} answers of the SFT model"
    )
    figures.details |= dict.fromkeys(("reward_constant", "reward_scale", "clipped", *_REPEATED[:3]), words)
    figures.add("score_size", float(np.abs(values).max()))
    figures.add("sampled_tokens", sizes.mean())
    figures.add("unfinished", 1 - sum(stopped) / len(stopped))
    if config.reward_clip:
        figures.add("clipped", float((np.abs(values) >= config.reward_clip).mean()))
    varied = len(np.unique(sizes)) > 3 and len(np.unique(values)) > 3
    if len(values) >= ENOUGH and varied:
        from scipy.stats import spearmanr

        figures.add("length_score", float(spearmanr(values, sizes).statistic))
        if gold is not None and len(np.unique(judged := gold.double().numpy())) > 3:
            figures.add("judge_score", float(spearmanr(values, judged).statistic), f"of {len(values)} answers")
    return figures


def _registered_spread(f: Facts) -> float | None:
    """Return the spread of a registered reward model that scores alone, in its own unit; None for other rewards."""
    rewards, weights = f.option("reward"), f.option("reward_weights")
    if len(rewards) != 1 or not is_registered_reward(rewards[0]):
        return None
    spread = f.figure("score_spread")
    return None if not spread or f.figure("own_unit") else spread / abs(weights[0] if weights and weights[0] else 1.0)


def _relative_spread(f: Facts) -> float | None:
    """Return the spread of other rewards over the one that `kl_coef` and `clip_range_value` are made for.

    Both have to be far off, on one side; else one of the options is, or none.
    """
    if _registered_spread(f) is not None or not (spread := f.figure("score_spread")):
        return None
    made_for = [5 * f.option("clip_range_value"), *([20 * f.option("kl_coef")] if f.option("kl_coef") else [])]
    ratios = [spread / size for size in made_for]
    return min(ratios) if min(ratios) > 1 else max(ratios) if max(ratios) < 1 else 1.0


def _constant(f: Facts) -> float | None:
    spread, size = f.figure("score_spread"), f.figure("score_size")
    return None if spread is None or size is None else spread / max(size, 1e-6)


ANSWER_LIMITS = (
    Limit(
        name="reward_constant",
        what="spread of the scores over their size",
        measure=_constant,
        low=Side(
            note=1e-3,
            critical=1e-6,
            cause="the reward gives every answer the same score: a constant function, or a head that was not loaded",
            action="score a good and a bad answer by hand",
            explains=(
                "reward_constant",
                "advantages_vanished",
                "value_useless",
                "reward_falling",
                "policy_unmoved",
                "value_dead",
                "reward_saturated",
                "gradient_zero",
            ),
        ),
    ),
    Limit(
        name="reward_scale",
        what="spread of a registered reward model's scores, 1 on demonstrations",
        measure=_registered_spread,
        low=Side(
            note=0.2,
            warning=0.05,
            critical=0.01,
            cause="the reward model does not score as it did when it was registered, or all answers of the SFT model are one",
            action="run the reward model's report card again: rlhf card",
            explains=SCALE,
        ),
        high=Side(
            note=3,
            warning=8,
            critical=30,
            cause="scores are far larger than those of the registered reward model: a factor too many, or another head",
            action="run the reward model's report card again: rlhf card",
            explains=SCALE,
        ),
        source="scores are normalised on demonstrations: InstructGPT, N+ (detail 15)",
    ),
    Limit(
        name="reward_scale",
        what="spread of other rewards over the one that options are made for, 20 x kl_coef and 5 x clip_range_value",
        measure=_relative_spread,
        options=("kl_coef", "clip_range_value"),
        low=Side(
            note=0.2,
            warning=0.02,
            critical=0.003,
            cause="the reward is far too small for kl_coef and clip_range_value: the penalty is all that counts",
            action="multiply the reward (reward_weights) until its spread is about 1",
            explains=SCALE,
        ),
        high=Side(
            note=5,
            warning=50,
            critical=300,
            cause="the reward is far too large for kl_coef and clip_range_value: no penalty holds the policy, and values cannot "
            "follow",
            action="divide the reward (reward_weights) until its spread is about 1",
            explains=SCALE,
        ),
        source="kl_coef 0.05 and a value clip of 0.2 at a spread of 1: N+, lm-human-preferences",
    ),
    Limit(
        name="clipped",
        what="scores that reward_clip cuts",
        measure=lambda f: f.figure("clipped"),
        options=("reward_clip",),
        percent=True,
        high=Side(
            note=0.5,
            warning=0.9,
            critical=0.995,
            cause="nearly all scores lie beyond the clip, so they are two numbers at most",
            action="raise reward_clip, or scale the reward",
            explains=("reward_constant", "reward_saturated", "advantages_vanished", "value_dead", "value_useless"),
        ),
    ),
    Limit(
        name="unfinished",
        what="answers that response_length cuts off",
        measure=lambda f: f.figure("unfinished"),
        options=("response_length",),
        percent=True,
        high=Side(
            note=0.3,
            warning=0.7,
            critical=0.95,
            cause="the SFT model does not stop: no stop token in its training, another template, or a response_length below "
            "its answers",
            action="look at its answers; raise response_length, or train SFT with the stop token in its loss",
            explains=(
                "cut_off",
                "stop_rate_falling",
                "length_rewarded",
                "reward_saturated",
                "value_useless",
                "length_down",
                "reward_constant",
            ),
        ),
    ),
    Limit(
        name="length_score",
        what="rank correlation of score and length",
        measure=lambda f: f.figure("length_score"),
        low=Side(
            note=-0.7,
            warning=-0.93,
            cause="the reward is a function of length: the shortest answers score best",
            action="look at the length bias on the reward model's report card",
            explains=("length_rewarded", "length_down"),
        ),
        high=Side(
            note=0.7,
            warning=0.93,
            cause="the reward is a function of length: the longest answers score best",
            action="look at the length bias on the reward model's report card",
            explains=(
                "length_rewarded",
                "length_up",
                "stop_rate_falling",
                "repeated_text",
                "kl_high",
                "over_optimised",
                "steps_too_large",
                "reward_saturated",
                "advantages_vanished",
                "gradient_spike",
                "responses_alike",
            ),
        ),
        source="Singhal et al. 2023",
    ),
    Limit(
        name="judge_score",
        what="rank correlation of the score and the judge's",
        measure=lambda f: f.figure("judge_score"),
        options=("gold",),
        low=Side(
            note=-0.3,
            warning=-0.6,
            critical=-0.8,
            cause="the reward prefers what the independent judge likes least: its sign is flipped, or its labels were swapped",
            action="look at answers with their scores; turn the sign or the labels, and train the reward model again",
            explains=("reward_opposes_judge", "over_optimised", "reward_ignores_judge"),
        ),
    ),
)
#: Limits on options whose unit is measured on the answers, judged again.
MEASURED_LIMITS = tuple(limit for limit in PPO_LIMITS if limit.name in _REPEATED)
