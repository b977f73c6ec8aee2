"""The result of a preflight check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.base import distributed
from rlhf.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One property of a run that was looked at before it starts."""

    name: str
    """A few words, the same in every run."""
    passed: bool
    measured: str
    """Measured value with its unit, and the limit where there is one."""
    cause: str
    """Usual reason for a failure."""
    fix: str
    """Remedy for a failure."""

    def __str__(self) -> str:
        """One line; a failed check adds cause and fix."""
        line = f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.measured}"
        return line if self.passed else f"{line}. Cause: {self.cause}. Fix: {self.fix}"


def require_all(checks: Sequence[Check], title: str) -> None:
    """Print a line for each check, in the first of several processes.

    Args:
        title: word before each line.

    Raises:
        UserError: checks failed; it lists them, each with what was measured and what to do.
    """
    for check in checks if distributed.rank() == 0 else ():
        print(f"{title} {check}", flush=True)
    failed = [check for check in checks if not check.passed]
    if failed:
        failures = "; ".join(f"{check.name} ({check.measured}; {check.fix})" for check in failed)
        raise UserError(f"{title} failed, {len(failed)} of {len(checks)} checks: {failures}")
