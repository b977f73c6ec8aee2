"""Health checks of PPO: do policy and value learn?"""

from __future__ import annotations

import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History


@check(
    "ppo",
    severity="critical",
    cause="the value model is not trained: its step size or its gradient is 0",
    action="set value_learning_rate and vf_coef above 0, and see that adapter and head of the value have requires_grad",
    needs=("ppo/value_grad_norm",),
    rows=3,
)
def value_untrained(h: History) -> str | None:
    """The value's step size and gradient norm."""
    for name, what in (("ppo/value_lr", "step size"), ("ppo/value_grad_norm", "gradient norm")):
        values = h.values(name, 3)
        if len(values) >= 3 and max(values) == 0:
            return f"{what} of the value model 0 in {len(values)} updates in a row"
    return None


@check(
    "ppo",
    severity="warning",
    cause="the value head is dead: it gives every token the same value",
    action="start it from the reward model, raise value_learning_rate, or set value_warmup_updates",
    needs=(
        "ppo/value_std",
        "ppo/advantage_std",
    ),
    rows=8,
)
def value_dead(h: History) -> str | None:
    """The spread of the values against that of the advantages."""
    values, advantages = h.values("ppo/value_std", 3), h.values("ppo/advantage_std", 3)
    if statistics.fmean(values) > 0.02 * statistics.fmean(advantages):
        return None
    return f"spread of the values {statistics.fmean(values):.2g}, of the advantages {statistics.fmean(advantages):.2g}"


@check(
    "ppo",
    severity="warning",
    cause="the values mislead the policy: they explain less of the returns than a constant would",
    action="raise value_learning_rate or clip_range_value, set value_warmup_updates, or start the value from the reward model",
    needs=("ppo/explained_variance",),
    rows=10,
)
def value_useless(h: History) -> str | None:
    """Explained variance below 0 for long."""
    values = h.values("ppo/explained_variance", 10)
    before, recent, warmup = values[:5], values[5:], int(h.settings.get("value_warmup_updates") or 0)
    if h.count("ppo/explained_variance") < warmup + 10 or max(recent) > -0.02:
        return None
    if statistics.fmean(recent) > 0.5 * statistics.fmean(before):
        return None  # it is on its way up
    return f"explained variance {min(recent):.2g} to {max(recent):.2g} in the last {len(recent)} updates"


@check(
    "ppo",
    severity="critical",
    cause="steps are too large: the policy changes more in one rollout's updates than the clip can hold",
    action="lower learning_rate or num_ppo_epochs, set warmup_steps or max_approx_kl",
    needs=(
        "ppo/approx_kl",
        "ppo/clipfrac",
        "ppo/ratio_max",
    ),
)
def steps_too_large(h: History) -> str | None:
    """Bursts of the ratio, the clip and the KL of one rollout's updates."""
    approx, clipped, ratios = (h.values(f"ppo/{name}", 3) for name in ("approx_kl", "clipfrac", "ratio_max"))
    burst = approx[-1] > 0.2 or clipped[-1] > 0.5
    lasting = len(approx) >= 3 and (sorted(approx)[1] > 0.08 or sorted(clipped)[1] > 0.35 or sorted(ratios)[1] > 100)
    if not (burst or lasting):
        return None
    worst = f"{max(clipped):.0%} of tokens clipped, largest ratio {max(ratios):.3g}"
    return f"approx_kl {max(approx):.2g} nats a token, {worst}"


@check(
    "ppo",
    severity="warning",
    cause="one batch had a gradient far out of the usual: an outlier among the scores, or ratios that ran away",
    action="set reward_clip; max_grad_norm holds the step, but look at the samples of that update",
    needs=("ppo/grad_norm",),
    rows=8,
)
def gradient_spike(h: History) -> str | None:
    """A gradient norm far above the usual one, and above the limit that it is clipped to."""
    *before, norm = h.values("ppo/grad_norm", 20)
    usual, limit = statistics.median(before), float(h.settings.get("max_grad_norm") or 1.0)
    spike = norm > max(10 * usual, 3 * max(before), limit)
    return f"gradient norm {norm:.3g}, usually {usual:.3g}, {max(before):.3g} at most" if spike else None


@check(
    "ppo",
    severity="warning",
    cause="advantages are all but equal, and whitening blows what is left up to full size: noise is trained on",
    action="look at objective/score_std; stop, or sample wider (more prompts, higher temperature)",
    needs=("ppo/advantage_std",),
    rows=6,
)
def advantages_vanished(h: History) -> str | None:
    """Spread of the advantages before whitening, against the start."""
    change = h.change("ppo/advantage_std")
    if change[1] > 0.1 * change[0]:
        return None
    return f"spread of the advantages fell from {change[0]:.3g} to {change[1]:.3g}"


@check(
    "ppo",
    severity="warning",
    cause="the machine has become slower: another process, swapping, a throttled GPU, or a leak",
    action="look at the machine's load and memory; the run itself may be fine",
    needs=(
        "time/rollout",
        "time/score",
        "time/optimise",
        "response/length",
    ),
    rows=18,
)
def slowing_down(h: History) -> str | None:
    """Seconds a token of whole updates, against the first ones."""
    parts = [h.values(f"time/{name}") for name in ("rollout", "score", "optimise")]
    lengths = h.values("response/length")
    if len({len(lengths), *map(len, parts)}) > 1:
        return None
    seconds = [sum(times) / length for *times, length in zip(*parts, lengths, strict=True)]
    first, now = statistics.median(seconds[1:9]), statistics.median(seconds[-8:])
    return f"an update takes {now / first:.1f} times as long a token as at the start" if now > 3 * first else None
