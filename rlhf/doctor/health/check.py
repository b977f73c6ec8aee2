"""What a health check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf.doctor.health.history import History

Severity = Literal["critical", "warning"]
Remedy = Literal["learning_rate", "kl_coef"]


@dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """One thing that can be wrong."""

    name: str
    stages: tuple[str, ...]
    severity: Severity
    """critical: going on wastes time, or ruins the policy. warning: look at it."""
    cause: str
    action: str
    remedy: Remedy
    """What a roll-back changes: half the learning_rate, or twice the kl_coef."""
    needs: tuple[str, ...]
    """Figures without which it says nothing."""
    rows: int
    """How many values of each it needs at least."""
    look: Callable[[History], str | None]

    def __call__(self, history: History) -> str | None:
        """The evidence, with figures, after the history's newest update; None if all is well, or too little is known."""
        if history.stage not in self.stages or any(history.count(name) < self.rows for name in self.needs):
            return None
        return self.look(history)


def check(
    *stages: str,
    severity: Severity,
    cause: str,
    action: str,
    needs: tuple[str, ...] = (),
    rows: int = 1,
    remedy: Remedy = "learning_rate",
) -> Callable[[Callable[[History], str | None]], HealthCheck]:
    """Makes a check of the function that looks for its evidence."""

    def make(look: Callable[[History], str | None]) -> HealthCheck:
        return HealthCheck(
            name=look.__name__,
            stages=stages,
            severity=severity,
            cause=cause,
            action=action,
            remedy=remedy,
            needs=needs,
            rows=rows,
            look=look,
        )

    return make
