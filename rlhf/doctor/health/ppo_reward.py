"""Health checks of PPO: can the reward and the first responses be learned from?"""

from __future__ import annotations

import math
import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History
from rlhf.doctor.health.series import FAR_AWAY, rollout_size

#: Spread of scores that counts as none.
NO_SPREAD = 1e-6


@check(
    severity="critical",
    shows="the reward gives every response the same score",
    causes={
        "a constant function": [],
        "a head that was not loaded": ["audit:raw_scores"],
        "a clip that all scores are beyond": [],
    },
    action="score a good and a bad answer by hand; look at the reward's report card",
    explains=(
        "value_dead",
        "value_useless",
        "advantages_vanished",
        "reward_saturated",
        "reward_falling",
        "gradient_spike",
    ),
    needs=("objective/score_std",),
    rows=2,
)
def reward_constant(h: History, *, spread: float = NO_SPREAD) -> str | None:
    """Below {spread:g} in the first {rows} rollouts; where it vanishes later, the policy has found what pays."""
    largest = max(h.first("objective/score_std", 2))
    return f"spread of the scores {largest:.2g}" if largest < spread else None


@check(
    severity="critical",
    shows="the reward model does not score as it did when it was registered",
    causes={
        "a head or an adapter that is not loaded, or merged twice": ["audit:raw_scores"],
        "another template or tokenizer": ["audit:raw_scores"],
        "responses of another kind than it was trained on": [],
    },
    action="run the reward model's report card on its own data again and compare; verify the registry",
    explains=("value_useless", "value_dead", "gradient_spike"),
    needs=("objective/raw_score", "objective/score_std"),
)
def reward_scale(h: History, *, mean: float = 5, narrow: float = 0.05, wide: float = 5) -> str | None:
    """First rollout, one reward model that was trained here: mean beyond {mean:g}, or spread outside {narrow:g} to {wide:g},
    where demonstrations have 0 and 1."""
    reward = h.settings.get("reward") or []
    if h.settings.get("own_unit") or len(reward) != 1 or not str(reward[0]).startswith("reward/"):
        return None  # other rewards have no zero and no unit
    score, spread = h.at("objective/raw_score", 1), h.at("objective/score_std", 1)
    if score is None or spread is None or spread < NO_SPREAD:
        return None
    if abs(score) <= mean and narrow <= spread <= wide:
        return None
    return (
        f"scores of the SFT model's responses are {score:.3g} +- {spread:.3g}, where 0 +- 1 is what demonstrations get"
    )


@check(
    severity="warning",
    shows="the SFT model's answers score otherwise in the first rollout than in the evaluation before it",
    causes={
        "prompts that are cut or rendered in another way in one of the two": ["audit:prompts"],
        "scores that are computed or scaled in another way in one of the two": ["audit:raw_scores"],
        "held-out prompts of another kind": [],
    },
    action="read the first rollout's prompts and scores in samples.jsonl beside those of held-out prompts",
    explains=("reward_scale",),
    needs=("eval/score", "objective/raw_score", "objective/score_std"),
)
def start_differs(h: History, *, spreads: float = 1, errors: float = 6) -> str | None:
    """First evaluation and first rollout: means apart by more than {spreads:g} spread and {errors:g} standard errors."""
    evaluated, score, spread = (
        h.first(name, 1)[0] for name in ("eval/score", "objective/raw_score", "objective/score_std")
    )
    answers = h.setting("num_eval_prompts", 1)
    error = spread * math.sqrt(1 / max(rollout_size(h), 1) + 1 / answers)
    if spread < NO_SPREAD or abs(score - evaluated) <= max(spreads * spread, errors * error):
        return None
    return f"mean score {score:.3g} +- {spread:.2g} in the first rollout, {evaluated:.3g} on held-out prompts"


@check(
    severity="critical",
    shows="the reward prefers what the independent judge likes least",
    causes={
        "labels that were swapped": [],
        "a reward with the wrong sign": ["audit:raw_scores"],
        "a judge of another taste": [],
    },
    action="look at pairs with their scores; turn the sign or the labels, and train the reward model again",
    explains=("reward_ignores_judge", "over_optimised"),
    needs=("objective/gold_correlation",),
    rows=5,
)
def reward_opposes_judge(h: History, *, correlation: float = -0.1, errors: float = 3) -> str | None:
    """Mean of the first {rows} rollouts below {correlation:g} less {errors:g} standard errors."""
    mean, error = judge_correlation(h, 5)
    if mean >= correlation - errors * error:
        return None
    return f"reward and judge correlate by {mean:.2f} in the first rollouts"


@check(
    severity="critical",
    shows="the SFT model answers nothing",
    causes={
        "demonstrations without answers": [],
        "a stop token with which the prompt ends, so that the answer is over": ["audit:prompts"],
    },
    action="read the SFT stage's demonstrations, and samples.jsonl; train SFT again",
    explains=(
        "reward_constant",
        "reward_scale",
        "start_differs",
        "value_dead",
        "value_useless",
        "advantages_vanished",
        "responses_alike",
        "reward_saturated",
    ),
    data="responses in `samples.jsonl`",
)
def answers_empty(h: History, *, share: float = 0.5, answers: int = 8) -> str | None:
    """At least {share:.0%} of {answers} or more answers in the first 3 rollouts are blank."""
    texts = list(_first_answers(h).values())
    blank = texts.count("")
    return (
        f"{blank} of {len(texts)} answers are blank" if len(texts) >= answers and blank >= share * len(texts) else None
    )


@check(
    severity="warning",
    shows="the SFT model has one answer to different prompts",
    causes={
        "demonstrations with one answer": [],
        "prompts that are cut to what they share": ["audit:prompts"],
        "a task with few answers": [],
    },
    action="read the SFT stage's demonstrations, and samples.jsonl",
    explains=("reward_constant", "advantages_vanished", "value_dead", "reward_saturated"),
    data="prompts and responses in `samples.jsonl`",
)
def answers_alike(h: History, *, share: float = 0.8, answers: int = 8) -> str | None:
    """At least {share:.0%} of {answers} or more answers to different prompts in the first 3 rollouts are one text."""
    texts = list(_first_answers(h).values())
    count = max(map(texts.count, filter(None, texts)), default=0)
    if len(texts) < answers or count < share * len(texts):
        return None
    return f"{count} of {len(texts)} answers to different prompts are one text"


@check(
    severity="warning",
    shows="most responses are cut off at response_length and scored unfinished",
    causes={
        "an SFT model that never learned to stop": [],
        "a response_length that is too low": [],
        "a stop token that is not the model's": [],
    },
    action="raise response_length; look whether SFT answers end in the stop token; set missing_eos_penalty",
    explains=("stop_rate_falling", "value_useless", "reward_saturated"),
    needs=("response/stop_rate",),
    rows=3,
)
def cut_off(h: History, *, stopped: float = 0.35) -> str | None:
    """Mean of the first {rows} rollouts below {stopped:.0%}."""
    mean = statistics.fmean(h.first("response/stop_rate", 3))
    return f"{mean:.0%} of the first rollouts' responses end in a stop token" if mean < stopped else None


@check(
    severity="warning",
    shows="score and length rise or fall together, more than at the start",
    causes={
        "a reward that pays for length itself": ["investigation:reward_length"],
        "a task in which good answers have another length": [],
        "scores of cut or padded text": ["audit:raw_scores"],
    },
    action="look at the length bias on the reward model's report card; balance its data, or set response_length tighter",
    explains=(*FAR_AWAY, "over_optimised"),
    remedy="kl_coef",
    needs=("objective/length_correlation", "response/length"),
    rows=6,
    source="Singhal et al. 2023",
)
def length_rewarded(
    h: History, *, correlation: float = 0.6, rise: float = 0.4, length_change: float = 0.25
) -> str | None:
    """After {rows} rollouts: correlation at least {correlation:g} (mean of the last 3), and either {rise:g} above that of the
    first 3, or the length {length_change:.0%} off its start in that direction."""
    (start, now), (length, length_now) = h.change("objective/length_correlation"), h.change("response/length")
    followed = length_now > (1 + length_change) * length if now > 0 else length_now < (1 - length_change) * length
    if abs(now) < correlation or not (followed or abs(now) - abs(start) > rise):
        return None
    return (
        f"correlation of reward and length {now:.2f}, {start:.2f} at the start; length went from {length:.3g} to "
        f"{length_now:.3g} tokens"
    )


def _first_answers(h: History) -> dict[str, str]:
    """Return an answer to each different prompt of the first rollouts."""
    rows = [row for row in h.samples if (row.get("step") or 0) <= 3 and "response" in row]
    return {str(row.get("prompt", "")): str(row["response"]).strip() for row in rows}


def judge_correlation(h: History, rollouts: int) -> tuple[float, float]:
    """Return the mean correlation of reward and judge in the first rollouts, and its standard error."""
    values = h.first("objective/gold_correlation", rollouts)
    return statistics.fmean(values), 1 / math.sqrt(max(rollout_size(h) * rollouts, 1))
