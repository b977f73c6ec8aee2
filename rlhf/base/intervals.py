"""95% percentile bootstraps that draw whole groups, in most places prompts: values of one prompt are no independent evidence.

Source: Efron & Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DRAWS = 1000
"""Resamples of each bootstrap."""
_AT_ONCE = 50


def draws(groups: int, seed: int, count: int = DRAWS) -> Iterator[Array]:
    """How often each of the groups is drawn, (50, groups) at a time, `count` rows in all."""
    generator = np.random.default_rng(seed)
    even = np.full(groups, 1 / groups)
    for _ in range(count // _AT_ONCE):
        yield generator.multinomial(groups, even, size=_AT_ONCE)


def resampled(
    values: Sequence[Array], groups: Sequence[Array], seed: int, weights: Sequence[Array] | None = None
) -> Array:
    """(DRAWS, k) bootstrap means of k samples over the same draws of whole groups; NaN where a draw misses a sample.

    Args:
        values: k arrays of numbers.
        groups: k arrays, the group of each number.
        weights: k arrays, what each number counts in its mean; 1 if not given.
    """
    weights = [np.ones(len(v)) for v in values] if weights is None else weights
    drawn, number = np.unique(np.concatenate(list(groups)), return_inverse=True)
    ends = np.cumsum([len(g) for g in groups])
    numbers = np.split(number, ends[:-1])
    parts = list(zip(numbers, values, weights, strict=True))
    sums = np.stack([np.bincount(i, v * w, minlength=len(drawn)) for i, v, w in parts], axis=1)
    counts = np.stack([np.bincount(i, w, minlength=len(drawn)) for i, _, w in parts], axis=1)
    with np.errstate(invalid="ignore"):
        return np.concatenate([(times @ sums) / (times @ counts) for times in draws(len(drawn), seed)])


def interval(drawn: Array) -> tuple[float | None, float | None]:
    """The central 95% of bootstrap draws; (None, None) when there is nothing to see in them."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < len(drawn) // 2:
        return None, None
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)


def mean(values: Array, groups: Array, seed: int = 0, weights: Array | None = None) -> dict[str, float | None] | None:
    """Mean of the values (n,) and its interval over the groups (n,): `value`, `low`, `high`; None without values.

    A single group has no interval: `low` and `high` are None.
    """
    if len(values) == 0 or (weights is not None and not weights.any()):
        return None
    low = high = None
    if len(np.unique(groups)) > 1:
        low, high = interval(resampled([values], [groups], seed, None if weights is None else [weights])[:, 0])
    return {"value": float(np.average(values, weights=weights)), "low": low, "high": high}
