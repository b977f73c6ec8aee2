"""Health checks of every stage, and of pretraining, SFT and reward modelling."""

from __future__ import annotations

import math
import statistics

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History
from rlhf.doctor.health.series import gradient_outlier, noise

# ---- every stage ----------------------------------------------------------------------------------------------------


@check(
    stages=("pretrain", "sft", "reward", "ppo"),
    severity="critical",
    shows="a figure overflowed or was divided by zero",
    causes={
        "steps that are too large": [],
        "a compute type that is too narrow": [],
        "a score or a row of the data that is not a number": [],
    },
    action="lower learning_rate, or use dtype float32, and start from the last good checkpoint",
    data="every figure",
)
def not_finite(h: History) -> str | None:
    """NaN or infinity, once."""
    broken = h.broken()
    return f"{', '.join(sorted(broken)[:4])} not finite from update {min(broken.values())}" if broken else None


@check(
    stages=("pretrain", "sft", "reward", "ppo"),
    severity="critical",
    shows="the step size is 0, so nothing is trained",
    causes={
        "learning_rate is 0": [],
        "a warm-up that is longer than the run": [],
    },
    action="set learning_rate; look at lr_scheduler_type and at warmup_steps, which may be longer than the run",
    explains=("loss_flat", "accuracy_at_chance", "policy_unmoved", "same_as_sft", "value_untrained", "value_useless"),
    needs=("STAGE/lr",),
    rows=3,
)
def learning_rate_zero(h: History) -> str | None:
    """0 in all log lines, {rows} at least: a fall to 0 at the end is a schedule."""
    lr = h.values(f"{h.stage}/lr")
    return f"learning rate 0 in all {len(lr)} updates" if max(lr) == 0 else None


@check(
    stages=("pretrain", "sft", "reward", "ppo"),
    severity="critical",
    shows="the step size fell to 0 before the end, and nothing is trained any more",
    causes={
        "a schedule that is told of fewer updates than there are": ["audit:learning_rate"],
        "a schedule that steps more often than the optimiser": ["audit:learning_rate"],
    },
    action="look at lr_scheduler_type and at the number of updates that the schedule is made for",
    explains=("value_untrained", "gradient_zero", "policy_unmoved"),
    needs=("STAGE/lr",),
    rows=4,
)
def schedule_ended(h: History, *, lines: int = 3) -> str | None:
    """0 in the last {lines} log lines, and not in all."""
    lr = h.values(f"{h.stage}/lr")
    if max(lr[-lines:]) > 0 or max(lr) == 0:
        return None
    return f"learning rate 0 in {sum(value == 0 for value in lr)} of {len(lr)} log lines, {max(lr):.2g} at most"


# ---- pretraining, SFT and reward model ------------------------------------------------------------------------------


@check(
    stages=("pretrain", "sft", "reward"),
    severity="critical",
    shows="no gradient reaches the weights",
    causes={
        "frozen adapters": [],
        "labels that are all masked out": [],
    },
    action="see that the adapter has requires_grad and that the data has answers to train on",
    explains=("loss_flat", "accuracy_at_chance"),
    needs=("STAGE/grad_norm",),
    rows=2,
)
def no_gradient(h: History) -> str | None:
    """0 in the last 3 log lines, or in {rows} if there are no more."""
    norms = h.values(f"{h.stage}/grad_norm", 3)
    return f"gradient norm 0 in {len(norms)} log lines in a row" if max(norms) == 0 else None


@check(
    stages=("pretrain", "sft", "reward"),
    severity="critical",
    shows="training makes the loss worse",
    causes={
        "a step size that is too large": [],
        "a gradient that is not the loss's": ["audit:gradient"],
        "held-out rows of another kind than the training rows": [],
    },
    action="lower learning_rate, or raise warmup_steps",
    data="`STAGE/loss`, `STAGE/eval_loss`",
)
def loss_rising(
    h: History,
    *,
    factor: float = 1.25,
    margin: float = 0.1,
    held_out_factor: float = 1.05,
    held_out_margin: float = 0.02,
) -> str | None:
    """Training loss: mean of the last 5 above {factor:g} x that of the first 3, plus {margin:g}. Held-out loss, in
    pretraining and SFT: above {held_out_factor:g} x the first, plus {held_out_margin:g}."""
    loss, held_out = f"{h.stage}/loss", h.values(f"{h.stage}/eval_loss")
    if h.count(loss) >= 8:
        start, now = h.change(loss, start=3, recent=5)
        if now > factor * start + margin:
            return f"training loss rose from {start:.3g} to {now:.3g}"
    if h.stage == "reward" or len(held_out) < 2 or held_out[-1] <= held_out_factor * held_out[0] + held_out_margin:
        return None
    return f"held-out loss rose from {held_out[0]:.3g} to {held_out[-1]:.3g}"


@check(
    stages=("sft", "reward"),
    severity="warning",
    shows="the model learns its training rows by heart",
    causes={
        "too many epochs for so few rows": [],
        "a step size that is too large": [],
        "held-out rows of another kind than the training rows": ["review:splits_differ"],
    },
    action="take fewer epochs, a lower learning_rate or more rows; SFT registers its best checkpoint, a reward model its last",
    needs=("STAGE/loss", "STAGE/eval_loss"),
    rows=3,
)
def overfitted(h: History, *, rise: float = 0.1, errors: float = 3) -> str | None:
    """Held-out loss {rise:.0%} above its lowest after rising at 2 evaluations or more, while the training loss (means of 5)
    fell by {errors:g} standard errors."""
    loss, held_out = h.values(f"{h.stage}/loss"), h.values(f"{h.stage}/eval_loss")
    lowest = min(range(len(held_out)), key=held_out.__getitem__)
    since = held_out[lowest:]
    if len(loss) < 10 or len(since) < 3 or since != sorted(since) or since[-1] <= (1 + rise) * since[0]:
        return None
    step = h.logged(f"{h.stage}/eval_loss")[lowest]
    before = statistics.fmean(h.until(step).values(f"{h.stage}/loss", 5) or loss[:5])
    now = statistics.fmean(loss[-5:])
    if now >= before - errors * math.sqrt(2 / 5) * noise(loss):
        return None
    return (
        f"held-out loss rose from {since[0]:.3g} at update {step} to {since[-1]:.3g}, training loss fell from {before:.3g} to "
        f"{now:.3g}"
    )


@check(
    stages=("reward",),
    severity="critical",
    shows="held-out pairs are ranked the wrong way round",
    causes={
        "labels that are swapped in one of the splits": [],
        "ratings with the wrong sign": [],
        "a loss with the wrong sign": ["audit:loss"],
    },
    action="compare a few training and held-out pairs by eye: is the preferred answer the better one in both?",
    explains=("overfitted",),
    needs=("reward/eval_accuracy",),
    rows=3,
)
def accuracy_below_chance(h: History, *, accuracy: float = 0.44) -> str | None:
    """Below {accuracy:.0%} at the last 2 of at least {rows} evaluations."""
    recent = h.values("reward/eval_accuracy", 2)
    return f"held-out accuracy {recent[-1]:.1%}" if max(recent) < accuracy else None


@check(
    stages=("reward",),
    severity="critical",
    shows="the reward model ranks held-out pairs no better than a coin",
    causes={
        "labels that say nothing about the answers": [],
        "a step size that is far too small": [],
        "a score that is read at the wrong token": ["audit:scores"],
    },
    action="look at pairs by eye, and at the accuracy on training pairs; raise learning_rate if that is at chance, too",
    needs=("reward/eval_accuracy",),
    rows=3,
)
def accuracy_at_chance(h: History, *, accuracy: float = 0.56) -> str | None:
    """At most {accuracy:.0%} at the last 2 of at least {rows} evaluations (the first is before training), and not
    `accuracy_below_chance`."""
    recent, training = h.values("reward/eval_accuracy", 2), h.values("reward/accuracy", 1)
    if max(recent) > accuracy or accuracy_below_chance(h):
        return None
    return f"held-out accuracy {recent[-1]:.1%}" + (f", on training pairs {training[-1]:.1%}" if training else "")


@check(
    stages=("sft", "reward"),
    severity="warning",
    shows="nothing is learned",
    causes={
        "a step size that is far too small": [],
        "a loss on other tokens than the answers": ["audit:labels"],
        "labels or answers that hold nothing to learn": [],
    },
    action="raise learning_rate; look at rows as the model sees them",
    needs=("STAGE/loss",),
    rows=12,
    data="`STAGE/loss`, `STAGE/eval_loss`",
)
def loss_flat(
    h: History, *, training_fall: float = 0.02, errors: float = 2, held_out_fall: float = 0.005
) -> str | None:
    """After {rows} log lines: training loss fell by at most {training_fall:.0%} or {errors:g} standard errors (mean of the
    last 5 against the first 3), held-out loss by at most {held_out_fall:.1%}: a reward model that never gets below ln 2."""
    loss, held_out = f"{h.stage}/loss", h.values(f"{h.stage}/eval_loss")
    start, now = h.change(loss, start=3, recent=5)
    fall = max(training_fall * start, errors * math.sqrt(1 / 3 + 1 / 5) * noise(h.values(loss)))
    if len(held_out) < 2 or now < start - fall or held_out[-1] < (1 - held_out_fall) * held_out[0]:
        return None
    return f"held-out loss {held_out[0]:.4g} at first, {held_out[-1]:.4g} after {h.step} updates"


@check(
    stages=("pretrain", "sft", "reward"),
    severity="warning",
    shows="one batch had a gradient far out of the usual",
    causes={
        "rows unlike the others": [],
        "steps that are too large": [],
    },
    action="look at the rows of that batch; max_grad_norm holds the step",
    needs=("STAGE/grad_norm",),
    rows=8,
)
def batch_spike(h: History, *, usual: float = 10, largest: float = 3, clip: float = 5) -> str | None:
    """Above {usual:g} x the median and {largest:g} x the largest of the 19 before, and above {clip:g} x `max_grad_norm`."""
    return gradient_outlier(h, usual=usual, largest=largest, floor=clip * h.setting("max_grad_norm", 1.0))
