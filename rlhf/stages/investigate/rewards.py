"""Experiments with the reward of a PPO run: what it pays for, on answers and on what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.base.errors import UserError
from rlhf.base.intervals import Array
from rlhf.base.text import repetition
from rlhf.data_prep.load import load_rows
from rlhf.doctor.statements import Statement
from rlhf.stages.investigate.experiment import (
    Interval,
    confirmed,
    correlation,
    experiment,
    mean,
    ruled_out,
    undecided,
)
from rlhf.stages.investigate.subject import Answered, PPOSubject

#: Answers that are edited and scored again, and rankings of labelled data.
EDITED, RANKINGS = 48, 64
#: Gain in standard deviations of the scores of the SFT model's answers, from which a trick pays.
PAYS = 0.3
#: Spread of scores below which a reward is constant.
NO_SPREAD = 1e-6
#: Largest |correlation| or distance from one half that counts as none, where the interval lies within it.
NEAR_NONE = 0.2
_BAD_REWARD = (
    "reward_falling", "reward_opposes_judge", "reward_ignores_judge", "over_optimised", "reward_scale", "over_optimisation",
)  # fmt: skip


@experiment("ppo", needs=("sft",), settles=("reward_constant", "reward_saturated", "gradient_zero", *_BAD_REWARD))
def reward_judge(subject: PPOSubject) -> Iterator[Statement]:
    """Does the reward tell answers apart, and as the independent judge does?"""
    answered = subject.sft
    spread = float(answered.evaluation.scores.std())
    if spread < NO_SPREAD:
        yield confirmed(
            "reward_spread", f"{len(answered.texts)} answers of the SFT model score {answered.scores[0]:.3g}, all alike",
            cause="the reward is constant: it tells no answer from another",
            action="score a good and a bad answer by hand; look for a head that was not loaded, or a clip that all are beyond",
            explains=("reward_constant", "gradient_zero", "advantages_vanished", "reward_ignores_judge", "policy_unmoved",
                      "reward_falling", "value_useless", "value_dead", "same_as_sft", "reward_saturated", "reward_pairs",
                      "score_gained", "value_learns", "reward_steers", "over_optimisation"),
        )  # fmt: skip
        return
    yield ruled_out("reward_spread", f"answers of the SFT model have scores of spread {spread:.3g}: not constant")
    if answered.gold is None:
        return
    agreement = correlation(answered.scores, answered.gold, answered.groups)
    yield _agreement(
        "reward_judge", f"scores and judge correlate by {agreement} over {len(answered.texts)} answers of the SFT model",
        agreement, "the judge",
    )  # fmt: skip


def _agreement(name: str, measured: str, figure: Interval, truth: str) -> Statement:
    """Return the verdict on a figure of agreement that is 0 for a reward that knows nothing."""
    if figure.low > 0:
        return ruled_out(name, f"{measured}: neither flipped nor random")
    if figure.high < 0:
        return confirmed(
            name, measured, cause=f"the reward turns the order of {truth} round: its sign is flipped, or labels were swapped",
            action="look at pairs with their scores; turn the sign or the labels, and train the reward model again",
            explains=_BAD_REWARD,
        )  # fmt: skip
    if figure.low > -NEAR_NONE and figure.high < NEAR_NONE:
        return confirmed(
            name, measured, severity="warning", cause=f"the reward does not know the order of {truth}",
            action="look whether head and adapter of the reward model are those that were trained, and at its report card",
            explains=_BAD_REWARD,
        )  # fmt: skip
    return undecided(name, measured)


@experiment("ppo", passes=0.7, settles=_BAD_REWARD)
def reward_pairs(subject: PPOSubject) -> Iterator[Statement]:
    """Does the reward order held-out labelled pairs as people did?"""
    pairs = _labelled_pairs(subject)
    if not pairs:
        return
    scores = [
        subject.score([row for row, _, _ in pairs], texts) for texts in zip(*((a, b) for _, a, b in pairs), strict=True)
    ]
    right = (np.sign(scores[0] - scores[1]) + 1) / 2
    share = mean(right, np.arange(len(right)))
    measured = (
        f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%}) of {len(pairs)} held-out pairs in the right order"
    )
    yield _agreement(
        "reward_pairs", measured, Interval(*(2 * x - 1 for x in (share.value, share.low, share.high))), "people"
    )


def _labelled_pairs(subject: PPOSubject) -> list[tuple[Mapping[str, Any], str, str]]:
    """Return (row, better answer, worse answer) of held-out rankings: the best and the worst of each; none without such data."""
    sources = [str(reward.manifest.config.get("dataset", "")) for reward in subject.rewards] or [subject.config.dataset]
    pairs = []
    for source in sources:
        try:
            rows = load_rows(source, "validation", kind="comparisons").rows
        except UserError:
            continue
        for row in rows.select(range(min(RANKINGS, len(rows)))):
            order = np.argsort(row["ratings"], kind="stable")
            if row["ratings"][order[-1]] > row["ratings"][order[0]]:
                best, worst = (row["responses"][i][-1]["content"] for i in (order[-1], order[0]))
                pairs.append((row, best, worst))
    return pairs


@dataclass(frozen=True, kw_only=True)
class Trick:
    """A way to change answers that a reward should not pay for."""

    name: str
    what: str
    symptoms: tuple[str, ...]
    """Health checks that fire where a policy makes use of it."""
    statements: tuple[str, ...]
    """Experiments whose outcomes follow from it."""
    action: str


TRICKS = (
    Trick(
        name="reward_length", what="length: answers with another answer's text at their end",
        symptoms=("length_rewarded", "length_up", "stop_rate_falling", "over_optimised", "kl_high", "reward_ignores_judge"),
        statements=("endings", "reward_judge", "reward_pairs", "over_optimisation"),
        action="balance lengths in the comparisons, or subtract a penalty; raise kl_coef",
    ),
    Trick(
        name="reward_repetition", what="repetition: answers written twice",
        symptoms=("repeated_text", "length_up", "over_optimised", "responses_alike"), statements=("over_optimisation",),
        action="put repeated answers among the rejected ones; raise kl_coef",
    ),
    Trick(
        name="reward_unfinished", what="unfinished answers: their first half without a stop token",
        symptoms=("stop_rate_falling", "cut_off", "length_up"), statements=("endings", "over_optimisation"),
        action="raise missing_eos_penalty",
    ),
    Trick(
        name="reward_empty", what="empty answers",
        symptoms=("length_down", "over_optimised"), statements=("over_optimisation",),
        action="set min_response_length and short_response_penalty",
    ),
)  # fmt: skip


@experiment(
    "ppo",
    needs=("sft", "tuned"),
    passes=2.0,
    settles=tuple({symptom for trick in TRICKS for symptom in trick.symptoms}),
)
def reward_tricks(subject: PPOSubject) -> Iterator[Statement]:
    """Does the reward pay for length, repetition, unfinished or empty answers, and does the policy make use of it?"""
    answered = subject.sft
    chosen = np.linspace(0, len(answered.texts) - 1, min(EDITED, len(answered.texts))).astype(int)
    rows, groups = [answered.rows[i] for i in chosen], answered.groups[chosen]
    texts = [answered.texts[i] for i in chosen]
    unit = float(answered.scores.std())
    if unit < NO_SPREAD:
        return
    real = subject.score(rows, texts)

    def gain(edited: Sequence[str], *, finished: bool = True) -> Array:
        return (subject.score(rows, edited, finished=finished) - real) / unit

    others = [*texts[len(texts) // 2 :], *texts[: len(texts) // 2]]
    gains = {
        "reward_length": gain([f"{text} {other}".strip() for text, other in zip(texts, others, strict=True)]),
        "reward_repetition": gain([f"{text} {text}".strip() for text in texts]),
        "reward_unfinished": gain([_half(text) for text in texts], finished=False),
        "reward_empty": gain([""] * len(texts)),
    }
    for trick in TRICKS:
        figure = mean(gains[trick.name], groups)
        as_such = mean(gains[trick.name] - gains["reward_length"], groups)
        yield _trick(trick, figure, trick.name != "reward_repetition" or as_such.low > PAYS, subject)
    words = mean(gain([_shuffled(text) for text in texts]), groups)
    prompts = mean(gain(others), groups)
    yield ruled_out(
        "reward_reads", f"shuffled words change a score by {words}, an answer to another prompt by {prompts} standard "
        "deviations: what does not change it, the reward does not read"
    )  # fmt: skip


def _trick(trick: Trick, figure: Interval, as_such: bool, subject: PPOSubject) -> Statement:
    measured = f"{trick.what}, score {figure} standard deviations more than the answers themselves"
    if figure.low <= PAYS or not as_such:
        if figure.high > PAYS and as_such:
            return undecided(trick.name, measured)
        return ruled_out(trick.name, f"{measured}: not paid for" + ("" if as_such else " beyond their length"))
    used = _uses(subject.sft, subject.tuned)[trick.name]
    return confirmed(
        trick.name, f"{measured}; the policy {'makes use of it' if used else 'does not make use of it yet'}",
        severity="warning" if used else "note", cause=f"the reward pays for {trick.what.split(':')[0]}", action=trick.action,
        explains=trick.symptoms + trick.statements,
    )  # fmt: skip


def _uses(sft: Answered, tuned: Answered) -> dict[str, bool]:
    """Return whether the policy does more of each trick than the SFT model, beyond noise."""
    repeated = [np.array([repetition(text, 3) for text in one.texts]) for one in (sft, tuned)]
    longer = mean(tuned.lengths - 1.3 * sft.lengths, sft.groups)
    return {
        "reward_length": longer.low > 0,
        "reward_repetition": mean(repeated[1] - repeated[0], sft.groups).low > 0.05,
        "reward_unfinished": mean(tuned.stopped - sft.stopped, sft.groups).high < -0.1,
        "reward_empty": mean(tuned.lengths - 0.7 * sft.lengths, sft.groups).high < 0,
    }


def _half(text: str) -> str:
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2])


def _shuffled(text: str) -> str:
    words = text.split()
    return " ".join(words[i] for i in np.random.default_rng(len(words)).permutation(len(words)))
