"""Health checks of PPO: what became of the responses?"""

from __future__ import annotations

import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History


@check(
    "ppo",
    severity="warning",
    cause="most responses are cut off at response_length and scored unfinished: the SFT model never learned to stop (a stop "
    "token masked out of its loss), or the limit is too low",
    action="raise response_length; look whether SFT answers end in the stop token; set missing_eos_penalty",
    needs=("response/stop_rate",),
    rows=3,
)
def cut_off(h: History) -> str | None:
    """The share of responses that end by themselves in the first rollouts."""
    rates = h.first("response/stop_rate", 3)
    mean = statistics.fmean(rates)
    return f"{mean:.0%} of the first rollouts' responses end in a stop token" if mean < 0.35 else None


@check(
    "ppo",
    severity="critical",
    cause="the policy unlearns to stop: the reward likes unfinished or long texts",
    action="raise missing_eos_penalty or kl_coef; lower learning_rate",
    remedy="kl_coef",
    needs=("response/stop_rate",),
    rows=6,
)
def stop_rate_falling(h: History) -> str | None:
    """The share of responses with a stop token, against the start."""
    change = h.change("response/stop_rate")
    if change[1] > change[0] - 0.3:
        return None
    return f"share of responses with a stop token fell from {change[0]:.0%} to {change[1]:.0%}"


@check(
    "ppo",
    severity="critical",
    cause="entropy collapse: the policy has one answer left, and nothing to explore",
    action="raise kl_coef, lower learning_rate; check that the reward tells good answers apart",
    remedy="kl_coef",
    needs=("objective/entropy",),
    rows=6,
)
def entropy_collapse(h: History) -> str | None:
    """Entropy against the start."""
    change = h.change("objective/entropy")
    if change[1] > 0.2 * change[0]:
        return None
    return f"entropy fell from {change[0]:.3g} to {change[1]:.3g} nats a token"


@check(
    "ppo",
    severity="warning",
    cause="all responses grow alike: the policy repeats the few texts that the reward model likes best (over-optimisation)",
    action="raise kl_coef or set kl_target, stop earlier",
    remedy="kl_coef",
    needs=("response/distinct_2",),
    rows=6,
)
def responses_alike(h: History) -> str | None:
    """Distinct word pairs of a rollout, against the start."""
    change = h.change("response/distinct_2")
    if change[1] > 0.6 * change[0]:
        return None
    return f"distinct word pairs fell from {change[0]:.0%} to {change[1]:.0%}"


@check(
    "ppo",
    severity="warning",
    cause="responses repeat themselves: the reward model pays for words, however often they come",
    action="raise kl_coef; show the reward model repeated texts as bad ones",
    remedy="kl_coef",
    needs=("response/repetition",),
    rows=6,
)
def repeated_text(h: History) -> str | None:
    """Word triples that a response has used before, against the start."""
    change = h.change("response/repetition")
    if change[1] < change[0] + 0.15:
        return None
    return f"{change[1]:.0%} of word triples are repetitions, {change[0]:.0%} at the start"


@check(
    "ppo",
    severity="warning",
    cause="responses grow longer and longer: the reward likes length, or stopping became rare",
    action="look at objective/length_correlation; balance the reward model by length, raise kl_coef",
    remedy="kl_coef",
    needs=("response/length",),
    rows=6,
)
def length_up(h: History) -> str | None:
    """Response length against the start."""
    change = h.change("response/length")
    if change[1] < 2 * change[0] or change[1] < change[0] + 4:
        return None
    return f"length rose from {change[0]:.3g} to {change[1]:.3g} tokens"


@check(
    "ppo",
    severity="warning",
    cause="responses shrink: fewer tokens cost less KL, or the reward likes short answers",
    action="set min_response_length and short_response_penalty; lower kl_coef if it is what they save",
    remedy="learning_rate",
    needs=("response/length",),
    rows=6,
)
def length_down(h: History) -> str | None:
    """Response length against the start."""
    change = h.change("response/length")
    if change[1] > 0.4 * change[0]:
        return None
    return f"length fell from {change[0]:.3g} to {change[1]:.3g} tokens"
