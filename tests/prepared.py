"""What tests of data preparation share: invented prompts that resemble one another no more than they should, and a reader
of what was made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlhf.data_prep.prepare.recipe import KINDS, SPLITS

_WORDS = """apple river stone cloud winter music garden window silver forest letter bridge candle mirror ocean paper rocket
shadow travel violin basket copper desert engine feather guitar harbour island jacket kettle ladder marble needle orange pencil
quartz ribbon saddle temple umbrella valley walnut yellow zebra anchor button carpet dragon"""


def text(number: int, words: int = 12) -> str:
    """An invented text, another one for each number; two of them share about as much as strangers do."""
    generator = random.Random(number)
    return " ".join(generator.choice(_WORDS.split()) for _ in range(words))


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Comparisons in plain columns."""
    return [
        {"prompt": text(3 * i), "chosen": text(3 * i + 1), "rejected": text(3 * i + 2)}
        for i in range(first, first + count)
    ]


class Built:
    """A prepared folder, read back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        self.rejected: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def rows(self, kind: str, *splits: str) -> list[dict[str, Any]]:
        """Rows of a kind in the splits named, in all of them by default."""
        found: list[dict[str, Any]] = []
        for split in splits or SPLITS:
            file = self.folder / kind / f"{split}.parquet"
            found += pq.read_table(file).to_pylist() if file.is_file() else []
        return found

    def prompts(self, kind: str, *splits: str) -> set[str]:
        """The last user turns of the rows."""
        rows = self.rows(kind, *splits)
        turns = [row["messages"][:-1] if kind == "demonstrations" else row["prompt"] for row in rows]
        return {turn[-1]["content"] for turn in turns}

    @property
    def places(self) -> dict[str, str]:
        """`KIND/SPLIT` by prompt."""
        return {p: f"{kind}/{split}" for kind in KINDS for split in SPLITS for p in self.prompts(kind, split)}

    def reasons(self, step: str) -> dict[str, int]:
        """Rows that a step left out, by reason."""
        return {why: drop["count"] for why, drop in self.card["steps"].get(step, {}).get("dropped", {}).items()}
