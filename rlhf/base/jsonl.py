"""JSON lines, read with a count of the lines that are not whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_jsonl(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a `.jsonl` file, and how many lines are not JSON objects (a killed run leaves half a line)."""
    rows, bad = [], 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=lambda _: None)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad += 1
    return rows, bad


def entries(tree: Mapping[str, Any], name: str) -> list[Any]:
    """Return the list under a name, empty where there is none."""
    entry = tree.get(name)
    return entry if isinstance(entry, list) else []


def finite_number(value: Any) -> float | None:
    """The value if it is a finite number, else None; figures may be null, absent, or NaN in a run that diverged."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping under a name, empty where there is none."""
    entry = tree.get(name)
    return entry if isinstance(entry, dict) else {}
