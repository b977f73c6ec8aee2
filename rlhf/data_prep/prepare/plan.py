"""The plan of a data set: staged rows that are still in it, their splits, and the kinds that they become."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf.data_prep.prepare.recipe import KINDS, SPLITS
from rlhf.data_prep.prepare.staged import Staged
from rlhf.data_prep.prepare.tally import Tally


class Plan:
    """Staged rows that are still in the data set, their splits and kinds. Steps narrow it down, and every drop is counted."""

    def __init__(self, staged: Staged, tally: Tally) -> None:
        self.staged = staged
        self.tally = tally
        self.alive = np.ones(len(staged), dtype=bool)
        self.split = np.full(len(staged), -1, dtype=np.int8)
        """(N,) number in `SPLITS`, -1 until it is assigned."""
        self.becomes = np.zeros((len(staged), len(KINDS)), dtype=bool)
        """(N, 3) True for the kinds of `KINDS` that the row becomes."""

    @property
    def rows(self) -> np.ndarray:
        """Return the numbers of the rows that are still in."""
        return np.flatnonzero(self.alive)

    def hashes(self, name: str) -> np.ndarray:
        """Return (n,) a hash of each row that is still in."""
        return self.staged.hashes[name][self.alive]

    def drop(self, rows: np.ndarray, step: str, reason: str, note: Callable[[int], str] | None = None) -> None:
        """Take rows out, counted under `reason`; each is written to rejected.jsonl, with a note if there is one."""
        rows = rows[self.alive[rows]]
        self.alive[rows] = False
        self.becomes[rows] = False
        for row, record in zip(rows.tolist(), self.staged.records(rows), strict=True):
            self.tally.dropped(step, reason, record, note(row) if note else "")

    def sets(self) -> dict[str, np.ndarray]:
        """Return the rows of each set, by `KIND/SPLIT`."""
        return {
            f"{kind}/{split}": np.flatnonzero(self.alive & self.becomes[:, k] & (self.split == s))
            for k, kind in enumerate(KINDS)
            for s, split in enumerate(SPLITS)
        }

    def take_out(self, rows: np.ndarray, kind: str, step: str, reason: str) -> None:
        """Take rows out of one kind; those that become nothing else are dropped."""
        self.becomes[rows, KINDS.index(kind)] = False
        self.drop(rows[~self.becomes[rows].any(axis=1)], step, reason)
