"""Statements about quantities of an audit, made of what was recorded and what a plain implementation expects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.doctor.statements import Statement


class NotExamined(Exception):
    """A quantity cannot be recomputed here; the text is why."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One thing of the computation that is recomputed."""

    name: str
    cause: str
    """Why it differs, a sentence without a full stop."""
    action: str
    explains: tuple[str, ...] = ()
    """Health checks whose findings are consequences of it."""
    source: str = "-"

    def differs(self, measured: str, step: int, detail: str = "") -> Statement:
        """Return the statement of a quantity that is wrong."""
        cause = f"{self.cause}; {detail}" if detail else self.cause
        return Statement(
            part="audit", name=self.name, passed=False, measured=measured, cause=cause, action=self.action,
            explains=list(self.explains), source=self.source, step=step,
        )  # fmt: skip

    def agrees(self, measured: str, step: int) -> Statement:
        """Return the statement of a quantity that is right, or that is not examined."""
        return Statement(part="audit", name=self.name, passed=True, measured=measured, source=self.source, step=step)

    def compared(
        self,
        recorded: Tensor,
        expected: Tensor,
        *,
        limit: float,
        step: int,
        what: str = "",
        unit: str = "",
        detail: str = "",
    ) -> Statement:
        """Compare numbers: their root mean square difference is at most `limit`, and no single one's is above ten times that."""
        recorded, expected = recorded.detach().double().cpu().flatten(), expected.detach().double().cpu().flatten()
        if recorded.shape != expected.shape:
            return self.differs(f"{len(recorded)} numbers recorded, {len(expected)} expected", step, detail)
        if not len(recorded):
            return self.agrees("not examined: there are none", step)
        difference = (recorded - expected).abs()
        rms, largest = float(difference.square().mean().sqrt()), float(difference.max())
        measured = f"{what or f'{len(recorded)} numbers'}: differ by {rms:.2g}{unit} (limit {limit:.2g}), at most {largest:.2g}"
        passed = math.isfinite(rms) and rms <= limit and largest <= 10 * limit
        return self.agrees(measured, step) if passed else self.differs(measured, step, detail)


def rms(x: Tensor) -> float:
    """Return the root mean square of a tensor; 0 if it is empty."""
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def chain(statements: Iterable[Statement]) -> list[Statement]:
    """Return the statements of one sheet, in causal order: what differs after the first that does is only a note."""
    result: list[Statement] = []
    first = ""
    for statement in statements:
        if not statement.passed and first:
            cause = f"it may come of {first}, which differs before it"
            statement = replace(statement, severity="note", cause=cause)
        elif not statement.passed:
            first = statement.name
        result.append(statement)
    if first:  # what follows is a consequence
        later = [s.name for s in result if not s.passed and s.name != first]
        result = [replace(s, explains=[*s.explains, *later]) if s.name == first else s for s in result]
    return result


def as_tensor(rows: Sequence[float]) -> Tensor:
    """Return numbers as float64."""
    return torch.tensor(list(rows), dtype=torch.float64)
