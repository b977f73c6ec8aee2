"""Figures of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of the texts together (Li et al. 2016); 0 when there are none."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_n(texts: Iterable[str], n: int) -> float:
    """Share of a text's n-grams of words that it has used before, mean over texts; a text without any counts as 0."""
    grams = [_grams(text.split(), n) for text in texts]
    shares = [1 - len(set(own)) / len(own) if own else 0.0 for own in grams]
    return sum(shares) / len(shares) if shares else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
