"""Rows of a log: figures by name, made from what its file holds, and put in order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.doctor.foreign.figure import Rounded

Row = dict[str, float]
#: Names under which a row has its step, the best first; `_step` of W&B counts calls, `step` and the others updates.
STEPS = ("global_step/max_steps", "global_step", "training/global_step", "current_steps", "step", "_step", "Step")
STEP = "step"
#: Most parts of a name that is made of nested objects.
NESTED = 4
_LONGEST_NAME = 200
_LAST_STEP = 1e12
MOST_RUNS = 20
"""Runs of one file that are examined; files whose steps go up and down seem to hold thousands."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?")
_WORDS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf, "-inf": -math.inf, "-infinity": -math.inf}
_ROUNDED = re.compile(r"-?0\.000?")


@dataclass
class Log:
    """The log of one run in a file."""

    form: str
    """Kind of file, for people."""
    rows: list[Row] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """A line for each part that could not be read."""
    name: str = ""
    """Name of the run, where a file holds several."""


def number(value: Any) -> float | None:
    """Return a figure as a float, NaN and infinity too; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        try:
            return value if isinstance(value, float) else float(value)
        except OverflowError:
            return None
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        return None
    text = value.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if not _NUMBER.fullmatch(text):
        return None
    figure = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    return Rounded(figure) if _ROUNDED.fullmatch(text) else figure


def plain_name(name: str) -> str:
    """Return a name as `trainer_state.json` has it: W&B and TensorBoard put `train/` and `eval/` before it."""
    name = name.strip()[:_LONGEST_NAME]
    if name.startswith("train/"):
        return name.removeprefix("train/")
    return f"eval_{name.removeprefix('eval/')}" if name.startswith("eval/") else name


def flat(values: Mapping[Any, Any], *, depth: int = NESTED) -> dict[str, Any]:
    """Return nested objects as one, with slashes between the parts of the names; lists are left out."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            if depth > 1:
                result |= {f"{name}/{part}": entry for part, entry in flat(value, depth=depth - 1).items()}
        elif not isinstance(value, list):
            result[str(name)] = value
    return result


def read_row(values: Mapping[Any, Any], known: frozenset[str]) -> Row:
    """Return the figures of a row that are known, and its steps."""
    if isinstance(data := values.get("data"), Mapping):  # verl's file logger: {"step": 1, "data": {...}}
        values = {**data, STEP: values.get("step")}
    row: Row = {}
    for name, value in flat(values).items():
        plain = plain_name(name)
        if plain in STEPS and isinstance(value, str):
            value = value.partition("/")[0]  # ms-swift: "10/500"
        if (plain in known or plain in STEPS) and (figure := number(value)) is not None:
            row[plain] = figure
    return row


def step_name(rows: Sequence[Row]) -> str:
    """Return the name under which rows have their step; empty if none has one, so that rows are counted."""
    return next((name for name in STEPS if sum(name in row for row in rows) > min(1, len(rows) - 1)), "")


def ordered(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each run in the order of their steps, one row a step.

    A step behind the last one is a run that was resumed: what came after its checkpoint is replaced. One at or behind the
    first step is another run.
    """
    rows = list(rows)
    name = step_name(rows)
    runs: list[list[Row]] = [[]]
    for row in rows:
        run = runs[-1]
        last = run[-1][STEP] if run else 0.0
        figures = {key: value for key, value in row.items() if key not in STEPS}
        if not figures:
            continue
        step = row.get(name, last) if name else last + _trains(figures)
        if not 0 <= step < _LAST_STEP:
            continue
        if run and step < last:
            if step <= run[0][STEP]:
                runs.append([])
            else:
                run[:] = [earlier for earlier in run if earlier[STEP] < step]
        _add(runs[-1], {**figures, STEP: float(step)})
    return [run for run in runs if run]


def _trains(figures: Row) -> bool:
    """Return whether a row without a step is of an update, and not of an evaluation."""
    return any(not name.startswith(("eval_", "val/")) and name != "epoch" for name in figures)


def _add(run: list[Row], row: Row) -> None:
    """Append a row, or merge it with the last one if that is of the same step and has none of its figures."""
    if run and run[-1][STEP] == row[STEP] and not (run[-1].keys() & row.keys()) - {STEP, "epoch"}:
        run[-1].update(row)
    else:
        run.append(row)
