"""Limits of the review: a quantity, its ordinary range, and the ranges beyond which a run is nearly certainly wrong.

A limit is data. `rlhf/doctor/review/tables.py` makes the tables of docs/doctor.md from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.doctor.review.facts import Facts
from rlhf.doctor.statements import Statement

Severity = Literal["critical", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One end of a range: from where on a quantity is worth a note, a warning, and critical, and why."""

    note: float
    warning: float | None = None
    critical: float | None = None
    cause: str
    action: str
    explains: tuple[str, ...] = ()

    def severity(self, value: float, sign: int) -> Severity | None:
        """Return the severity of a value beyond this end; `sign` is 1 for the upper end, -1 for the lower."""
        if not sign * value > sign * self.note:
            return None
        levels: tuple[tuple[Severity, float | None], ...] = (("critical", self.critical), ("warning", self.warning))
        return next((name for name, edge in levels if edge is not None and sign * value > sign * edge), "note")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A quantity of a run's options or data, and its ordinary range."""

    name: str
    what: str
    """The quantity, with its unit."""
    measure: Callable[[Facts], float | None]
    """Return the quantity; None where it does not apply or is unknown."""
    options: tuple[str, ...] = ()
    """Options that decide it."""
    stages: tuple[str, ...] = ("ppo",)
    low: Side | None = None
    high: Side | None = None
    percent: bool = False
    extra: Callable[[Facts, float], str] | None = None
    """Return words that follow the value, from the facts and the value."""
    source: str = "-"

    def judge(self, facts: Facts) -> Statement | None:
        """Return the statement on a run; None where the quantity does not apply."""
        value = self.measure(facts) if facts.stage in self.stages else None
        if value is None:
            return None
        sides = ((self.low, -1), (self.high, 1))
        side, severity = next(
            ((side, level) for side, sign in sides if side and (level := side.severity(value, sign))), (None, None)
        )
        options = ", ".join(f"{name} {_shown(facts.option(name))}" for name in self.options)
        detail = facts.details.get(self.name, "")
        extra = self.extra(facts, value) if self.extra else ""
        measured = f"{self.what}: {self.number(value)} (ordinary: {self.ordinary})"
        return Statement(
            part="review",
            name=self.name,
            passed=side is None,
            measured="; ".join(filter(None, (measured, extra, options, detail))),
            severity=severity or "note",
            cause=side.cause if side else "",
            action=side.action if side else "",
            explains=list(side.explains) if side else [],
            source=self.source,
        )

    def number(self, value: float) -> str:
        """Return a value as text, with its unit."""
        return f"{100 * value:.3g}%" if self.percent else f"{value:.3g}"

    @property
    def ordinary(self) -> str:
        """The range without a note."""
        low, high = (self.number(side.note) if side else None for side in (self.low, self.high))
        if low is not None and high is not None:
            return f"{low} to {high}"
        return f"at least {low}" if high is None else f"at most {high}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def judge(limits: Sequence[Limit], facts: Facts) -> list[Statement]:
    """Return the statements of all limits that apply to a run."""
    return [statement for limit in limits if (statement := limit.judge(facts)) is not None]


def markdown_rows(limits: Sequence[Limit]) -> list[str]:
    """Return a table row for each limit: name, stages, quantity, ranges, meaning and source."""
    return [f"| {' | '.join(_cells(limit))} |" for limit in limits]


def _cells(limit: Limit) -> list[str]:
    sides = [(side, word) for side, word in ((limit.low, "below"), (limit.high, "above")) if side]
    findings = [
        f"{level} {word} {limit.number(edge)}"
        for side, word in sides
        for level, edge in (("warning", side.warning), ("critical", side.critical))
        if edge is not None
    ]
    causes = "; ".join(f"{word}: {side.cause}" for side, word in sides)
    return [
        f"`{limit.name}`",
        ", ".join(limit.stages),
        limit.what,
        limit.ordinary,
        ", ".join(findings) or "-",
        causes,
        limit.source,
    ]
