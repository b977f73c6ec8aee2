"""Every limit of every health check: a history just inside, which passes, and one just outside, which is found.

The figures are computed from the limit in the code; docs/health.md holds the number itself (tests/test_docs.py). So a limit that
is not compared as it is written fails here, and one that is written otherwise fails there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf.doctor.health.findings import CHECKS
from rlhf.doctor.health.history import History
from rlhf.doctor.health.ppo_outcome import WIDTH

BY_NAME = {check.name: check for check in CHECKS}
#: Values of figures by update; a number stands for the same at every update.
Figures = Mapping[str, Sequence[float] | float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Histories around one limit of a check."""

    check: str
    limit: str = ""
    """Name of the limit; empty for what has none, where `values` are given."""
    at: Callable[[float], Figures | History]
    """Makes the figures for a measured value x."""
    found: str = "above"
    """Side of the limit that is found."""
    values: tuple[float, float] | None = None
    """Instead of the limit: x inside and x outside."""
    stage: str = "ppo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    """The history has as many rows as the check needs: without its first row, nothing is found."""

    def around(self) -> tuple[float, float]:
        """x just inside and just outside."""
        if self.values is not None:
            return self.values
        limit = BY_NAME[self.check].limits[self.limit]
        if isinstance(limit, int) and self.limit in ("updates", "answers", "lines"):
            return limit - 1, limit
        step = 0.01 * abs(limit) * (1 if self.found == "above" else -1)
        return limit - step, limit + step

    def history(self, x: float, skip: int = 0) -> History:
        made = self.at(x)
        if isinstance(made, History):
            return made
        length = max((len(v) for v in made.values() if isinstance(v, Sequence)), default=1)
        columns = {name: v if isinstance(v, Sequence) else [v] * length for name, v in made.items()}
        rows = [{"step": i + 1, **{n: v[i] for n, v in columns.items() if i < len(v)}} for i in range(length)]
        return History(self.stage, rows[skip:], settings=self.settings)


def comparison(equal: int, total: int) -> History:
    return History(
        "ppo", comparison=[{"sft_response": i, "ppo_response": i if i < equal else -1} for i in range(total)]
    )


def prompts(end: str) -> History:
    return History("ppo", samples=[{"prompt": f"user user {word} {end}"} for word in "ab"])


def spike(errors: float, share: float) -> float:
    """One value among twelve, the others 0 and the last five -1, so that the fall by 1 is so many standard errors.

    Neighbours differ by s, -s and -1: noise^2 is half of (2 s^2 + 1) / 11 - 1 / 121, and the error's square `share` x noise^2.
    """
    return math.sqrt((22 * (1 / (share * errors**2) + 1 / 242) - 1) / 2)


def answers(texts: Sequence[str], total: int) -> History:
    others = [f"answer {i}" for i in range(total - len(texts))]
    rows = [{"step": 1, "prompt": str(i), "response": text} for i, text in enumerate([*texts, *others])]
    return History("ppo", samples=[*rows, *({**row, "step": 4, "response": "late"} for row in rows)])


def falling_judge(errors: float) -> Figures:
    """Twelve updates at whose end the judge's running mean is so many standard errors below its best.

    Gold goes up and down by 1 and falls by s: neighbours differ by -s +- 2, of which there are 6 and 5; running means are s apart
    and +-1/5 off, so the last is 7 s + 2/5 below the first.
    """
    s = (errors * 2 * math.sqrt(1 - 1 / 121) / math.sqrt(2 * WIDTH) - 2 / WIDTH) / 7
    gold = [(-1) ** i - s * i for i in range(12)]
    return {"objective/gold": gold, "objective/raw_score": [float(i) for i in range(12)], "objective/score_std": 1e9}


def stalled_judge(rise: float, updates: int = 10, spread: float = 1.0, noise: float = 0.0) -> Figures:
    """The score's running mean rises by so much in the last updates, while a noisy judge falls next to nothing."""
    count = updates + WIDTH
    return {
        "objective/gold": [(-1) ** i - 1e-3 * i for i in range(count)],
        "objective/raw_score": [rise * i / updates + noise * (-1) ** i for i in range(count)],
        "objective/score_std": spread,
    }


def outlier(stage: str, check: str) -> list[Case]:
    """Limits of a gradient norm above the usual ones."""
    name = f"{stage}/grad_norm"
    low = {"max_grad_norm": 1e-6}
    long = {"exact": False, "settings": low}
    return [
        Case(check=check, stage=stage, limit="usual", settings=low, at=lambda x: {name: [1.0] * 7 + [x]}),
        Case(check=check, stage=stage, limit="largest", settings=low, at=lambda x: {name: [1e-6] * 6 + [1, x]}),
        Case(check=check, stage=stage, limit="clip", settings={"max_grad_norm": 2.0}, at=lambda x: {name: [1e-6] * 7 + [2 * x]}),
        Case(check=check, stage=stage, limit="clip", at=lambda x: {name: [1e-6] * 7 + [x]}),
        Case(check=check, stage=stage, limit="largest", at=lambda x: {name: [1e6, 50, *[1] * 18, 50 * x]}, **long),
    ]  # fmt: skip


def change(
    check: str, limit: str, figure: str, at: Callable[[float], float], start: float, found: str = "above"
) -> Case:
    """Means of the first three and the last three rollouts; `at` gives the latter."""
    return Case(
        check=check,
        limit=limit,
        found=found,
        at=lambda x: {figure: [c * v for v in (start, at(x)) for c in (0.5, 1, 1.5)]},
    )


STEPS = {"ppo/approx_kl": 0.0, "ppo/clipfrac": 0.0, "ppo/ratio_max": 1.0}
SCORES = {"objective/raw_score": 0.0, "objective/score_std": 1.0}
ONE_MODEL = {"reward": ["reward/demo"]}
MANY = {"rollout_batch_size": 1e14}
LENGTH_CORRELATION, LENGTH = "objective/length_correlation", "response/length"

CASES = [
    # every stage, SFT, reward model
    Case(check="not_finite", values=(1e300, math.inf), at=lambda x: {"ppo/policy_loss": [x]}),
    Case(check="learning_rate_zero", stage="sft", values=(1e-12, 0), at=lambda x: {"sft/lr": [x, 0.0, 0.0]}),
    Case(check="schedule_ended", stage="sft", values=(1e-12, 0), at=lambda x: {"sft/lr": [1.0, x, 0.0, 0.0]}),
    Case(check="schedule_ended", stage="sft", limit="lines", exact=False, at=lambda x: {"sft/lr": [1.0] * 3 + [0.0] * int(x)}),
    Case(check="schedule_ended", values=(0, 1e-12), exact=False, at=lambda x: {"ppo/lr": [x, 0.0, 0.0, 0.0]}),
    Case(check="no_gradient", stage="sft", values=(1e-12, 0), at=lambda x: {"sft/grad_norm": [x, 0.0]}),
    Case(check="no_gradient", stage="sft", values=(1e-12, 0), exact=False, at=lambda x: {"sft/grad_norm": [1.0, x, 0.0, 0.0]}),
    Case(check="loss_rising", limit="factor", stage="sft", at=lambda x: {"sft/loss": [0, 0, 3e6, 0, 0, 0, 0, 5e6 * x]}),
    Case(check="loss_rising", limit="margin", stage="reward", at=lambda x: {"reward/loss": [0.0] * 3 + [x] * 5}),
    Case(check="loss_rising", limit="held_out_factor", stage="sft", at=lambda x: {"sft/eval_loss": [1e6, 1e6 * x]}),
    Case(check="loss_rising", limit="held_out_margin", stage="pretrain", at=lambda x: {"pretrain/eval_loss": [0.0, x]}),
    Case(
        check="accuracy_below_chance", limit="accuracy", stage="reward", found="below",
        at=lambda x: {"reward/eval_accuracy": [0.6, x, 0.3]},
    ),
    Case(
        check="accuracy_at_chance", limit="accuracy", stage="reward", found="below",
        at=lambda x: {"reward/eval_accuracy": [0.6, x, 0.5]},
    ),
    Case(
        check="loss_flat", limit="training_fall", stage="sft", found="below",
        at=lambda x: {"sft/loss": [1.0] * 7 + [1 - x] * 5, "sft/eval_loss": 2.0},
    ),
    Case(
        check="loss_flat", limit="errors", stage="reward", found="below",
        at=lambda x: {"reward/loss": [0, 0, 0, spike(x, 1 / 3 + 1 / 5), 0, 0, 0, *[-1] * 5], "reward/eval_loss": 1.0},
    ),
    Case(
        check="overfitted", limit="errors", stage="reward", exact=False,
        at=lambda x: {"reward/loss": [0, spike(x, 2 / 5), *[0] * 5, *[-1] * 5], "reward/eval_loss": [3] * 6 + [1] * 5 + [2]},
    ),
    Case(
        check="overfitted", values=(2, 1), stage="sft", exact=False,  # the evaluation before the last: above it, or below
        at=lambda x: {"sft/loss": [9.0] * 7 + [1.0] * 5, "sft/eval_loss": [1.0, x, 1.5]},
    ),
    Case(
        check="overfitted", limit="rise", stage="sft", exact=False,
        at=lambda x: {"sft/loss": [9.0] * 7 + [1.0] * 5, "sft/eval_loss": [5.0] * 7 + [2.0, 2.0, 2.0, 2.01, 2 * (1 + x)]},
    ),
    Case(
        check="loss_flat", limit="held_out_fall", stage="sft", found="below",
        at=lambda x: {"sft/loss": 1.0, "sft/eval_loss": [1.0] * 11 + [1 - x]},
    ),
    *outlier("reward", "batch_spike"),
    # what PPO computes
    Case(check="wrong_reference", limit="kl", at=lambda x: {"objective/kl_k3": [x]}),
    Case(check="template_twice", values=(0, 1), exact=False, at=lambda x: prompts("assistant assistant" if x else "assistant")),
    Case(
        check="pad_is_stop", limit="difference", found="below",
        at=lambda x: {"rollout/pad_tokens": [0.5, 0.5 + x], "response/stop_rate": 0.5},
    ),
    Case(
        check="pad_is_stop", limit="difference", found="below", exact=False,
        at=lambda x: {"rollout/pad_tokens": [0.5, 0.5 + x, 9.0, 9.0], "response/stop_rate": 0.5},
    ),
    Case(check="padding_counted", limit="pads", at=lambda x: {"rollout/pad_tokens": [x, 9.0]}),
    Case(check="padding_counted", limit="pads", exact=False, at=lambda x: {"rollout/pad_tokens": [0.0, x, 9.0]}),
    Case(check="sampler_mismatch", limit="gap", at=lambda x: {"rollout/logprob_gap": [x]}),
    Case(check="sampler_mismatch", limit="gap", exact=False, at=lambda x: {"rollout/logprob_gap": [9.0, x, 0.0]}),
    Case(
        check="sampler_mismatch", limit="surprise",
        at=lambda x: {"rollout/logprob_gap": 0.0, "rollout/surprise_gap": [-x] * 3, "rollout/surprise_error": 1e-9},
    ),
    Case(
        check="sampler_mismatch", limit="errors", exact=False,
        at=lambda x: {
            "rollout/logprob_gap": 0.0,
            "rollout/surprise_gap": [0.0, 0.0, *[x / math.sqrt(8)] * 8],
            "rollout/surprise_error": 1.0,
        },
    ),
    Case(check="sampler_drift", limit="gap", at=lambda x: {"rollout/logprob_gap": [1e-6, x - 0.01, x + 0.01]}),
    Case(check="sampler_drift", limit="growth", at=lambda x: {"rollout/logprob_gap": [0.1, 0.1 * x, 0.1 * x]}),
    Case(check="sampler_drift", limit="first", found="below", at=lambda x: {"rollout/logprob_gap": [x, 9.0, 9.0]}),
    Case(check="sampler_drift", values=(2, 3), at=lambda x: {"rollout/logprob_gap": [1e-6, 9.0, 9.0][: int(x)]}),
    Case(check="stale_logprobs", limit="error", at=lambda x: {"ppo/first_ratio_error": [x]}),
    Case(check="stale_logprobs", limit="error", exact=False, at=lambda x: {"ppo/first_ratio_error": [9.0, x, 0.0, 0.0]}),
    Case(check="advantages_not_centred", limit="mean", at=lambda x: {"ppo/advantage_mean": [x]}),
    Case(check="advantages_not_centred", limit="mean", exact=False, at=lambda x: {"ppo/advantage_mean": [9.0, -x, 0.0, 0.0]}),
    # what is trained
    Case(check="gradient_zero", values=(1e-12, 0), at=lambda x: {"ppo/grad_norm": [x, 0.0]}),
    Case(check="gradient_zero", values=(1e-12, 0), exact=False, at=lambda x: {"ppo/grad_norm": [1.0, x, 0.0, 0.0]}),
    Case(
        check="gradient_zero", values=(1e-12, 0), settings={"value_warmup_updates": 3},
        at=lambda x: {"ppo/grad_norm": [0.0, 0.0, 0.0, x, 0.0]},
    ),
    Case(
        check="policy_unmoved", limit="kl", found="below",
        at=lambda x: {"objective/kl_k3": [x, 0.0, 0.0, 0.0, 0.0], "ppo/lr": 1e-3},
    ),
    Case(
        check="policy_unmoved", limit="updates", settings={"value_warmup_updates": 2},
        at=lambda x: {"objective/kl_k3": [0.0] * int(x + 2), "ppo/lr": 1e-3},
    ),
    Case(check="policy_unmoved", values=(0, 1e-12), at=lambda x: {"objective/kl_k3": [0.0] * 5, "ppo/lr": x}),
    Case(check="same_as_sft", limit="share", exact=False, at=lambda x: comparison(round(1000 * x), 1000)),
    Case(check="same_as_sft", limit="answers", exact=False, at=lambda x: comparison(int(x), int(x))),
    Case(check="value_untrained", values=(1e-12, 0), at=lambda x: {"ppo/value_grad_norm": [x, 0.0, 0.0]}),
    Case(
        check="value_untrained", values=(1e-12, 0), exact=False,
        at=lambda x: {"ppo/value_grad_norm": [1.0, x, 0.0, 0.0], "ppo/value_lr": 1.0},
    ),
    Case(
        check="value_untrained", values=(1e-12, 0), exact=False,
        at=lambda x: {"ppo/value_lr": [1.0, x, 0.0, 0.0], "ppo/value_grad_norm": 1.0},
    ),
    # what PPO is given
    Case(check="reward_constant", limit="spread", found="below", at=lambda x: {"objective/score_std": [0.0, x]}),
    Case(
        check="reward_constant", limit="spread", found="below", exact=False,
        at=lambda x: {"objective/score_std": [0.0, x, 9.0]},
    ),
    Case(check="reward_scale", limit="mean", settings=ONE_MODEL, at=lambda x: {**SCORES, "objective/raw_score": [-x]}),
    Case(
        check="reward_scale", limit="narrow", found="below", settings=ONE_MODEL,
        at=lambda x: {**SCORES, "objective/score_std": [x]},
    ),
    Case(check="reward_scale", limit="wide", settings=ONE_MODEL, at=lambda x: {**SCORES, "objective/score_std": [x]}),
    Case(
        check="start_differs", limit="spreads", settings={**MANY, "num_eval_prompts": 1e14},
        at=lambda x: {"eval/score": [1 - 2 * x], "objective/raw_score": [1.0], "objective/score_std": [2.0]},
    ),
    Case(
        check="start_differs", limit="errors", settings={"rollout_batch_size": 50, "num_eval_prompts": 50}, exact=False,
        at=lambda x: {"eval/score": [5 * x, 0], "objective/raw_score": [0, 99.0], "objective/score_std": [25.0, 1.0]},
    ),
    Case(
        check="reward_opposes_judge", limit="correlation", found="below", settings=MANY,
        at=lambda x: {"objective/gold_correlation": [x] * 5},
    ),
    Case(
        check="reward_opposes_judge", limit="errors", settings={"rollout_batch_size": 100},
        at=lambda x: {"objective/gold_correlation": [-0.1 - x / math.sqrt(500)] * 5},
    ),
    Case(
        check="reward_opposes_judge", limit="correlation", found="below", settings=MANY, exact=False,
        at=lambda x: {"objective/gold_correlation": [5 * x, 0.0, 0.0, 0.0, 0.0, 9.0]},
    ),
    Case(check="answers_empty", limit="share", exact=False, at=lambda x: answers([""] * round(1000 * x), 1000)),
    Case(check="answers_empty", limit="answers", exact=False, at=lambda x: answers([" "] * int(x), int(x))),
    Case(check="answers_alike", limit="share", exact=False, at=lambda x: answers(["yes"] * round(1000 * x), 1000)),
    Case(check="answers_alike", limit="answers", exact=False, at=lambda x: answers(["yes"] * int(x), int(x))),
    Case(check="cut_off", limit="stopped", found="below", at=lambda x: {"response/stop_rate": [x] * 3}),
    Case(check="cut_off", limit="stopped", found="below", exact=False, at=lambda x: {"response/stop_rate": [0, 0, 3 * x, 9.0]}),
    Case(
        check="length_rewarded", limit="correlation",
        at=lambda x: {LENGTH_CORRELATION: [0.0] * 3 + [-x] * 3, LENGTH: 20.0},
    ),
    Case(
        check="length_rewarded", limit="rise",
        at=lambda x: {LENGTH_CORRELATION: [0.5] * 3 + [0.5 + x] * 3, LENGTH: 20.0},
    ),
    Case(
        check="length_rewarded", limit="length_change",
        at=lambda x: {LENGTH_CORRELATION: 0.9, LENGTH: [20.0] * 3 + [20 * (1 + x)] * 3},
    ),
    Case(
        check="length_rewarded", limit="length_change",
        at=lambda x: {LENGTH_CORRELATION: -0.9, LENGTH: [20.0] * 3 + [20 * (1 - x)] * 3},
    ),
    # how it is set
    Case(
        check="no_kl_penalty", limit="response",
        at=lambda x: {"objective/kl_coef": 0.0, "objective/kl_k3": [x] * 3, LENGTH: 1e6},
    ),
    Case(
        check="no_kl_penalty", limit="token", exact=False,
        at=lambda x: {"objective/kl_coef": 0.0, "objective/kl_k3": [9.0, 0, 0, 30 * x], LENGTH: [1e6, 0.0, 0.0, 30.0]},
    ),
    Case(
        check="no_kl_penalty", values=(1e-12, 0),
        at=lambda x: {"objective/kl_coef": [x, 0.0, 0.0], "objective/kl_k3": 9.0, LENGTH: 10.0},
    ),
    Case(check="steps_too_large", limit="burst_kl", at=lambda x: {**STEPS, "ppo/approx_kl": [x]}),
    Case(check="steps_too_large", limit="burst_clipped", at=lambda x: {**STEPS, "ppo/clipfrac": [x]}),
    Case(check="steps_too_large", limit="kl", at=lambda x: {**STEPS, "ppo/approx_kl": [x, x, 0.0]}),
    Case(check="steps_too_large", limit="clipped", at=lambda x: {**STEPS, "ppo/clipfrac": [x, x, 0.0]}),
    Case(check="steps_too_large", limit="ratio", at=lambda x: {**STEPS, "ppo/ratio_max": [x, x, 1.0]}),
    Case(check="steps_too_large", limit="kl", exact=False, at=lambda x: {**STEPS, "ppo/approx_kl": [9.0, x, x, 0.0]}),
    Case(check="kl_jump", limit="margin", at=lambda x: {"objective/kl_k3": [0.0, x]}),
    Case(check="kl_jump", limit="factor", at=lambda x: {"objective/kl_k3": [1e6, 1e6 * x]}),
    Case(check="kl_jump", limit="factor", exact=False, at=lambda x: {"objective/kl_k3": [1e9, 1e6, 0, 0, 0, 0, 1e6 * x]}),
    Case(
        check="negative_kl", limit="kl", found="below",
        at=lambda x: {"objective/kl": [x] * 5, "objective/kl_full": 0.0},
    ),
    Case(
        check="negative_kl", limit="errors", exact=False,
        at=lambda x: {
            "objective/kl": [9.0, 0, 0, 0, 0, -5 * x * math.sqrt(2 * 0.5 / 5)],
            "objective/kl_full": [9.0, 0, 0, 0, 0, 2.5],
        },
    ),
    Case(
        check="controller_saturated", limit="factor", settings={"kl_target": 6.0},
        at=lambda x: {"objective/kl": [6 * x] * 10, "objective/kl_coef": 0.1},
    ),
    Case(
        check="controller_saturated", values=(5.9, 6.1), settings={"kl_target": 6.0}, exact=False,
        at=lambda x: {"objective/kl": [0.0, 0.0, x, *[99.0] * 8], "objective/kl_coef": 0.1},
    ),
    # what the reward pays for
    Case(check="over_optimised", limit="errors", at=falling_judge),
    Case(
        check="over_optimised", values=(11, 12),
        at=lambda x: {
            "objective/gold": [-float(i) for i in range(int(x))],
            "objective/raw_score": [float(i) for i in range(int(x))],
            "objective/score_std": 1.0,
        },
    ),
    Case(check="over_optimised", limit="updates", exact=False, at=lambda x: stalled_judge(9.0, int(x))),
    Case(check="over_optimised", values=(0.99, 1.01), at=stalled_judge),
    Case(
        check="over_optimised", limit="errors",
        at=lambda x: stalled_judge(x * 2 * math.sqrt(1 - 1 / 196) / math.sqrt(2 * WIDTH) * 0.9999, spread=0.0, noise=1.0),
    ),
    Case(
        check="reward_ignores_judge", limit="correlation", found="below", settings=MANY,
        at=lambda x: {"objective/gold_correlation": [-x] * 10},
    ),
    Case(
        check="reward_ignores_judge", limit="correlation", found="below", settings=MANY, exact=False,
        at=lambda x: {"objective/gold_correlation": [*[0.0] * 9, 10 * x, 9.0]},
    ),
    Case(
        check="reward_ignores_judge", limit="precision", found="below",
        at=lambda x: {"objective/gold_correlation": [0.0] * 10, "episodes": [i * (3 / x) ** 2 / 10 for i in range(1, 11)]},
    ),
    # what comes of it
    change("stop_rate_falling", "fall", "response/stop_rate", lambda x: 0.9 - x, 0.9),
    change("entropy_collapse", "share", "objective/entropy", lambda x: 4 * x, 4.0, "below"),
    change("responses_alike", "share", "response/distinct_2", lambda x: 0.9 * x, 0.9, "below"),
    change("repeated_text", "rise", "response/repetition", lambda x: 0.1 + x, 0.1),
    change("length_up", "factor", LENGTH, lambda x: 20 * x, 20.0),
    change("length_up", "tokens", LENGTH, lambda x: 1 + x, 1.0),
    change("length_down", "share", LENGTH, lambda x: 20 * x, 20.0, "below"),
    change("reward_saturated", "share", "objective/score_std", lambda x: x, 1.0, "below"),
    change("advantages_vanished", "share", "ppo/advantage_std", lambda x: x, 1.0, "below"),
    Case(check="kl_high", limit="token", at=lambda x: {"objective/kl_k3": [10 * x] * 3, LENGTH: 10.0}),
    Case(check="kl_high", limit="response", at=lambda x: {"objective/kl_k3": [x] * 3, LENGTH: 0.1}),
    Case(
        check="kl_high", limit="token", exact=False,
        at=lambda x: {"objective/kl_k3": [9e9, 0, 0, 30 * x], LENGTH: [1.0, 0, 0, 30.0]},
    ),
    Case(
        check="value_dead", limit="share", found="below",
        at=lambda x: {"ppo/value_std": [9.0] * 5 + [0, 0, 3 * x], "ppo/advantage_std": [9e9] * 5 + [0, 0, 3.0]},
    ),
    Case(
        check="value_useless", limit="variance", found="below",
        at=lambda x: {"ppo/explained_variance": [-1e-6] * 5 + [x, -1.0, -1.0, -1.0, -1.0]},
    ),
    Case(
        check="value_useless", limit="recovery", exact=False,
        at=lambda x: {"ppo/explained_variance": [-9e9, -5.0, -1e-9, 0, 0, 0, *[-x] * 5]},
    ),
    Case(
        check="value_useless", values=(12, 13), settings={"value_warmup_updates": 3},
        at=lambda x: {"ppo/explained_variance": [-1.0] * int(x)},
    ),
    Case(
        check="reward_falling", limit="spreads",
        at=lambda x: {
            "objective/score": [0, 0, 0, 9.0, 9.0, 0, 0, 0, 0, -5 * x],
            "objective/score_std": [0, 0, 3.0] + [9.0] * 7,
        },
    ),
    Case(
        check="reward_falling", limit="errors", exact=False,  # scores of noise 1 around their line, sqrt(20 / 18) by its fit
        at=lambda x: {
            "objective/score": [(1, -1, -1, 1)[i % 4] - x * math.sqrt(20 / 18) / math.sqrt(665) * i for i in range(20)],
            "objective/score_std": 15.0,
        },
    ),
    Case(
        check="reward_falling", limit="slow", exact=False,
        at=lambda x: {"objective/score": [-2 * x * i / 19 for i in range(20)], "objective/score_std": 2.0},
    ),
    Case(
        check="reward_falling", limit="updates", exact=False,
        at=lambda x: {"objective/score": [-0.5 * i / (x - 1) for i in range(int(x))], "objective/score_std": 1.0},
    ),
    Case(
        check="reward_falling", limit="least",
        at=lambda x: {"objective/score": [0.0] * 5 + [-x] * 5, "objective/score_std": 0.0},
    ),
    *outlier("ppo", "gradient_spike"),
    Case(
        check="slowing_down", values=(17, 18),
        at=lambda x: {"time/rollout": [1.0] * 9 + [9.0] * (int(x) - 9), "time/score": 0, "time/optimise": 0, LENGTH: 1.0},
    ),
    Case(
        check="slowing_down", limit="factor",
        at=lambda x: {
            "time/rollout": [0, *[1.0] * 5, *[0.0] * 4, *[0.0] * 3, *[x] * 5],
            "time/score": [0, *[0.0] * 5, *[1e9] * 7, *[0.0] * 5],
            "time/optimise": 0.0,
            LENGTH: 1.0,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.check}-{case.limit}")
def test_a_check_acts_at_its_limit(case: Case) -> None:
    """Catches: a limit that is loosened or tightened on its way to the comparison, and another number of rows."""
    check = BY_NAME[case.check]
    inside, outside = case.around()
    assert check(case.history(inside)) is None, f"{inside} is inside"
    assert check(case.history(outside)), f"{outside} is outside"
    if case.exact:
        assert check(case.history(outside, skip=1)) is None, f"{check.rows} rows are needed"


def test_every_limit_has_a_case() -> None:
    """Catches: a check that was added without its limits being tested, and one whose limits the docs do not show."""
    for check in CHECKS:
        cases = [case for case in CASES if case.check == check.name]
        assert cases, f"{check.name} has no case just inside and just outside"
        assert {case.limit for case in cases} - {""} == check.limits.keys(), check.name
        for name in check.limits:
            assert f"{{{name}:" in str(check.look.__doc__) or f"{{{name}}}" in str(check.look.__doc__), (
                check.name,
                name,
            )
