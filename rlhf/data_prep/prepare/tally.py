"""Counts of changed and dropped rows by step and reason, with a few examples each; rejected rows go to a file."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.prepare.personal import replace_personal_data

_EXAMPLES = 3


@dataclass
class Counts:
    """Counts by reason, with up to three examples each."""

    shorten: Callable[[str], str]
    """Function of an example to the part that is kept."""
    counts: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, example: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        if len(self.examples[reason]) < _EXAMPLES:
            self.examples[reason].append(self.shorten(example))

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{reason: {"count", "examples"}}`."""
        return {reason: {"count": count, "examples": self.examples[reason]} for reason, count in self.counts.items()}


class Tally:
    """Counts of one build. Every row that is left out is written to `rejected.jsonl` the moment it is counted."""

    def __init__(self, rejected: Path) -> None:
        self.changes: Counter[str] = Counter()
        """By step."""
        self.examples: defaultdict[str, Counts] = defaultdict(lambda: Counts(_public))
        """By kind of change, for each step."""
        self.drops: defaultdict[str, Counts] = defaultdict(lambda: Counts(_public))
        """By reason, for each step."""
        self._file = rejected.open("w", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Tally:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def changed(self, step: str, examples: str | Mapping[str, str]) -> None:
        """Count a row that a step changed, with an example, or one of each kind of change."""
        self.changes[step] += 1
        for kind, example in ({"": examples} if isinstance(examples, str) else examples).items():
            self.examples[step].add(kind, example)

    def rejected(self, step: str, reason: str, file: str, row: int, data: Any, example: str | None = None) -> None:
        """Count a row, or a record of one, that is left out, and write it to the file."""
        self.drops[step].add(reason, f"{file}, row {row}: {_short(data) if example is None else example}")
        line = {"file": file, "row": row, "step": step, "reason": reason, "data": data}
        self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def dropped(self, step: str, reason: str, record: Record, note: str = "") -> None:
        """Count a record that is left out, like `rejected`; `note` adds to the reason under which it is counted."""
        data = {
            k: v for k, v in dataclasses.asdict(record).items() if v not in (None, [], "") and k not in ("file", "row")
        }
        whole = {"note": note, **data} if note else data
        self.rejected(step, reason, record.file, record.row, whole, f"{_short(record.last_turn)[:80]} {note}".strip())

    def reasons(self) -> str:
        """Return the reasons to leave rows out with their counts, the most frequent first."""
        total = sum((drops.counts for drops in self.drops.values()), Counter[str]())
        return "; ".join(f"{reason}: {count:,}" for reason, count in total.most_common())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{step: {"changed", "examples", "dropped": {reason: {"count", "examples"}}}}`."""
        return {
            step: {
                "changed": self.changes[step],
                "examples": [example for of in self.examples[step].examples.values() for example in of],
                "dropped": dict(sorted(self.drops[step].as_dict().items())),
            }
            for step in dict.fromkeys([*self.changes, *self.drops])
        }


def _public(example: str) -> str:
    """Return an example for the card, which is made to be passed on; rejected.jsonl, with whole rows, is not."""
    return replace_personal_data(example)[:160].encode("utf-8", "backslashreplace").decode()


def _short(data: Any) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, default=str)
    return " ".join(text.split())
