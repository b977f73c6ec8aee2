"""Counts of changed and dropped rows by step and reason, with a few examples each; rejected rows go to a file."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.prepare.personal import replace_personal_data

_EXAMPLES = 3
_EXAMPLE_LENGTH = 160


class Tally:
    """Counts of one build. Every row that is left out is written to `rejected.jsonl` the moment it is counted."""

    def __init__(self, rejected: Path) -> None:
        self.changes: Counter[str] = Counter()
        self.drops: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.examples: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self._file = rejected.open("w", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Tally:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def changed(self, step: str, example: str) -> None:
        """Count a row that a step changed."""
        self.changes[step] += 1
        self._example(step, "", example)

    def rejected(self, step: str, reason: str, file: str, row: int, data: Any, example: str | None = None) -> None:
        """Count a row, or a record of one, that is left out, and write it to the file."""
        self.drops[step][reason] += 1
        self._example(step, reason, f"{file}, row {row}: {_short(data) if example is None else example}")
        line = {"file": file, "row": row, "step": step, "reason": reason, "data": data}
        self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def dropped(self, step: str, reason: str, record: Record, note: str = "") -> None:
        """Count a record that is left out, like `rejected`; `note` adds to the reason under which it is counted."""
        data = {
            k: v for k, v in dataclasses.asdict(record).items() if v not in (None, [], "") and k not in ("file", "row")
        }
        whole = {"note": note, **data} if note else data
        self.rejected(step, reason, record.file, record.row, whole, f"{_short(record.last_turn)[:80]} {note}".strip())

    def total(self, step: str) -> int:
        """Rows left out by a step."""
        return sum(self.drops[step].values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{step: {"changed", "examples", "dropped": {reason: {"count", "examples"}}}}`."""
        steps = dict.fromkeys([*self.changes, *self.drops])
        return {
            step: {
                "changed": self.changes[step],
                "examples": self.examples[step, ""],
                "dropped": {
                    reason: {"count": count, "examples": self.examples[step, reason]}
                    for reason, count in sorted(self.drops[step].items())
                },
            }
            for step in steps
        }

    def _example(self, step: str, reason: str, example: str) -> None:
        if len(self.examples[step, reason]) < _EXAMPLES:
            # the card is made to be passed on; rejected.jsonl, with whole rows, is not
            shown = replace_personal_data(example)[:_EXAMPLE_LENGTH]
            self.examples[step, reason].append(shown.encode("utf-8", "backslashreplace").decode())


def _short(data: Any) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, default=str)
    return " ".join(text.split())
