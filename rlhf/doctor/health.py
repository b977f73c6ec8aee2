"""The health checks of all stages, and what they find in what a stage has logged.

A check looks at a `History` as it was after its newest update. `CHECKS` lists all of them, causes before symptoms: the first
finding of a run is its diagnosis, later ones may be its consequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.doctor import health_ppo, health_supervised
from rlhf.doctor.health_check import HealthCheck
from rlhf.doctor.history import History
from rlhf.errors import UserError, did_you_mean

Action = Literal["off", "warn", "stop", "roll_back"]
ACTIONS: tuple[Action, ...] = ("off", "warn", "stop", "roll_back")
"""What to do about a finding, in order of force."""

REPLAYED_UPDATES = 400
"""Histories longer than this are replayed at this many of their updates."""

CHECKS: tuple[HealthCheck, ...] = (
    # SFT, reward model; the first two: all stages
    health_supervised.not_finite,
    health_supervised.learning_rate_zero,
    health_supervised.no_gradient,
    health_supervised.loss_rising,
    health_supervised.accuracy_below_chance,
    health_supervised.accuracy_at_chance,
    health_supervised.loss_flat,
    health_supervised.batch_spike,
    # PPO: what is computed
    health_ppo.wrong_reference,
    health_ppo.template_twice,
    health_ppo.pad_is_stop,
    health_ppo.padding_counted,
    health_ppo.sampler_mismatch,
    health_ppo.sampler_drift,
    health_ppo.stale_logprobs,
    health_ppo.advantages_not_centred,
    # what is trained
    health_ppo.gradient_zero,
    health_ppo.policy_unmoved,
    health_ppo.same_as_sft,
    health_ppo.value_untrained,
    # what PPO is given
    health_ppo.reward_constant,
    health_ppo.reward_scale,
    health_ppo.reward_opposes_judge,
    health_ppo.cut_off,
    health_ppo.length_rewarded,
    # how it is set
    health_ppo.no_kl_penalty,
    health_ppo.steps_too_large,
    health_ppo.kl_jump,
    health_ppo.negative_kl,
    health_ppo.controller_saturated,
    # what the reward pays for
    health_ppo.over_optimised,
    health_ppo.reward_ignores_judge,
    # what comes of it
    health_ppo.stop_rate_falling,
    health_ppo.entropy_collapse,
    health_ppo.responses_alike,
    health_ppo.repeated_text,
    health_ppo.length_up,
    health_ppo.length_down,
    health_ppo.kl_high,
    health_ppo.reward_saturated,
    health_ppo.advantages_vanished,
    health_ppo.value_dead,
    health_ppo.value_useless,
    health_ppo.reward_falling,
    health_ppo.gradient_spike,
    health_ppo.slowing_down,
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
