"""Figures of a run as they are read from its files and shown as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.json_files import finite_number, read_jsonl, read_object
from rlhf.run.progress import format_seconds

STAGES = ("sft", "reward", "ppo")
"""Of every run; pretraining comes before them where a run has it."""


MINUS, NO_FIGURE = "\N{MINUS SIGN}", "\N{EN DASH}"


Results = Mapping[str, Any]


def read_results(output_dir: Path) -> dict[str, Any]:
    """`results.json` of a run, with NaN and infinity as None."""
    file = output_dir / "results.json"
    if not file.is_file():
        raise UserError(f"{file} is not there; give the folder that a finished run wrote")
    return read_object(file, fix="run the last stage again to rewrite it", nan_as_none=True)


def _read_rows(file: Path, missing: list[str]) -> list[dict[str, Any]]:
    name = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        missing.append(f"{name} is not there")
        return []
    rows, bad = read_jsonl(file)
    if bad:
        missing.append(f"{name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    elif not rows:
        missing.append(f"{name} is empty")
    return rows


def _read_card(file: Path, missing: list[str]) -> dict[str, Any]:
    try:
        return read_object(file, nan_as_none=True)
    except FileNotFoundError:
        return {}  # not missing: a run on the user's own files has no data card, and one of an older version no report card
    except UserError:
        missing.append(f"{file.parent.name}/{file.name} is not readable as JSON")
        return {}


def _text(value: float | None) -> str:
    if value is None:
        return NO_FIGURE
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", MINUS)


def _score(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:.2f}".replace("-", MINUS)


def _percent(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:.1%}"


def _duration(value: Any) -> str:
    seconds = finite_number(value)
    return NO_FIGURE if seconds is None else format_seconds(seconds)


def _seconds(section: Results) -> str:
    return _duration(section.get("seconds"))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as lines for a table: `{"prompts": {"train": 900}}` -> `[("prompts · train", "900")]`."""
    lines: list[tuple[str, str]] = []
    for name, value in tree.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{label} · ")
        elif isinstance(value, bool | str):
            lines.append((label, str(value)))
        elif isinstance(value, int | float):
            lines.append((label, f"{value:,}" if isinstance(value, int) else _text(finite_number(value))))
        elif isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
            lines.append((label, ", ".join(str(entry) for entry in value)))
    return lines


# (figure in results["ppo"] without _before/_after, label, percent?, which way is better, what it is)
COMPARED = (
    ("score", "Reward model's score", False, 1, "What PPO is trained to raise."),
    ("reward_positive", "Answers the reward model likes", True, 1, "Share with a score above 0."),
    ("gold_positive", "Positive answers", True, 1, "Share that VADER, a judge PPO never saw, calls positive."),
    ("gold_negative", "Negative answers", True, -1, "Share that VADER calls negative."),
    ("distinct2", "Distinct word pairs", True, 0, "How varied the wording is. A collapse shows here first."),
    ("length", "Length in tokens", False, 0, "A reward model may like length for its own sake."),
    ("stop_rate", "Answers that end by themselves", True, 0, "The others were cut off at the limit."),
)
