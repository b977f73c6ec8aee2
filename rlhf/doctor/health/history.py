"""The log of a stage, as the health checks read it."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from rlhf.base.json_files import finite_number

Row = Mapping[str, Any]
#: Sampled texts that the checks look at: those of the first rollouts.
SAMPLES_READ = 64


class SampleRow(TypedDict, total=False):
    """A line of `samples.jsonl`."""

    step: int
    prompt: str
    response: str


class ComparisonRow(TypedDict, total=False):
    """A line of `comparison.jsonl`."""

    sft_response: str
    ppo_response: str


class Settings(TypedDict, total=False):
    """Options of a run that the checks read, beside those that are numbers."""

    own_unit: bool
    """True for a reward model that was trained elsewhere, whose scores have a zero and unit of their own."""


class History:
    """The metric rows of one stage in order, and what else its folder holds.

    Args:
        stage: `pretrain`, `sft`, `reward` or `ppo`.
        rows: lines of `metrics.jsonl`: `step`, in updates, and figures by name; None or NaN is a figure that was not finite.
        settings: options of the run, where they are known.
        samples: lines of `samples.jsonl`: `step`, `prompt`, `response`.
        comparison: lines of `comparison.jsonl`: `sft_response` and `ppo_response` to the same held-out prompt.
    """

    def __init__(
        self,
        stage: str,
        rows: Iterable[Row] = (),
        *,
        settings: Mapping[str, Any] | None = None,
        samples: Iterable[Row] = (),
        comparison: Iterable[Row] = (),
    ) -> None:
        self.stage, self.settings = stage, dict(settings or {})
        self.samples, self.comparison = list(samples), list(comparison)
        self.left_out: list[str] = []
        """A line for each file that could not be read as a whole."""
        self.step = 0
        self._finite: dict[str, tuple[list[int], list[float]]] = {}
        self._broken: dict[str, int] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append one line of the log."""
        self.step = int(row.get("step") or 0)
        for name, value in row.items():
            if name in ("step", "time") or isinstance(value, bool | str | list | dict):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = self._finite.setdefault(name, ([], []))
                steps.append(self.step)
                values.append(float(value))
            else:
                self._broken.setdefault(name, self.step)

    @property
    def steps(self) -> list[int]:
        """Updates that were logged, in order; 0, of an evaluation before the first of them, is none."""
        steps = {step for steps, _ in self._finite.values() for step in steps} | set(self._broken.values())
        return sorted(steps - {0})

    def until(self, step: int) -> History:
        """Return the history as it was after that update; it shares the figures."""
        earlier = History(self.stage, settings=self.settings)
        earlier.step = step
        earlier.samples = [row for row in self.samples if (row.get("step") or 0) <= step]
        earlier.comparison = self.comparison if step >= self.step else []  # made after the last update
        earlier._finite = self._finite
        earlier._broken = {name: first for name, first in self._broken.items() if first <= step}
        return earlier

    def broken(self) -> dict[str, int]:
        """Return the figures that were not finite, each with the first update at which it was not."""
        return dict(self._broken)

    def values(self, name: str, last: int | None = None) -> list[float]:
        """Return the finite values of a figure, oldest first: all, or the last few."""
        values = self._finite.get(name, ([], []))[1]
        end = self.count(name)
        return values[max(0, end - last) if last is not None else 0 : end]

    def first(self, name: str, count: int) -> list[float]:
        """Return the first few values, or fewer."""
        return self._finite.get(name, ([], []))[1][: min(count, self.count(name))]

    def count(self, name: str) -> int:
        """Return the number of finite values of a figure."""
        return bisect_right(self._finite.get(name, ([], []))[0], self.step)

    def at(self, name: str, step: int) -> float | None:
        """Return the value at an update, if it was logged there."""
        steps, values = self._finite.get(name, ([], []))
        place = bisect_right(steps, step) - 1
        return values[place] if step <= self.step and place >= 0 and steps[place] == step else None

    def logged(self, name: str) -> list[int]:
        """Return the updates at which a figure was logged with a finite value, as `values` returns them."""
        return self._finite.get(name, ([], []))[0][: self.count(name)]

    def change(self, name: str, *, start: int = 3, recent: int = 3) -> tuple[float, float]:
        """Return the means of the first few and of the last few values, of which as many as both together are needed."""
        assert self.count(name) >= start + recent
        return statistics.fmean(self.first(name, start)), statistics.fmean(self.values(name, recent))

    def setting(self, name: str, default: float = 0.0) -> float:
        """Return a numeric option of the run; the default where it is unknown, unset or 0."""
        return finite_number(self.settings.get(name)) or default
