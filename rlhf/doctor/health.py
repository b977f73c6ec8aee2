"""The health checks of all stages, and what they find in what a stage has logged.

A check looks at a `History` as it was after its newest update. `CHECKS` lists all of them, causes before symptoms: the first
finding of a run is its diagnosis, later ones may be its consequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.doctor import ppo_checks, supervised_checks
from rlhf.doctor.check import Check
from rlhf.doctor.history import History
from rlhf.errors import UserError, did_you_mean

Action = Literal["off", "warn", "stop", "roll_back"]
ACTIONS: tuple[Action, ...] = ("off", "warn", "stop", "roll_back")
"""What to do about a finding, in order of force."""

REPLAYED_UPDATES = 400
"""Histories longer than this are replayed at this many of their updates."""

CHECKS: tuple[Check, ...] = (
    # SFT, reward model; the first two: all stages
    supervised_checks.not_finite,
    supervised_checks.learning_rate_zero,
    supervised_checks.no_gradient,
    supervised_checks.loss_rising,
    supervised_checks.accuracy_below_chance,
    supervised_checks.accuracy_at_chance,
    supervised_checks.loss_flat,
    supervised_checks.batch_spike,
    # PPO: what is computed
    ppo_checks.wrong_reference,
    ppo_checks.template_twice,
    ppo_checks.pad_is_stop,
    ppo_checks.padding_counted,
    ppo_checks.sampler_mismatch,
    ppo_checks.sampler_drift,
    ppo_checks.stale_logprobs,
    ppo_checks.advantages_not_centred,
    # what is trained
    ppo_checks.gradient_zero,
    ppo_checks.policy_unmoved,
    ppo_checks.same_as_sft,
    ppo_checks.value_untrained,
    # what PPO is given
    ppo_checks.reward_constant,
    ppo_checks.reward_scale,
    ppo_checks.reward_opposes_judge,
    ppo_checks.cut_off,
    # how it is set
    ppo_checks.steps_too_large,
    ppo_checks.kl_jump,
    ppo_checks.negative_kl,
    ppo_checks.no_kl_penalty,
    ppo_checks.controller_saturated,
    # what the reward pays for
    ppo_checks.over_optimised,
    ppo_checks.length_rewarded,
    ppo_checks.reward_ignores_judge,
    # what comes of it
    ppo_checks.stop_rate_falling,
    ppo_checks.entropy_collapse,
    ppo_checks.responses_alike,
    ppo_checks.repeated_text,
    ppo_checks.length_up,
    ppo_checks.length_down,
    ppo_checks.kl_high,
    ppo_checks.reward_saturated,
    ppo_checks.advantages_vanished,
    ppo_checks.value_dead,
    ppo_checks.value_useless,
    ppo_checks.reward_falling,
    ppo_checks.gradient_spike,
    ppo_checks.slowing_down,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check that found something."""

    check: Check
    evidence: str
    first: int
    """Update after which it was first found."""
    last: int
    """Update after which it was last found."""

    def __str__(self) -> str:
        return f"{self.check.name}: {self.evidence}. Cause: {self.check.cause}. To do: {self.check.action}"


def find(history: History) -> list[Finding]:
    """What is wrong after the history's newest update, causes before symptoms."""
    return [
        Finding(check=check, evidence=evidence, first=history.step, last=history.step)
        for check in CHECKS
        if (evidence := check(history)) is not None
    ]


def replay(history: History) -> list[Finding]:
    """All that was wrong at any time, as it would have been found live; the evidence is the latest."""
    steps = history.steps
    stride = -(-len(steps) // REPLAYED_UPDATES) if steps else 1
    found: dict[str, Finding] = {}
    for step in sorted({*steps[::stride], *steps[-1:]}):
        for new in find(history.until(step)):
            first = found[new.check.name].first if new.check.name in found else step
            found[new.check.name] = Finding(check=new.check, evidence=new.evidence, first=first, last=step)
    return [found[check.name] for check in CHECKS if check.name in found]


def actions(orders: Sequence[str]) -> dict[Check, Action]:
    """What to do about each check, by the option `doctor`: one action for critical findings, others as check=action.

    Raises:
        UserError: no such check or action, or not one action for all.
    """
    general = [word for word in orders if "=" not in word]
    single = dict(word.split("=", 1) for word in orders if "=" in word)
    names = [check.name for check in CHECKS]
    for name in single:
        if name not in names:
            raise UserError(f"doctor: no check '{name}'{did_you_mean(name, names)}")
    if len(general) != 1:
        raise UserError(f"doctor needs one action for all ({', '.join(ACTIONS)}), got {', '.join(general) or 'none'}")
    chosen: dict[Check, Action] = {}
    for check in CHECKS:
        action = _action(single.get(check.name, general[0]))
        milder = check.severity == "warning" and check.name not in single and action != "off"
        chosen[check] = "warn" if milder else action
    return chosen


def _action(word: str) -> Action:
    for action in ACTIONS:
        if word == action:
            return action
    raise UserError(f"doctor: '{word}' must be one of {', '.join(ACTIONS)}{did_you_mean(word, ACTIONS)}")
