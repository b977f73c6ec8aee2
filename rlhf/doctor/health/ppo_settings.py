"""Health checks of PPO: do step size and KL coefficient fit the run?"""

from __future__ import annotations

import math
import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History
from rlhf.doctor.health.series import FAR_AWAY, exact_kl, rollout_size


@check(
    severity="warning",
    shows="nothing holds the policy near the SFT model",
    causes={
        "a kl_coef of 0": [],
    },
    action="set kl_coef (0.02 to 0.2), or kl_target",
    explains=(*FAR_AWAY, "over_optimised", "kl_jump", "value_useless"),
    remedy="kl_coef",
    needs=("objective/kl_coef", "objective/kl_k3", "response/length"),
    rows=3,
    source="Ziegler et al. 2019, section 2.1",
)
def no_kl_penalty(h: History, *, response: float = 5, token: float = 0.25) -> str | None:
    """0 in all rollouts, and a KL (mean of the last 3) of at least {response:g} nats or {token:g} a token."""
    kl, length = statistics.fmean(exact_kl(h, 3)), statistics.fmean(h.values("response/length", 3))
    if max(h.values("objective/kl_coef")) > 0 or kl < min(response, token * length):
        return None
    return f"kl_coef is 0 and the KL {kl:.3g} nats a response"


@check(
    severity="critical",
    shows="the policy changes more in one rollout's updates than the clip can hold",
    causes={
        "a step size that is too large, or no warm-up": [],
        "too many epochs over a rollout": [],
        "old log-probabilities that are not the policy's": ["audit:old_logprobs"],
        "scores far out of the usual unit": ["audit:raw_scores"],
    },
    action="lower learning_rate or num_ppo_epochs, set warmup_steps or max_approx_kl",
    explains=(
        *FAR_AWAY,
        "kl_jump",
        "negative_kl",
        "controller_saturated",
        "reward_falling",
        "value_useless",
        "gradient_spike",
    ),
    needs=("ppo/approx_kl", "ppo/clipfrac"),
    data="`ppo/approx_kl`, `ppo/clipfrac`, `ppo/ratio_max`",
    source="OpenAI's Spinning Up stops at 0.015; these are bursts",
)
def steps_too_large(
    h: History,
    *,
    burst_kl: float = 0.2,
    burst_clipped: float = 0.5,
    kl: float = 0.08,
    clipped: float = 0.35,
    ratio: float = 100,
) -> str | None:
    """Once approx_kl above {burst_kl:g} nats a token or {burst_clipped:.0%} of the tokens clipped; or in 2 of 3 updates
    approx_kl above {kl:g}, {clipped:.0%} clipped, or a ratio above {ratio:g}."""
    kls, shares, ratios = (h.values(f"ppo/{name}", 3) for name in ("approx_kl", "clipfrac", "ratio_max"))
    largest = f", largest ratio {max(ratios):.3g}" if ratios else ""  # logs of other projects have none
    burst = kls[-1] > burst_kl or shares[-1] > burst_clipped
    lasting = len(kls) >= 3 and (
        sorted(kls)[1] > kl or sorted(shares)[1] > clipped or (len(ratios) >= 3 and sorted(ratios)[1] > ratio)
    )
    if not (burst or lasting):
        return None
    return f"approx_kl {max(kls):.2g} nats a token, {max(shares):.0%} of tokens clipped{largest}"


@check(
    severity="critical",
    shows="the policy jumped away from the SFT model in one rollout's updates",
    causes={
        "a step size that is too large, or no warm-up": [],
        "a KL term that is missing or has the wrong sign": ["audit:token_rewards"],
        "rewards that outweigh the KL term": [],
    },
    action="lower learning_rate, set warmup_steps",
    explains=(*FAR_AWAY, "controller_saturated"),
    needs=("objective/kl_k3",),
    rows=2,
    data="`objective/kl_full`",
)
def kl_jump(h: History, *, margin: float = 3, factor: float = 3) -> str | None:
    """Above {margin:g} nats plus {factor:g} x the most of the 5 rollouts before."""
    *earlier, now = exact_kl(h, 6)
    if now <= margin + factor * max(*earlier, 0.0):  # an estimate may be below 0
        return None
    return f"KL went from {max(earlier):.3g} to {now:.3g} nats in one update"


@check(
    severity="warning",
    shows="the sampled KL is negative, which that of samples of the policy cannot be",
    causes={
        "tokens that are not drawn from the policy that is scored": ["audit:old_logprobs"],
        "reference and policy swapped": ["audit:ref_logprobs"],
        "a repetition penalty or a minimum length": [],
    },
    action="look at rollout/surprise_gap and rollout/logprob_gap; a repetition penalty or a minimum length does this, too",
    needs=("objective/kl",),
    rows=5,
    data="`objective/kl`, `objective/kl_full`",
    source="KL(p, q) >= 0; the log-ratio's variance is about 2 KL",
)
def negative_kl(h: History, *, kl: float = -0.05, errors: float = 4) -> str | None:
    """Mean of the last {rows} below {kl:g} nats and {errors:g} standard errors below 0."""
    kls, exact = h.values("objective/kl", 5), h.values("objective/kl_full", 5)
    if exact:
        error = math.sqrt(2 * max(statistics.fmean(exact), 0.0) / max(rollout_size(h) * 5, 1))
    else:  # logs of other projects have no exact KL
        error = statistics.stdev(kls) / math.sqrt(len(kls))
    mean = statistics.fmean(kls)
    if mean >= min(kl, -errors * error):
        return None
    return f"KL {mean:.3g} nats a response over 5 updates" + (
        f" (exact {statistics.fmean(exact):.3g})" if exact else ""
    )


@check(
    severity="warning",
    shows="the KL controller cannot hold its target",
    causes={
        "a kl_horizon by which it changes too slowly": [],
        "a step size that outruns any coefficient": [],
        "a KL term that is missing or has the wrong sign": ["audit:token_rewards"],
    },
    action="lower kl_horizon or learning_rate, or start from a higher kl_coef",
    explains=("kl_high",),
    remedy="kl_coef",
    needs=("objective/kl", "objective/kl_coef"),
    rows=10,
    source="Ziegler et al. 2019, section 2.2",
)
def controller_saturated(h: History, *, factor: float = 2) -> str | None:
    """Median KL of the last {rows} rollouts at least {factor:g} x `kl_target`, and all but one of them at least at it."""
    target = h.setting("kl_target")
    kl, coefficient = h.values("objective/kl", 10), h.values("objective/kl_coef", 10)
    if not target or statistics.median(kl) < factor * target or sorted(kl)[1] < target:
        return None
    return (
        f"KL {min(kl):.3g} to {max(kl):.3g} nats for {len(kl)} updates at a target of {target:.3g}, "
        f"kl_coef {coefficient[0]:.2g} to {coefficient[-1]:.2g}"
    )
