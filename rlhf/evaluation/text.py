"""Figures of plain text."""

from __future__ import annotations

from collections.abc import Iterable


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of the texts together (Li et al. 2016); 0 when there are none."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that it has had before: 1 - distinct / all (seq-rep-n, Welleck et al. 2020); 0 when
    there are none."""
    words = text.split()
    return 1 - distinct_n([text], n) if len(words) >= n else 0.0
