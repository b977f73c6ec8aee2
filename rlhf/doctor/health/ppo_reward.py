"""Health checks of PPO: is the reward one that can be learned from?"""

from __future__ import annotations

import math
import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History
from rlhf.doctor.health.series import _noise, _responses, _smooth


@check(
    "ppo",
    severity="critical",
    cause="the reward gives every response the same score: a constant function, a head that was not loaded, or a clip that "
    "all scores are beyond",
    action="score a good and a bad answer by hand; look at the reward's report card",
    needs=("objective/score_std",),
    rows=2,
)
def reward_constant(h: History) -> str | None:
    """The spread of the scores in the first rollouts; where it vanishes later, the policy has found what pays."""
    spread = h.first("objective/score_std", 2)
    return f"spread of the scores {max(spread):.2g}" if max(spread) < 1e-6 else None


@check(
    "ppo",
    severity="critical",
    cause="the reward model does not score as it did when it was registered: head or adapter not loaded or merged twice, "
    "another template or tokenizer, or a score read at another token",
    action="run the reward model's report card on its own data again and compare; verify the registry",
    needs=(
        "objective/raw_score",
        "objective/score_std",
    ),
)
def reward_scale(h: History) -> str | None:
    """Mean and spread of the first rollout's scores, in standard deviations of the demonstrations' scores."""
    reward = h.settings.get("reward") or []
    if len(reward) != 1 or not str(reward[0]).startswith("reward/"):
        return None  # only a registered reward model has a zero and a unit
    mean, spread = h.at("objective/raw_score", 1), h.at("objective/score_std", 1)
    if mean is None or spread is None or spread < 1e-6 or (abs(mean) <= 5 and 0.05 <= spread <= 5):
        return None  # equal scores are another check's
    return (
        f"scores of the SFT model's responses are {mean:.3g} +- {spread:.3g}, where 0 +- 1 is what demonstrations get"
    )


@check(
    "ppo",
    severity="critical",
    cause="the reward prefers what the independent judge likes least: its sign is flipped, or its labels were swapped",
    action="look at pairs with their scores; turn the sign or the labels, and train the reward model again",
    needs=("objective/gold_correlation",),
    rows=5,
)
def reward_opposes_judge(h: History) -> str | None:
    """Correlation of reward and judge among the responses of the first rollouts."""
    mean, needed = _judge_correlation(h, 5)
    return f"reward and judge correlate by {mean:.2f} in the first rollouts" if mean < -0.1 - needed else None


@check(
    "ppo",
    severity="warning",
    cause="the reward knows nothing of what the independent judge looks at: shuffled labels, a random head, or another task",
    action="compare the reward model with the judge on its own data: its report card, gold accuracy",
    needs=("objective/gold_correlation",),
    rows=10,
)
def reward_ignores_judge(h: History) -> str | None:
    """The same correlation, over the first ten rollouts."""
    mean, needed = _judge_correlation(h, 10)
    return (
        f"reward and judge correlate by {mean:.2f} in the first rollouts" if abs(mean) < 0.1 and needed < 0.15 else None
    )


@check(
    "ppo",
    severity="critical",
    cause="over-optimisation: the policy has learned what the reward model gets wrong",
    action="stop at the judge's best update; raise kl_coef, set kl_target, or train the reward model on the new responses",
    remedy="kl_coef",
    needs=(
        "objective/gold",
        "objective/raw_score",
        "objective/score_std",
    ),
    rows=12,
)
def over_optimised(h: History) -> str | None:
    """The reward goes on rising while an independent judge falls, or stands still."""
    gold, score = h.values("objective/gold"), h.values("objective/raw_score")
    if len(gold) != len(score):
        return None
    smooth_gold, smooth_score, noise = _smooth(gold), _smooth(score), _noise(gold)
    best = max(range(len(smooth_gold)), key=smooth_gold.__getitem__)
    spread = statistics.fmean(h.first("objective/score_std", 3))
    if smooth_gold[-1] < smooth_gold[best] - 6 * noise and smooth_score[-1] > smooth_score[best]:
        return (
            f"the judge fell from {smooth_gold[best]:.3g} to {smooth_gold[-1]:.3g} while the score rose from "
            f"{smooth_score[best]:.3g} to {smooth_score[-1]:.3g}"
        )
    if len(smooth_gold) <= 10:
        return None
    risen, gained = smooth_score[-1] - smooth_score[-11], smooth_gold[-1] - smooth_gold[-11]
    stalled = risen > max(spread, 6 * _noise(score)) and gained < 0
    return f"the score rose by {risen:.3g} in ten updates, the judge by {gained:.2g}" if stalled else None


@check(
    "ppo",
    severity="warning",
    cause="the reward pays for length itself, and the policy has found out",
    action="look at the length bias on the reward model's report card; balance its data, or set response_length tighter",
    remedy="kl_coef",
    needs=(
        "objective/length_correlation",
        "response/length",
    ),
    rows=6,
)
def length_rewarded(h: History) -> str | None:
    """A strong correlation of reward and length that has risen, or that the length follows."""
    (at_first, mean), (before, now) = (
        h.change("objective/length_correlation"),
        h.change("response/length"),
    )
    followed = now > 1.25 * before if mean > 0 else now < 0.75 * before
    if abs(mean) < 0.6 or not (followed or abs(mean) - abs(at_first) > 0.4):
        return None
    return (
        f"correlation of reward and length {mean:.2f}, {at_first:.2f} at the start; length went from {before:.3g} to "
        f"{now:.3g} tokens"
    )


@check(
    "ppo",
    severity="warning",
    cause="the reward is saturated: nearly all responses get the same score, and the rest is noise",
    action="stop here, or make the reward finer; more updates only move the policy away",
    remedy="kl_coef",
    needs=("objective/score_std",),
    rows=6,
)
def reward_saturated(h: History) -> str | None:
    """Spread of the scores against the start."""
    change = h.change("objective/score_std")
    if change[1] > 0.15 * change[0] or reward_constant(h):
        return None
    return f"spread of the scores fell from {change[0]:.3g} to {change[1]:.3g}"


@check(
    "ppo",
    severity="warning",
    cause="PPO lowers its own reward: steps too large, values that mislead, or an advantage with the wrong sign",
    action="lower learning_rate; look at ppo/explained_variance and ppo/approx_kl",
    needs=(
        "objective/score",
        "objective/score_std",
    ),
    rows=10,
)
def reward_falling(h: History) -> str | None:
    """The score against the start, in spreads of the first rollouts."""
    change = h.change("objective/score", start=3, recent=5)
    spread = statistics.fmean(h.first("objective/score_std", 3))
    if change[1] > change[0] - max(0.6 * spread, 1e-6):
        return None
    return f"the score fell from {change[0]:.3g} to {change[1]:.3g}, spread {spread:.2g}"


def _judge_correlation(h: History, rollouts: int) -> tuple[float, float]:
    """Mean correlation of reward and judge in the first rollouts, and three standard errors of it."""
    values = h.first("objective/gold_correlation", rollouts)
    return statistics.fmean(values), 3 / math.sqrt(max(_responses(h) * rollouts, 1))
