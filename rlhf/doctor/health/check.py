"""The health check, and the decorator that registers one.

A check is a function from a `History` to its evidence, or None. Its limits are keyword arguments with defaults, and its
docstring says when it fires, with each limit as `{name}`. docs/health.md is generated from both:

    @check(severity="critical", shows="...", causes={"...": []}, action="...", needs=("objective/kl_k3",))
    def wrong_reference(h: History, *, kl: float = 0.01) -> str | None:
        '''KL above {kl:g} nats a response in the first rollout.'''
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.doctor.health.history import History

Stage = Literal["pretrain", "sft", "reward", "ppo"]
Severity = Literal["critical", "warning"]
Remedy = Literal["learning_rate", "kl_coef"]

_REGISTERED: dict[str, dict[str, HealthCheck]] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class HealthCheck:
    """A symptom that figures of a run can show, and what may be behind it."""

    name: str
    look: Callable[..., str | None]
    severity: Severity
    """critical: going on wastes time, or ruins the policy. warning: look at it."""
    shows: str
    """Meaning of the symptom, without a cause."""
    causes: Mapping[str, Sequence[str]]
    """What may be behind it, the likeliest first, each with the statements (`part:name`) that exclude it where they passed."""
    action: str
    explains: tuple[str, ...] = ()
    """Checks that find its consequences."""
    stages: tuple[Stage, ...] = ("ppo",)
    remedy: Remedy = "learning_rate"
    """Setting that a roll-back changes: half the learning_rate, or twice the kl_coef."""
    needs: tuple[str, ...] = ()
    """Figures without which nothing can be found; `STAGE/` stands for the stage that is examined."""
    rows: int = 1
    """Values of each that are needed."""
    data: str = ""
    """Inputs, for the docs; empty for the figures in `needs`."""
    source: str = "-"
    """Paper or code that the limit comes from; `-` for limits of this project."""

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


def check(**fields: Any) -> Callable[[Callable[..., str | None]], HealthCheck]:
    """Register the decorated function as a check of its name; `fields` are those of `HealthCheck`."""

    def register(look: Callable[..., str | None]) -> HealthCheck:
        module = _REGISTERED.setdefault(look.__module__, {})
        return module.setdefault(look.__name__, HealthCheck(name=look.__name__, look=look, **fields))

    return register


def registered(module: str) -> tuple[HealthCheck, ...]:
    """Return the checks of a module, in the order of its file."""
    return tuple(_REGISTERED[module].values())
