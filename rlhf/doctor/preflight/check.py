"""What a check of the doctor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.base import distributed
from rlhf.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """A few words, the same in every run."""
    passed: bool
    measured: str
    """What was found, with its unit, and the limit where there is one."""
    cause: str
    """What is behind it when it fails."""
    fix: str
    """What to do then."""

    def __str__(self) -> str:
        """One line; a failed check adds cause and fix."""
        told = f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.measured}"
        return told if self.passed else f"{told}. Cause: {self.cause}. Fix: {self.fix}"


def require_all(checks: Sequence[Check], what: str) -> None:
    """Prints a line for each check, in the first of several processes.

    Args:
        what: word before each line.

    Raises:
        UserError: checks failed; it lists them, each with what was measured and what to do.
    """
    for check in checks if distributed.rank() == 0 else ():
        print(f"{what} {check}", flush=True)
    failed = [check for check in checks if not check.passed]
    if failed:
        told = "; ".join(f"{check.name} ({check.measured}; {check.fix})" for check in failed)
        raise UserError(f"{what} failed, {len(failed)} of {len(checks)} checks: {told}")
