"""The health checks of pretraining, SFT and reward modelling, and those of any stage. Thresholds and sources: docs/health.md."""

from __future__ import annotations

import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History

# ---- any stage ------------------------------------------------------------------------------------------------------


@check(
    "pretrain", "sft", "reward", "ppo",
    severity="critical",
    cause="a figure overflowed or was divided by zero: the step size is too large, or the compute type too narrow",
    action="lower learning_rate, or use dtype float32, and start from the last good checkpoint",
)  # fmt: skip
def not_finite(h: History) -> str | None:
    """NaN or infinity in any figure."""
    broken = h.broken()
    return f"{', '.join(sorted(broken)[:4])} not finite from update {min(broken.values())}" if broken else None


@check(
    "pretrain", "sft", "reward", "ppo",
    severity="critical",
    cause="the step size is 0, so nothing is trained",
    action="set learning_rate; look at lr_scheduler_type and at warmup_steps, which may be longer than the run",
)  # fmt: skip
def learning_rate_zero(h: History) -> str | None:
    """A step size of 0 from the start; its fall to 0 at the end is a schedule."""
    lr = h.values(f"{h.stage}/lr")
    return f"learning rate 0 in all {len(lr)} updates" if len(lr) >= 3 and max(lr) == 0 else None


# ---- pretraining, SFT and reward model ------------------------------------------------------------------------------


@check(
    "pretrain", "sft", "reward",
    severity="critical",
    cause="no gradient reaches the weights: frozen adapters, or labels that are all masked out",
    action="see that the adapter has requires_grad and that the data has answers to train on",
)  # fmt: skip
def no_gradient(h: History) -> str | None:
    """A gradient norm of 0."""
    norms = h.values(f"{h.stage}/grad_norm", 3)
    return f"gradient norm 0 in {len(norms)} log lines in a row" if len(norms) >= 2 and max(norms) == 0 else None


@check(
    "pretrain", "sft", "reward",
    severity="critical",
    cause="training diverges: the step size is too large",
    action="lower learning_rate, or raise warmup_steps",
)  # fmt: skip
def loss_rising(h: History) -> str | None:
    """Training and held-out loss against the start."""
    loss, held_out = f"{h.stage}/loss", h.values(f"{h.stage}/eval_loss")
    if h.count(loss) >= 8:
        before, now = h.change(loss, recent=5)
        if now > 1.25 * before + 0.1:
            return f"training loss rose from {before:.3g} to {now:.3g}"
    if h.stage in ("pretrain", "sft") and len(held_out) >= 2 and held_out[-1] > 1.05 * held_out[0] + 0.02:
        return f"held-out loss rose from {held_out[0]:.3g} to {held_out[-1]:.3g}"
    return None


@check(
    "sft",
    severity="warning",
    cause="nothing is learned: the step size is far too small, or the loss is on other tokens than the answers",
    action="raise learning_rate; look at rows as the model sees them",
    needs=("sft/loss",),
    rows=12,
)
def loss_flat(h: History) -> str | None:
    """Held-out and training loss against the start."""
    change, held_out = h.change("sft/loss", recent=5), h.values("sft/eval_loss")
    if len(held_out) < 2 or change[1] < 0.98 * change[0] or held_out[-1] < 0.995 * held_out[0]:
        return None
    return f"held-out loss {held_out[0]:.4g} at first, {held_out[-1]:.4g} after {h.step} updates"


@check(
    "reward",
    severity="critical",
    cause="held-out pairs are ranked the wrong way round: labels are swapped in one of the splits, or the sign of the ratings",
    action="compare a few training and held-out pairs by eye: is the preferred answer the better one in both?",
    needs=("reward/eval_accuracy",),
    rows=3,
)
def accuracy_below_chance(h: History) -> str | None:
    """Held-out accuracy of the last two evaluations."""
    accuracy = h.values("reward/eval_accuracy", 2)
    return f"held-out accuracy {accuracy[-1]:.1%}" if max(accuracy) < 0.44 else None


@check(
    "reward",
    severity="critical",
    cause="the reward model ranks held-out pairs no better than a coin: shuffled labels, a step size of 0, or a score read at "
    "the wrong token",
    action="look at pairs by eye, and at the accuracy on training pairs; raise learning_rate if that is at chance, too",
    needs=("reward/eval_accuracy",),
    rows=3,
)
def accuracy_at_chance(h: History) -> str | None:
    """Held-out accuracy of the last two evaluations, which come after the one before training."""
    accuracy, training = h.values("reward/eval_accuracy", 2), h.values("reward/accuracy", 5)
    if max(accuracy) > 0.56 or accuracy_below_chance(h):
        return None
    return f"held-out accuracy {accuracy[-1]:.1%}" + (f", on training pairs {training[-1]:.1%}" if training else "")


@check(
    "pretrain", "sft", "reward",
    severity="warning",
    cause="one batch had a gradient far out of the usual",
    action="look at the rows of that batch; max_grad_norm holds the step",
)  # fmt: skip
def batch_spike(h: History) -> str | None:
    """A gradient norm far above the usual one."""
    if h.count(f"{h.stage}/grad_norm") < 8:
        return None
    *before, norm = h.values(f"{h.stage}/grad_norm", 20)
    usual, limit = statistics.median(before), float(h.settings.get("max_grad_norm") or 1.0)
    spike = norm > max(10 * usual, 3 * max(before), 5 * limit)
    return f"gradient norm {norm:.3g}, usually {usual:.3g}, {max(before):.3g} at most" if spike else None
