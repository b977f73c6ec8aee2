"""Figures as text; one that is missing, null or not finite is a dash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.base.json_files import finite_number
from rlhf.run.progress import format_seconds

MINUS, NO_FIGURE = "\N{MINUS SIGN}", "\N{EN DASH}"

# (figure of PPO without _before/_after, label, percent?, sign of an improvement, note in which {judge} is its name)
BEFORE_AND_AFTER = (
    ("score", "Reward model's score", False, 1, "What PPO is trained to raise."),
    ("reward_positive", "Answers the reward model likes", True, 1, "Share with a score above 0."),
    ("gold_positive", "Positive answers", True, 1, "Share that {judge}, a judge PPO never saw, calls positive."),
    ("gold_negative", "Negative answers", True, -1, "Share that {judge} calls negative."),
    ("distinct2", "Distinct word pairs", True, 0, "How varied the wording is. A collapse shows here first."),
    ("length", "Length in tokens", False, 0, "A reward model may like length for its own sake."),
    ("stop_rate", "Answers that end by themselves", True, 0, "The others were cut off at the limit."),
)


def number(value: Any) -> str:
    """Return three significant digits, or all digits of a whole number from 1,000 on."""
    figure = finite_number(value)
    if figure is None:
        return NO_FIGURE
    return (f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}").replace("-", MINUS)


def score(value: Any) -> str:
    """Return two decimals."""
    figure = finite_number(value)
    return NO_FIGURE if figure is None else f"{figure:.2f}".replace("-", MINUS)


def percent(value: Any) -> str:
    """Return a share as a percentage with one decimal."""
    figure = finite_number(value)
    return NO_FIGURE if figure is None else f"{figure:.1%}"


def duration(value: Any) -> str:
    """Return seconds as a clock, `4:10`."""
    figure = finite_number(value)
    return NO_FIGURE if figure is None else format_seconds(figure)


def percent_interval(figure: Any) -> str:
    """Return `71.3% (69.0–73.6)` for a share with `value`, `low` and `high`; the value alone without an interval."""
    value, low, high = _value_and_bounds(figure)
    return percent(value) if low is None or high is None else f"{percent(value)} ({100 * low:.1f}–{100 * high:.1f})"


def number_interval(figure: Any) -> str:
    """Return `1.4 (1.3 to 1.5)` for a figure with `value`, `low` and `high`; the value alone without an interval."""
    value, low, high = _value_and_bounds(figure)
    return number(value) if low is None or high is None else f"{number(value)} ({number(low)} to {number(high)})"


def _value_and_bounds(figure: Any) -> tuple[float | None, float | None, float | None]:
    if not isinstance(figure, Mapping) or (value := finite_number(figure.get("value"))) is None:
        return None, None, None
    return value, finite_number(figure.get("low")), finite_number(figure.get("high"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested counts as lines of a table: `{"prompts": {"train": 900}}` -> `[("prompts · train", "900")]`."""
    lines: list[tuple[str, str]] = []
    for name, value in tree.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += flatten(value, f"{label} · ")
        elif isinstance(value, bool | str):
            lines.append((label, str(value)))
        elif isinstance(value, int | float):
            lines.append((label, f"{value:,}" if isinstance(value, int) else number(value)))
        elif isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
            lines.append((label, ", ".join(str(entry) for entry in value)))
    return lines
