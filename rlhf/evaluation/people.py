"""People as judges: a table of unnamed pairs goes out, the filled-in tables come back.

The table says neither which policy wrote an answer nor on which side the baseline is: both follow from the answers, which
are kept, and the seed. So several people can fill in copies of it, in any order and in part.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean
from rlhf.evaluation.chat import Pair

COLUMNS = ("id", "prompt", "answer_a", "answer_b", "verdict")
_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class BlindPair:
    """A line of the table."""

    id: str
    pair: Pair
    swapped: bool
    """Answer A is the baseline's."""


def blind(pairs: Sequence[Pair], seed: int) -> list[BlindPair]:
    """Each pair with its side and an id that tells nothing, in the order given."""
    lines = []
    for pair in pairs:
        digest = hashlib.sha256("\x1f".join((str(seed), pair.prompt, pair.answer, pair.baseline)).encode()).hexdigest()
        lines.append(BlindPair(digest[:12], pair, swapped=int(digest[12:14], 16) % 2 == 1))
    return lines


def export(file: Path, pairs: Sequence[Pair], seed: int) -> int:
    """Writes the table, its lines shuffled; equal pairs are one line, and answers that are alike none. Returns the number
    of lines."""
    lines = list({line.id: line for line in blind(pairs, seed) if not line.pair.alike}.values())
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
    """Id -> the verdicts of those who gave one: 1 for answer A, 0 for B, half for a tie.

    Raises:
        UserError: no such file, other columns, or a verdict that is none (its line is named).
    """
    found: dict[str, list[float]] = {}
    for file in files:
        try:
            with file.open(encoding="utf-8-sig", newline="") as handle:
                table = csv.DictReader(handle)
                columns = table.fieldnames or []
                lines = [(table.line_num, row) for row in table]
        except FileNotFoundError as error:
            near = did_you_mean(str(file), [str(p) for p in file.parent.glob("*.csv")])
            raise UserError(f"no file {file}{near}") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} is no .csv table in UTF-8: {error}") from error
        if missing := [name for name in ("id", "verdict") if name not in columns]:
            raise UserError(f"{file} has no column '{missing[0]}'; fill in the table that --export_comparison wrote")
        for number, row in lines:
            verdict = (row["verdict"] or "").strip().lower()
            if verdict and verdict not in _VERDICTS:
                raise UserError(f"{file}, line {number}: the verdict is '{row['verdict']}'; write A, B, tie or nothing")
            if verdict:
                found.setdefault(str(row["id"]).strip(), []).append(_VERDICTS[verdict])
    return found


def unblind(pairs: Sequence[Pair], seed: int, verdicts: dict[str, list[float]]) -> list[float | None]:
    """For each pair the mean verdict: 1 the policy's answer, 0 the baseline's, half where they are alike; None where nobody
    judged it."""
    won: list[float | None] = []
    for line in blind(pairs, seed):
        given = [0.5] if line.pair.alike else verdicts.get(line.id)
        for_a = sum(given) / len(given) if given else None
        won.append(for_a if for_a is None or not line.swapped else 1 - for_a)
    return won


def check_known(pairs: Sequence[Pair], seed: int, verdicts: dict[str, list[float]]) -> None:
    """Raises `UserError` for verdicts on other answers than these: they would be dropped without a word."""
    unknown = sorted(verdicts.keys() - {line.id for line in blind(pairs, seed)})
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(verdicts)} verdicts are on pairs of another comparison (id {unknown[0]}); give the same "
            "models and options as when the table was written"
        )
