"""The health checks of all stages, and what they find in what a stage has logged.

A check looks at a `History` as it was after its newest update. `CHECKS` lists all of them, causes before symptoms: the first
finding of a run is its diagnosis, later ones may be its consequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.base.errors import UserError, did_you_mean
from rlhf.doctor.health import ppo_computation, ppo_learning, ppo_outcome, ppo_reward, ppo_settings, supervised
from rlhf.doctor.health.check import HealthCheck
from rlhf.doctor.health.history import History

Action = Literal["off", "warn", "stop", "roll_back"]
ACTIONS: tuple[Action, ...] = ("off", "warn", "stop", "roll_back")
"""What to do about a finding, in order of force."""

REPLAYED_UPDATES = 400
"""Histories longer than this are replayed at this many of their updates."""

CHECKS: tuple[HealthCheck, ...] = (
    # SFT, reward model; the first two: all stages
    supervised.not_finite,
    supervised.learning_rate_zero,
    supervised.no_gradient,
    supervised.loss_rising,
    supervised.accuracy_below_chance,
    supervised.accuracy_at_chance,
    supervised.loss_flat,
    supervised.batch_spike,
    # PPO: what is computed
    ppo_computation.wrong_reference,
    ppo_computation.template_twice,
    ppo_computation.pad_is_stop,
    ppo_computation.padding_counted,
    ppo_computation.sampler_mismatch,
    ppo_computation.sampler_drift,
    ppo_computation.stale_logprobs,
    ppo_computation.advantages_not_centred,
    # what is trained
    ppo_computation.gradient_zero,
    ppo_computation.policy_unmoved,
    ppo_computation.same_as_sft,
    ppo_learning.value_untrained,
    # what PPO is given
    ppo_reward.reward_constant,
    ppo_reward.reward_scale,
    ppo_reward.reward_opposes_judge,
    ppo_outcome.cut_off,
    ppo_reward.length_rewarded,
    # how it is set
    ppo_settings.no_kl_penalty,
    ppo_learning.steps_too_large,
    ppo_settings.kl_jump,
    ppo_settings.negative_kl,
    ppo_settings.controller_saturated,
    # what the reward pays for
    ppo_reward.over_optimised,
    ppo_reward.reward_ignores_judge,
    # what comes of it
    ppo_outcome.stop_rate_falling,
    ppo_outcome.entropy_collapse,
    ppo_outcome.responses_alike,
    ppo_outcome.repeated_text,
    ppo_outcome.length_up,
    ppo_outcome.length_down,
    ppo_settings.kl_high,
    ppo_reward.reward_saturated,
    ppo_learning.advantages_vanished,
    ppo_learning.value_dead,
    ppo_learning.value_useless,
    ppo_reward.reward_falling,
    ppo_learning.gradient_spike,
    ppo_learning.slowing_down,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check that found something."""

    check: HealthCheck
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


def actions(orders: Sequence[str]) -> dict[HealthCheck, Action]:
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
    chosen: dict[HealthCheck, Action] = {}
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
