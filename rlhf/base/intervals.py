"""95% percentile bootstraps over groups, mostly prompts, because values of one prompt are not independent.

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
_DRAWS_PER_CHUNK = 50


def draws(groups: int, seed: int, count: int = DRAWS) -> Iterator[Array]:
    """Yield how often each group is drawn: integer arrays (50, groups), `count` rows in total."""
    generator = np.random.default_rng(seed)
    even = np.full(groups, 1 / groups)
    for _ in range(count // _DRAWS_PER_CHUNK):
        yield generator.multinomial(groups, even, size=_DRAWS_PER_CHUNK)


def resampled(
    values: Sequence[Array], groups: Sequence[Array], seed: int, weights: Sequence[Array] | None = None
) -> Array:
    """Return bootstrap means (DRAWS, k) of k samples over shared draws of groups; NaN where a draw has none of a sample.

    Args:
        values: k arrays of numbers.
        groups: k arrays with the group of each number.
        weights: k arrays with the weight of each number in its mean; default: 1.
    """
    weights = [np.ones(len(v)) for v in values] if weights is None else weights
    names, number = np.unique(np.concatenate(list(groups)), return_inverse=True)
    ends = np.cumsum([len(g) for g in groups])
    numbers = np.split(number, ends[:-1])
    parts = list(zip(numbers, values, weights, strict=True))
    sums = np.stack([np.bincount(i, v * w, minlength=len(names)) for i, v, w in parts], axis=1)
    counts = np.stack([np.bincount(i, w, minlength=len(names)) for i, _, w in parts], axis=1)
    with np.errstate(invalid="ignore"):
        return np.concatenate([(times @ sums) / (times @ counts) for times in draws(len(names), seed)])


def interval(means: Array) -> tuple[float | None, float | None]:
    """Return the central 95% of bootstrap means; (None, None) if fewer than half of them are finite."""
    finite = means[np.isfinite(means)]
    if len(finite) < len(means) // 2:
        return None, None
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def mean(values: Array, groups: Array, seed: int = 0, weights: Array | None = None) -> dict[str, float | None] | None:
    """Return the mean of values (n,) and its interval over groups (n,) as `value`, `low`, `high`; None without values.

    With a single group `low` and `high` are None.
    """
    if len(values) == 0 or (weights is not None and not weights.any()):
        return None
    low = high = None
    if len(np.unique(groups)) > 1:
        low, high = interval(resampled([values], [groups], seed, None if weights is None else [weights])[:, 0])
    return {"value": float(np.average(values, weights=weights)), "low": low, "high": high}
