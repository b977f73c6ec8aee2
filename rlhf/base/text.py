"""Statistics of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Return the share of distinct n-grams of words among all n-grams of the texts (Li et al. 2016); 0 if there are none."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Return the share of repeated n-grams of words: 1 - distinct / all (seq-rep-n, Welleck et al. 2020); 0 if there are none."""
    grams = _grams(text.split(), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
