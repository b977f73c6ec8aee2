"""The experiment, the decorator that registers one, and its verdicts: figures with intervals, made into statements.

An experiment is a function from a subject to statements; its docstring is the question that it settles:

    @experiment("ppo", needs=("first", "ordinary"), settles=("reward_falling",))
    def update_direction(subject: PPOSubject) -> Iterator[Statement]:
        '''Does an update raise the probability of what scored better than expected?'''
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf.base import intervals
from rlhf.base.intervals import Array
from rlhf.doctor.statements import NOT_EXAMINED, Statement

Run = Callable[[Any], Iterator[Statement]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One intervention, and the findings that call for it."""

    name: str
    stage: str
    run: Run
    needs: tuple[str, ...] = ()
    """Shared measurements that it reads: keys of `SHARED`, which are made once."""
    passes: float = 0.1
    """Cost of what is its own, in rollouts of 64 responses that are sampled and scored."""
    settles: tuple[str, ...]
    """Health checks and statements whose causes it tells apart."""

    @property
    def question(self) -> str:
        """The question that it settles."""
        return str(self.run.__doc__).split("\n")[0]

    def cost(self, subject: Any) -> float:
        """Return its cost as long as shared measurements of the subject are missing."""
        return self.passes + sum(
            cost for name, cost in SHARED.items() if name in self.needs and name not in vars(subject)
        )


#: Costs of measurements that experiments share, which are cached properties of the subject.
SHARED = {"sft": 1.5, "tuned": 1.6, "first": 1.5, "ordinary": 2.0, "losses": 2.0, "scores": 1.0}
EXPERIMENTS: list[Experiment] = []


def experiment(
    stage: str, *, settles: tuple[str, ...], needs: tuple[str, ...] = (), passes: float = 0.1
) -> Callable[[Run], Run]:
    """Register the decorated function as an experiment of its name."""

    def register(run: Run) -> Run:
        EXPERIMENTS.append(
            Experiment(name=run.__name__, stage=stage, run=run, needs=needs, passes=passes, settles=settles)
        )
        return run

    return register


def next_one(experiments: list[Experiment], findings: set[str], subject: Any) -> Experiment:
    """Return an experiment that findings call for, the cheapest first; else the cheapest of all."""
    return min(experiments, key=lambda one: (findings.isdisjoint(one.settles), one.cost(subject)))


# Figures


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval, which is infinite where the data allow none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def mean(values: Array, groups: Array) -> Interval:
    """Return the mean of values (n,) with its bootstrap interval over groups (n,)."""
    figure = intervals.mean(np.asarray(values, dtype=float), groups)
    assert figure is not None and figure["value"] is not None
    low, high = figure["low"], figure["high"]
    return Interval(
        figure["value"], -np.inf if low is None else min(low, figure["value"]), np.inf if high is None else high
    )


def correlation(x: Array, y: Array, groups: Array) -> Interval:
    """Return Pearson's correlation of x and y (n,) with its bootstrap interval over groups (n,); 0 where one is constant."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if min(x.std(), y.std()) <= 1e-12 or len(np.unique(groups)) < 2:
        return Interval(0.0, -1.0, 1.0)
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    _, number = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(number, part) for part in (np.ones(len(x)), x, y, x * x, y * y, x * y)], axis=1)
    draws = np.concatenate([_correlations(times @ sums) for times in intervals.draws(len(sums), seed=0)])
    low, high = intervals.interval(draws)
    value = float(_correlations(sums.sum(axis=0, keepdims=True))[0])
    return Interval(value, -1.0 if low is None else low, 1.0 if high is None else high)


def _correlations(sums: Array) -> Array:
    """Return correlations (k,) from sums (k, 6) of 1, x, y, x^2, y^2 and x y."""
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


# Verdicts


def confirmed(
    name: str,
    measured: str,
    *,
    cause: str,
    action: str,
    explains: tuple[str, ...] = (),
    severity: Literal["critical", "warning", "note"] = "critical",
) -> Statement:
    """Return the statement of an experiment that confirms a cause."""
    return Statement(
        part="investigation", name=name, passed=False, measured=measured, severity=severity, cause=cause, action=action,
        explains=list(explains),
    )  # fmt: skip


def ruled_out(name: str, measured: str) -> Statement:
    """Return the statement of an experiment that rules a cause out; `measured` names it."""
    return Statement(part="investigation", name=name, passed=True, measured=measured)


def undecided(name: str, measured: str) -> Statement:
    """Return the statement of an experiment whose interval allows either answer: it confirms nothing and excludes nothing."""
    return ruled_out(name, f"{NOT_EXAMINED} with enough answers to tell: {measured}")
