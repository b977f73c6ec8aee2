"""What the tests of evaluation judge by, and where their toy models are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Words that the toy's raters like and dislike: a gold scorer that needs no model.
LIKED = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}


def toy_gold(responses: list[str]) -> list[float]:
    """What the toy's raters would say, less a little for each letter, so that few answers tie."""
    return [sum(LIKED.get(word, 0.0) for word in text.split()) - len(text) / 100 for text in responses]


def broken_gold(responses: list[str]) -> list[float]:
    """One score too few."""
    return [0.0] * (len(responses) - 1)


@dataclass(frozen=True)
class World:
    """A registry with sft/toy, reward/toy, ppo/toy and ppo/snaps, and the folder of the last one's run, with snapshots."""

    registry: Path
    run: Path
    prompts: Path
    common: tuple[str, ...]
    """Words of an evaluation at toy size."""
