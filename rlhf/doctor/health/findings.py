"""The registry of health checks, and what they find in a stage's history.

The first finding of a run is its diagnosis; later ones may be its consequences. So `CHECKS` is in order of causation: by
module as listed in `MODULES`, and within a module by the order of its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

from rlhf.base.errors import UserError, did_you_mean
from rlhf.doctor.finding import Finding, either
from rlhf.doctor.health import ppo_computation, ppo_learning, ppo_outcome, ppo_reward, ppo_settings, supervised
from rlhf.doctor.health.check import HealthCheck, registered
from rlhf.doctor.health.history import History
from rlhf.doctor.statements import NAMES, Statement

Action = Literal["off", "warn", "stop", "roll_back"]
#: Reactions to a finding, in order of force.
ACTIONS: tuple[Action, ...] = ("off", "warn", "stop", "roll_back")
#: Histories longer than this are replayed at this many of their updates.
REPLAYED_UPDATES = 400
#: Modules of checks, causes before symptoms.
MODULES = (supervised, ppo_computation, ppo_learning, ppo_reward, ppo_settings, ppo_outcome)
#: All health checks, causes before symptoms.
CHECKS: tuple[HealthCheck, ...] = tuple(check for module in MODULES for check in registered(module.__name__))


def find(history: History, checks: Sequence[HealthCheck] = CHECKS, passed: Collection[str] = ()) -> list[Finding]:
    """Return the symptoms after the history's newest update, causes before consequences.

    Args:
        passed: statements that passed, as `part:name`; they exclude causes.
    """
    return [
        _finding(check, evidence, history.step, passed) for check in checks if (evidence := check(history)) is not None
    ]


def replay(history: History, checks: Sequence[HealthCheck] = CHECKS, passed: Collection[str] = ()) -> list[Finding]:
    """Return the symptoms of the whole history as they would have come live, each with its latest evidence."""
    steps = history.steps
    stride = -(-len(steps) // REPLAYED_UPDATES) if steps else 1
    findings: dict[str, Finding] = {}
    for step in sorted({*steps[::stride], *steps[-1:]}):
        for new in find(history.until(step), checks, passed):
            first = findings.get(new.name, new).first
            findings[new.name] = dataclasses.replace(new, first=first)
    return [findings[check.name] for check in checks if check.name in findings]


def _finding(check: HealthCheck, evidence: str, step: int, passed: Collection[str]) -> Finding:
    witnesses = {cause: [name for name in names if name in passed] for cause, names in check.causes.items()}
    return Finding(
        kind="symptom",
        name=check.name,
        severity=check.severity,
        evidence=evidence,
        shows=check.shows,
        causes=tuple(cause for cause, names in witnesses.items() if not names),
        excluded=tuple(f"{cause} ({', '.join(names)})" for cause, names in witnesses.items() if names),
        action=check.action,
        source=check.source,
        first=step,
        last=step,
        explains=check.explains,
    )


def actions(orders: Sequence[str]) -> dict[str, Action]:
    """Return the reaction to each check from the option `doctor`, and to each statement that it names.

    The option is one word for critical findings; others follow as name=action, the name of a check, or of what the review
    and the audit look at.

    Raises:
        UserError: no such name or action, or not exactly one action for all.
    """
    general, single = _split(orders)
    names = [*(check.name for check in CHECKS), *NAMES]
    for name in single:
        if name not in names:
            raise UserError(f"doctor: no check '{name}'{did_you_mean(name, names)}")
    if len(general) != 1:
        raise UserError(f"doctor needs one action for all ({', '.join(ACTIONS)}), got {', '.join(general) or 'none'}")
    named = {name: _action(word) for name, word in single.items()}
    return {check.name: reaction(orders, check) for check in CHECKS} | named


def reaction(orders: Sequence[str], finding: HealthCheck | Statement) -> Action:
    """Return the reaction to a check or a failed statement: its own, or that for all; a warning only warns then."""
    general, single = _split(orders)
    action = _action(single.get(finding.name, general[0]))
    milder = finding.severity != "critical" and finding.name not in single and action != "off"
    return "warn" if milder else action


def _split(orders: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words for all findings, and those for single ones by name."""
    return [word for word in orders if "=" not in word], dict(word.split("=", 1) for word in orders if "=" in word)


def _action(word: str) -> Action:
    for action in ACTIONS:
        if word == action:
            return action
    raise UserError(f"doctor: '{word}' must be one of {', '.join(ACTIONS)}{did_you_mean(word, ACTIONS)}")


def markdown_rows() -> list[str]:
    """Return the table of docs/health.md, a line for each check."""
    rows = []
    for c in CHECKS:
        severity = f"{c.severity}, kl_coef" if c.remedy == "kl_coef" else c.severity
        data = c.data or ", ".join(f"`{name}`" for name in c.needs)
        rows.append([f"`{c.name}`", ", ".join(c.stages), severity, data, c.finds, _causes(c), c.action, c.source])
    return [f"| {' | '.join(row)} |" for row in rows]


def _causes(check: HealthCheck) -> str:
    texts = [text + (f" (not if {' or '.join(names)})" if names else "") for text, names in check.causes.items()]
    return f"{check.shows}: {either(texts)}" if texts else check.shows


if __name__ == "__main__":  # writes the table of the docs again
    print("\n".join(markdown_rows()))
