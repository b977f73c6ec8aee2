"""People as judges: a table of blind pairs is written, and filled-in copies of it are read.

The table holds neither the policy nor the side of the baseline: both follow from the answers, which are saved, and the
seed. So several people can fill in copies of it, in any order and in part.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.text_files import read_text
from rlhf.evaluation.chat import VERDICTS, Pair

COLUMNS = ("id", "prompt", "answer_a", "answer_b", "verdict")


@dataclass(frozen=True)
class BlindPair:
    """A line of the table."""

    id: str
    pair: Pair
    swapped: bool
    """True if answer A is the baseline's."""


def blind(pairs: Sequence[Pair], seed: int) -> list[BlindPair]:
    """Return each pair with its side and an id that reveals nothing, in the same order."""
    lines = []
    for pair in pairs:
        digest = hashlib.sha256("\x1f".join((str(seed), pair.prompt, pair.answer, pair.baseline)).encode()).hexdigest()
        lines.append(BlindPair(digest[:12], pair, swapped=int(digest[12:14], 16) % 2 == 1))
    return lines


def export(file: Path, pairs: Sequence[Pair], seed: int) -> int:
    """Write the table with shuffled lines; return their number.

    Repeated pairs share a line; pairs of equal answers have none.
    """
    lines = list({line.id: line for line in blind(pairs, seed) if not line.pair.equal}.values())
    random.Random(seed).shuffle(lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8-sig", newline="") as handle:  # the mark by which spreadsheets know UTF-8
        table = csv.writer(handle)
        table.writerow(COLUMNS)
        for line in lines:
            answers = (line.pair.answer, line.pair.baseline)
            table.writerow([line.id, line.pair.prompt, *(answers[::-1] if line.swapped else answers), ""])
    return len(lines)


def read_verdicts(files: Sequence[Path]) -> dict[str, list[float]]:
    """Return id -> verdicts of all raters: 1 for answer A, 0 for B, 0.5 for a tie.

    Raises:
        UserError: no such file, other columns, or something else than a verdict (its line is named).
    """
    verdicts: dict[str, list[float]] = {}
    for file in files:
        try:
            table = csv.DictReader(io.StringIO(read_text(file), newline=""))
            columns = table.fieldnames or []
            lines = [(table.line_num, row) for row in table]
        except FileNotFoundError as error:
            near = did_you_mean(str(file), [str(p) for p in file.parent.glob("*.csv")])
            raise UserError(f"no file {file}{near}") from error
        except csv.Error as error:
            raise UserError(f"{file} is no .csv table: {error}") from error
        if missing := [name for name in ("id", "verdict") if name not in columns]:
            raise UserError(f"{file} has no column '{missing[0]}'; fill in the table that --export_comparison wrote")
        for number, row in lines:
            verdict = (row["verdict"] or "").strip().lower()
            if verdict and verdict not in VERDICTS:
                raise UserError(f"{file}, line {number}: the verdict is '{row['verdict']}'; write A, B, tie or nothing")
            if verdict:
                verdicts.setdefault(str(row["id"]).strip(), []).append(VERDICTS[verdict])
    return verdicts


def unblind(pairs: Sequence[Pair], seed: int, verdicts: dict[str, list[float]]) -> list[float | None]:
    """Return each pair's mean verdict: 1 for the policy's answer, 0 for the baseline's, 0.5 if they are equal; None without
    a verdict."""
    won: list[float | None] = []
    for line in blind(pairs, seed):
        values = [0.5] if line.pair.equal else verdicts.get(line.id)
        for_a = sum(values) / len(values) if values else None
        won.append(for_a if for_a is None or not line.swapped else 1 - for_a)
    return won


def check_pairs(pairs: Sequence[Pair], seed: int, verdicts: dict[str, list[float]]) -> None:
    """Raise `UserError` for verdicts on other pairs than these: they would be dropped silently."""
    unknown = sorted(verdicts.keys() - {line.id for line in blind(pairs, seed)})
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(verdicts)} verdicts are on pairs of another comparison (id {unknown[0]}); give the same "
            "models and options as when the table was written"
        )
