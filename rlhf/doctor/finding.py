"""The finding, which is what every part of the doctor holds against a run.

It comes from a failed statement, whose cause is confirmed, or from a health check, which sees a symptom and knows only what
may be behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.doctor.statements import Statement

Kind = Literal["audit", "review", "investigation", "symptom"]
#: What the failure of a statement establishes, by its part.
CONFIRMED = {"audit": "computation", "review": "input", "investigation": "experiment"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong with a run."""

    kind: Kind
    name: str
    """Name of the statement or of the health check."""
    severity: Literal["critical", "warning"]
    evidence: str
    """What was measured."""
    shows: str = ""
    """Meaning of a symptom, without its cause."""
    causes: tuple[str, ...] = ()
    """What may be behind it, the likeliest first; of a failed statement, what is."""
    excluded: tuple[str, ...] = ()
    """Causes that statements exclude, each with their names."""
    action: str
    source: str = "-"
    first: int
    """First update at which it was seen."""
    last: int
    """Last update at which it was seen."""
    explains: tuple[str, ...] = ()
    """Names of findings that are its consequences."""
    explained_by: str = ""
    """Name of the finding that it is a consequence of."""

    @property
    def updates(self) -> str:
        """First and last update, as text."""
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def label(self) -> str:
        """Name, severity and, where its cause is confirmed, by what."""
        confirmed = f", {CONFIRMED[self.kind]}" if self.kind in CONFIRMED else ""
        return f"{self.name} ({self.severity}{confirmed})"

    @property
    def cause(self) -> str:
        """Its meaning and possible causes as one text; certain only where a statement failed."""
        if self.kind != "symptom":
            return self.causes[0]
        behind = f"; behind it may be {either(self.causes)}" if self.causes else ""
        if self.excluded and not self.causes:
            behind = "; its usual causes are excluded"
        return self.shows + behind + (f". Excluded: {'; '.join(self.excluded)}" if self.excluded else "")

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. Cause: {self.cause}. To do: {self.action}"

    def as_json(self) -> dict[str, Any]:
        """Return its fields and its cause as one text."""
        return {**dataclasses.asdict(self), "cause": self.cause}


def of_statement(statement: Statement) -> Finding:
    """Return the finding that a failed statement is."""
    assert statement.severity != "note"
    return Finding(
        kind=statement.part,
        name=statement.name,
        severity=statement.severity,
        evidence=statement.measured,
        causes=(statement.cause,),
        action=statement.action,
        source=statement.source,
        first=statement.step,
        last=statement.step,
        explains=tuple(statement.explains),
    )


def either(texts: Sequence[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))
