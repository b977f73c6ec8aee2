"""The health check, and the decorator that registers one.

A check is a function from a `History` to its evidence, or None. Its limits are keyword arguments with defaults, and its
docstring says when it fires, with each limit as `{name}`. docs/health.md is generated from both:

    @check(severity="critical", cause="...", action="...", needs=("objective/kl_k3",))
    def wrong_reference(h: History, *, kl: float = 0.01) -> str | None:
        '''KL above {kl:g} nats a response in the first rollout.'''
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf.doctor.health.history import History

Stage = Literal["pretrain", "sft", "reward", "ppo"]
Severity = Literal["critical", "warning"]
Remedy = Literal["learning_rate", "kl_coef"]

_REGISTERED: dict[str, dict[str, HealthCheck]] = {}


@dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """One thing that can be wrong with a run, and how the log shows it."""

    name: str
    stages: tuple[Stage, ...]
    severity: Severity
    """critical: going on wastes time, or ruins the policy. warning: look at it."""
    cause: str
    action: str
    remedy: Remedy
    """Setting that a roll-back changes: half the learning_rate, or twice the kl_coef."""
    needs: tuple[str, ...]
    """Figures without which nothing can be found; `STAGE/` stands for the stage that is examined."""
    rows: int
    """Values of each that are needed."""
    reads: str
    """The data it looks at, for the docs."""
    source: str
    """Paper or code that the limit comes from; empty for limits of this project."""
    look: Callable[..., str | None]

    def __call__(self, history: History) -> str | None:
        """Return the evidence after the history's newest update, or None if all is well or data is missing."""
        needs = (name.replace("STAGE/", f"{history.stage}/") for name in self.needs)
        if history.stage not in self.stages or any(history.count(name) < self.rows for name in needs):
            return None
        return self.look(history)

    @property
    def limits(self) -> dict[str, float]:
        """Limits by name: the function's keyword arguments and their defaults."""
        parameters = inspect.signature(self.look).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def finds(self) -> str:
        """When it fires, with figures: the function's docstring."""
        return " ".join(str(self.look.__doc__).split()).format(**self.limits, rows=self.rows).removesuffix(".")


def check(
    *,
    severity: Severity,
    cause: str,
    action: str,
    stages: tuple[Stage, ...] = ("ppo",),
    needs: tuple[str, ...] = (),
    rows: int = 1,
    remedy: Remedy = "learning_rate",
    reads: str = "",
    source: str = "",
) -> Callable[[Callable[..., str | None]], HealthCheck]:
    """Register the decorated function as a check; the arguments are the fields of `HealthCheck`.

    Args:
        reads: defaults to the names in `needs`.
    """

    def register(look: Callable[..., str | None]) -> HealthCheck:
        health_check = HealthCheck(
            name=look.__name__,
            stages=stages,
            severity=severity,
            cause=cause,
            action=action,
            remedy=remedy,
            needs=needs,
            rows=rows,
            reads=reads or ", ".join(f"`{name}`" for name in needs),
            source=source,
            look=look,
        )
        return _REGISTERED.setdefault(look.__module__, {}).setdefault(health_check.name, health_check)

    return register


def registered(module: str) -> tuple[HealthCheck, ...]:
    """Return the checks of a module, in the order of its file."""
    return tuple(_REGISTERED[module].values())
