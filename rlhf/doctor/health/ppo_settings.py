"""Health checks of PPO: do KL and its coefficient stay in bounds?"""

from __future__ import annotations

import math
import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History
from rlhf.doctor.health.series import _kl, _responses


@check(
    "ppo",
    severity="warning",
    cause="nothing holds the policy near the SFT model: kl_coef is 0",
    action="set kl_coef (0.02 to 0.2), or kl_target",
    remedy="kl_coef",
    needs=(
        "objective/kl_coef",
        "objective/kl_k3",
        "response/length",
    ),
    rows=3,
)
def no_kl_penalty(h: History) -> str | None:
    """A KL coefficient of 0 with a KL that grows."""
    coefficient, length, kl = h.values("objective/kl_coef"), h.values("response/length", 3), _kl(h, 3)
    mean = statistics.fmean(kl)
    if max(coefficient) > 0 or mean < min(5, 0.25 * statistics.fmean(length)):
        return None
    return f"kl_coef is 0 and the KL {mean:.3g} nats a response"


@check(
    "ppo",
    severity="critical",
    cause="the policy jumped away from the SFT model in one rollout's updates: the step size is too large, or had no warm-up",
    action="lower learning_rate, set warmup_steps",
    needs=("objective/kl_k3",),
    rows=2,
)
def kl_jump(h: History) -> str | None:
    """KL of a rollout against the rollouts before it."""
    kl = _kl(h, 6)
    before = max(kl[:-1])
    return f"KL went from {before:.3g} to {kl[-1]:.3g} nats in one update" if kl[-1] > 3 + 3 * before else None


@check(
    "ppo",
    severity="warning",
    cause="KL cannot be negative: tokens are not drawn from the policy that is scored, or reference and policy are swapped",
    action="look at rollout/surprise_gap and rollout/logprob_gap; a repetition penalty or a minimum length does this, too",
    needs=(
        "objective/kl",
        "objective/kl_full",
    ),
    rows=5,
)
def negative_kl(h: History) -> str | None:
    """The sampled KL below 0 by more than its noise, or below the exact KL."""
    kl, exact = h.values("objective/kl", 5), h.values("objective/kl_full", 5)
    mean, true = statistics.fmean(kl), statistics.fmean(exact)
    # The log-ratio of a response has about twice its KL as variance.
    error = math.sqrt(2 * max(true, 0.0) / max(_responses(h) * len(kl), 1))
    return (
        f"KL {mean:.3g} nats a response over {len(kl)} updates (exact {true:.3g})"
        if mean < -max(0.05, 4 * error)
        else None
    )


@check(
    "ppo",
    severity="warning",
    cause="the policy is far from the SFT model: what the reward model says of such text was never learned",
    action="raise kl_coef or set kl_target; lower learning_rate if the score no longer rises",
    remedy="kl_coef",
    needs=(
        "objective/kl_k3",
        "response/length",
    ),
    rows=3,
)
def kl_high(h: History) -> str | None:
    """KL a token."""
    kl, length = _kl(h, 3), h.values("response/length", 3)
    total, tokens = statistics.fmean(kl), statistics.fmean(length)
    return f"KL {total:.3g} nats in {tokens:.3g} tokens" if total > max(2.0, 1.0 * tokens) else None


@check(
    "ppo",
    severity="warning",
    cause="the KL controller cannot hold its target: it changes too slowly, or the step size outruns any coefficient",
    action="lower kl_horizon or learning_rate, or start from a higher kl_coef",
    remedy="kl_coef",
    needs=(
        "objective/kl",
        "objective/kl_coef",
    ),
    rows=10,
)
def controller_saturated(h: History) -> str | None:
    """KL beyond twice its target over ten updates, of which one may be low by chance."""
    target = h.settings.get("kl_target")
    kl, coefficient = h.values("objective/kl", 10), h.values("objective/kl_coef", 10)
    if not target or statistics.median(kl) < 2 * float(target) or sorted(kl)[1] < float(target):
        return None
    return (
        f"KL {min(kl):.3g} to {max(kl):.3g} nats for {len(kl)} updates at a target of {float(target):.3g}, "
        f"kl_coef {coefficient[0]:.2g} to {coefficient[-1]:.2g}"
    )
