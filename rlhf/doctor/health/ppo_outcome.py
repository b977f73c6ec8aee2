"""Health checks of PPO: what becomes of reward, responses and values?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History
from rlhf.doctor.health.ppo_reward import judge_correlation, reward_constant
from rlhf.doctor.health.series import FAR_AWAY, exact_kl, gradient_outlier, noise, trend

#: Updates of a running mean.
WIDTH = 5

# ---- what the reward pays for ---------------------------------------------------------------------------------------


@check(
    severity="critical",
    shows="the score rises while the judge does not",
    causes={
        "over-optimisation: the policy has learned what the reward model gets wrong": [],
        "a reward that pays for length": ["investigation:reward_length"],
        "a reward that pays for repetition": ["investigation:reward_repetition"],
        "a judge that looks at other things than the task": [],
    },
    action="stop at the judge's best update; raise kl_coef, set kl_target, or train the reward model on the new responses",
    explains=FAR_AWAY,
    remedy="kl_coef",
    needs=("objective/gold", "objective/raw_score", "objective/score_std"),
    rows=12,
    source="Gao et al. 2022",
)
def over_optimised(h: History, *, errors: float = 6, updates: int = 10) -> str | None:
    """Over running means of 5: the judge is {errors:g} standard errors below its best while the score is above what it was
    then; or in {updates} updates the score rose by a whole spread and {errors:g} standard errors, and the judge fell."""
    gold, score = h.values("objective/gold"), h.values("objective/raw_score")
    if len(gold) != len(score):
        return None
    golds, scores, margin = _running_means(gold), _running_means(score), errors * _standard_error(gold)
    best = max(range(len(golds)), key=golds.__getitem__)
    if golds[-1] < golds[best] - margin and scores[-1] > scores[best]:
        return (
            f"the judge fell from {golds[best]:.3g} to {golds[-1]:.3g} while the score rose from {scores[best]:.3g} to "
            f"{scores[-1]:.3g}"
        )
    if len(golds) <= updates:
        return None
    rise, gain = scores[-1] - scores[-1 - updates], golds[-1] - golds[-1 - updates]
    spread = statistics.fmean(h.first("objective/score_std", 3))
    if rise <= max(spread, errors * _standard_error(score)) or gain >= 0:
        return None
    return f"the score rose by {rise:.3g} in {updates} updates, the judge by {gain:.2g}"


@check(
    severity="warning",
    shows="the reward knows nothing of what the independent judge looks at",
    causes={
        "labels that say nothing about the answers": [],
        "a head that is random": ["audit:raw_scores"],
        "a judge of another task": [],
    },
    action="compare the reward model with the judge on its own data: its report card, gold accuracy",
    needs=("objective/gold_correlation",),
    rows=10,
)
def reward_ignores_judge(h: History, *, correlation: float = 0.1, precision: float = 0.15) -> str | None:
    """Mean of the first {rows} rollouts within {correlation:g} of 0, and 3 standard errors below {precision:g}."""
    mean, error = judge_correlation(h, 10)
    if abs(mean) >= correlation or 3 * error >= precision:
        return None
    return f"reward and judge correlate by {mean:.2f} in the first rollouts"


# ---- responses ------------------------------------------------------------------------------------------------------


@check(
    severity="critical",
    shows="fewer and fewer responses end by themselves",
    causes={
        "a reward that likes unfinished texts": ["investigation:reward_unfinished"],
        "a missing_eos_penalty that is too small or not applied": ["audit:token_rewards"],
        "steps that are too large": [],
    },
    action="raise missing_eos_penalty or kl_coef; lower learning_rate",
    explains=("length_up", "repeated_text"),
    remedy="kl_coef",
    needs=("response/stop_rate",),
    rows=6,
)
def stop_rate_falling(h: History, *, fall: float = 0.3) -> str | None:
    """Mean of the last 3 lower by {fall:.0%} of responses than of the first 3."""
    start, now = h.change("response/stop_rate")
    return f"share of responses with a stop token fell from {start:.0%} to {now:.0%}" if now <= start - fall else None


@check(
    severity="critical",
    shows="the policy has one answer left, and nothing to explore",
    causes={
        "over-optimisation": [],
        "a KL term that is too weak, or has the wrong sign": ["audit:token_rewards"],
        "steps that are too large": [],
    },
    action="raise kl_coef, lower learning_rate; check that the reward tells good answers apart",
    explains=("responses_alike", "repeated_text", "reward_saturated", "advantages_vanished", "kl_high"),
    remedy="kl_coef",
    needs=("objective/entropy",),
    rows=6,
)
def entropy_collapse(h: History, *, share: float = 0.2) -> str | None:
    """Mean of the last 3 at most {share:.0%} of the first 3."""
    start, now = h.change("objective/entropy")
    return f"entropy fell from {start:.3g} to {now:.3g} nats a token" if now <= share * start else None


@check(
    severity="warning",
    shows="all responses grow alike",
    causes={
        "over-optimisation: the few texts that the reward model likes best": [],
        "a KL term that is too weak": [],
        "prompts that are not read": ["audit:prompts"],
    },
    action="raise kl_coef or set kl_target, stop earlier",
    explains=("reward_saturated", "advantages_vanished"),
    remedy="kl_coef",
    needs=("response/distinct_2",),
    rows=6,
    source="Li et al. 2016 (distinct-n)",
)
def responses_alike(h: History, *, share: float = 0.6) -> str | None:
    """Mean of the last 3 at most {share:.0%} of the first 3."""
    start, now = h.change("response/distinct_2")
    return f"distinct word pairs fell from {start:.0%} to {now:.0%}" if now <= share * start else None


@check(
    severity="warning",
    shows="responses repeat themselves",
    causes={
        "a reward that pays for words, however often they come": ["investigation:reward_repetition"],
        "a policy that does not stop": [],
    },
    action="raise kl_coef; show the reward model repeated texts as bad ones",
    remedy="kl_coef",
    needs=("response/repetition",),
    rows=6,
)
def repeated_text(h: History, *, rise: float = 0.15) -> str | None:
    """Mean of the last 3 higher by {rise:.0%} of word triples than of the first 3."""
    start, now = h.change("response/repetition")
    return f"{now:.0%} of word triples are repetitions, {start:.0%} at the start" if now >= start + rise else None


@check(
    severity="warning",
    shows="responses grow longer and longer",
    causes={
        "a reward that likes length": ["investigation:reward_length"],
        "stopping that became rare": [],
        "advantages that favour the end of a response": ["audit:advantages"],
    },
    action="look at objective/length_correlation; balance the reward model by length, raise kl_coef",
    remedy="kl_coef",
    needs=("response/length",),
    rows=6,
    source="Singhal et al. 2023",
)
def length_up(h: History, *, factor: float = 2, tokens: float = 4) -> str | None:
    """Mean of the last 3 at least {factor:g} x the first 3, and {tokens:g} tokens above them."""
    start, now = h.change("response/length")
    return f"length rose from {start:.3g} to {now:.3g} tokens" if now >= max(factor * start, start + tokens) else None


@check(
    severity="warning",
    shows="responses shrink",
    causes={
        "a reward that likes short answers": [],
        "a KL cost that fewer tokens save": [],
        "advantages that punish going on": ["audit:advantages"],
    },
    action="set min_response_length and short_response_penalty; lower kl_coef if it is what they save",
    needs=("response/length",),
    rows=6,
)
def length_down(h: History, *, share: float = 0.4) -> str | None:
    """Mean of the last 3 at most {share:.0%} of the first 3."""
    start, now = h.change("response/length")
    return f"length fell from {start:.3g} to {now:.3g} tokens" if now <= share * start else None


@check(
    severity="warning",
    shows="the policy is far from the SFT model: what the reward model says of such text was never learned",
    causes={
        "a kl_coef that is too small for the reward's unit": [],
        "steps that are too large": [],
        "a KL term that is missing or has the wrong sign": ["audit:token_rewards"],
    },
    action="raise kl_coef or set kl_target; lower learning_rate if the score no longer rises",
    remedy="kl_coef",
    needs=("objective/kl_k3", "response/length"),
    rows=3,
    data="`objective/kl_full`, `response/length`",
)
def kl_high(h: History, *, token: float = 1, response: float = 2) -> str | None:
    """Mean of the last {rows} above {token:g} nats a token and {response:g} nats a response."""
    kl, length = statistics.fmean(exact_kl(h, 3)), statistics.fmean(h.values("response/length", 3))
    return f"KL {kl:.3g} nats in {length:.3g} tokens" if kl > max(response, token * length) else None


# ---- reward, values, speed ------------------------------------------------------------------------------------------


@check(
    severity="warning",
    shows="nearly all responses get the same score, and the rest is noise",
    causes={
        "a reward whose best the policy has reached": [],
        "responses that are all alike": [],
        "a clip that all scores are beyond": [],
    },
    action="stop here, or make the reward finer; more updates only move the policy away",
    explains=("advantages_vanished", "value_useless"),
    remedy="kl_coef",
    needs=("objective/score_std",),
    rows=6,
)
def reward_saturated(h: History, *, share: float = 0.15) -> str | None:
    """Mean of the last 3 at most {share:.0%} of the first 3, and not `reward_constant`."""
    start, now = h.change("objective/score_std")
    if now > share * start or reward_constant(h):
        return None
    return f"spread of the scores fell from {start:.3g} to {now:.3g}"


@check(
    severity="warning",
    shows="advantages are all but equal, and whitening blows what is left up to full size",
    causes={
        "scores without spread": [],
        "responses that are all alike": [],
    },
    action="look at objective/score_std; stop, or sample wider (more prompts, higher temperature)",
    needs=("ppo/advantage_std",),
    rows=6,
)
def advantages_vanished(h: History, *, share: float = 0.1) -> str | None:
    """Mean of the last 3 at most {share:.0%} of the first 3, before whitening."""
    start, now = h.change("ppo/advantage_std")
    return f"spread of the advantages fell from {start:.3g} to {now:.3g}" if now <= share * start else None


@check(
    severity="warning",
    shows="the value head gives every token the same value",
    causes={
        "a value head that starts at 0 and learns too slowly": [],
        "returns so large that its steps do not reach them": [],
        "a value model that is not trained": ["audit:optimizer_step"],
    },
    action="start it from the reward model, raise value_learning_rate, or set value_warmup_updates",
    explains=("value_useless",),
    needs=("ppo/value_std", "ppo/advantage_std"),
    rows=8,
)
def value_dead(h: History, *, share: float = 0.02) -> str | None:
    """After {rows} updates: spread of the values at most {share:.0%} of the advantages' (means of the last 3)."""
    values, advantages = (statistics.fmean(h.values(f"ppo/{name}_std", 3)) for name in ("value", "advantage"))
    if values > share * advantages:
        return None
    return f"spread of the values {values:.2g}, of the advantages {advantages:.2g}"


@check(
    severity="warning",
    shows="the values explain less of the returns than a constant would, and mislead the policy",
    causes={
        "a value model that learns too slowly or is clipped too tightly": [],
        "returns that are mostly noise": [],
        "returns or values that are computed wrongly": ["audit:values", "audit:returns"],
    },
    action="raise value_learning_rate or clip_range_value, set value_warmup_updates, or start the value from the reward model",
    needs=("ppo/explained_variance",),
    rows=10,
)
def value_useless(h: History, *, variance: float = -0.1, recovery: float = 0.5) -> str | None:
    """At most {variance:g} in each of the last 5 updates, after {rows} and the value warm-up; and their mean is not above
    {recovery:g} x that of the 5 before, which would be a value on its way up."""
    earlier, recent = h.values("ppo/explained_variance", 10)[:5], h.values("ppo/explained_variance", 5)
    if h.count("ppo/explained_variance") < h.setting("value_warmup_updates") + 10 or max(recent) > variance:
        return None
    if statistics.fmean(recent) > recovery * statistics.fmean(earlier):
        return None
    return f"explained variance {min(recent):.2g} to {max(recent):.2g} in the last {len(recent)} updates"


@check(
    severity="warning",
    shows="PPO lowers its own reward",
    causes={
        "advantages or a loss with the wrong sign": ["audit:advantages", "audit:policy_loss"],
        "steps that are too large": [],
        "values that mislead": [],
        "a KL cost that outweighs the score": [],
    },
    action="lower learning_rate; look at ppo/explained_variance and ppo/approx_kl",
    needs=("objective/score", "objective/score_std"),
    rows=10,
    data="`objective/score`",
)
def reward_falling(
    h: History, *, spreads: float = 0.6, least: float = 1e-6, updates: int = 20, errors: float = 6, slow: float = 0.2
) -> str | None:
    """After {rows} updates: mean of the last 5 below that of the first 3 by {spreads:g} spreads, {least:g} at least. After
    {updates}: a line through all of them falls by {slow:g} spreads and {errors:g} standard errors."""
    start, now = h.change("objective/score", start=3, recent=5)
    spread = statistics.fmean(h.first("objective/score_std", 3))
    if now <= start - max(spreads * spread, least):
        return f"the score fell from {start:.3g} to {now:.3g}, spread {spread:.2g}"
    scores = h.values("objective/score")
    if len(scores) < updates:
        return None
    change, error = trend(scores)
    if change > -max(errors * error, slow * spread, least):
        return None
    return f"the score fell steadily, by {-change:.3g} +- {error:.2g} in {len(scores)} updates, spread {spread:.2g}"


@check(
    severity="warning",
    shows="one batch had a gradient far out of the usual",
    causes={
        "an outlier among the scores": [],
        "ratios that ran away": [],
    },
    action="set reward_clip; max_grad_norm holds the step, but look at the samples of that update",
    needs=("ppo/grad_norm",),
    rows=8,
)
def gradient_spike(h: History, *, usual: float = 10, largest: float = 3, clip: float = 5) -> str | None:
    """Above {usual:g} x the median and {largest:g} x the largest of the 19 before, and above {clip:g} x `max_grad_norm`."""
    return gradient_outlier(h, usual=usual, largest=largest, floor=clip * h.setting("max_grad_norm", 1.0))


@check(
    severity="warning",
    shows="the machine has become slower",
    causes={
        "another process, or swapping": [],
        "a throttled GPU": [],
        "a leak": [],
    },
    action="look at the machine's load and memory; the run itself may be fine",
    needs=("time/rollout", "time/score", "time/optimise", "response/length"),
    rows=18,
)
def slowing_down(h: History, *, factor: float = 3) -> str | None:
    """Seconds a token: median of the last 8 updates above {factor:g} x that of updates 2 to 9."""
    series = [h.values(name) for name in ("time/rollout", "time/score", "time/optimise", "response/length")]
    if len({len(values) for values in series}) > 1:
        return None
    seconds = [sum(times) / length for *times, length in zip(*series, strict=True)]
    start, now = statistics.median(seconds[1:9]), statistics.median(seconds[-8:])
    return f"an update takes {now / start:.1f} times as long a token as at the start" if now > factor * start else None


def _running_means(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[i : i + WIDTH]) for i in range(len(values) - WIDTH + 1)]


def _standard_error(values: Sequence[float]) -> float:
    """Return the error of a running mean."""
    return noise(values) / math.sqrt(WIDTH)
