"""Ratings of several raters as one preference: by differences of means, by votes on each pair, or by a Bradley-Terry model.

A rating matrix is (R, A): R responses, A raters, None where a rater did not see a response. Every rule gives each response
one number, higher is better; `clear_pairs` are the pairs whose numbers differ by enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.hashes import unit

Matrix = Sequence[Sequence[float | None]]

#: Means of ratings are not exact: 1.3 - 0.8 is below 0.5 in fp32, and 0.7 - 0.2 in fp64.
_TOLERANCE = 1e-6


def is_clear(difference: Any, minimum: float) -> Any:
    """Return True where ratings that differ by this are a preference: by `minimum` or more, and no tie.

    Takes a number, or elementwise an array or tensor. All that form pairs use it, so that they agree on ties.
    """
    return (difference > _TOLERANCE) & (difference >= minimum - _TOLERANCE)


def mean_ratings(matrix: Matrix) -> list[float]:
    """Return (R,) means over the raters who saw the response. Raters with scales of their own count as they are."""
    return [_mean(rating for rating in row if rating is not None) for row in matrix]


def majority_votes(matrix: Matrix) -> list[float]:
    """Return (R,) means over the other responses of the share of votes: +1 all raters of the pair prefer it, -1 none does.

    Of two responses these are +s and -s with s = (votes for - votes against) / raters of the pair; ties are no votes.
    """
    scores = [0.0] * len(matrix)
    for i, j in combinations(range(len(matrix)), 2):
        both = _rated_both(matrix, i, j)
        if both:
            share = sum((a > b) - (a < b) for a, b in both) / len(both)
            scores[i] += share
            scores[j] -= share
    return [round(score / (len(matrix) - 1), 9) for score in scores]  # equal ones are equal to the last bit


def bradley_terry(matrix: Matrix, iterations: int = 200) -> list[float]:
    """Return (R,) log-strengths, mean 0, of a Bradley-Terry model of all pairs that raters order; a tie is half a win for each.

    Fitted with the minorisation of Hunter 2004 (Annals of Statistics 32:384), with half a win of each response over each
    added, so that a response that wins every time has a finite strength.
    """
    count = len(matrix)
    wins = [[0.5 * (i != j) for j in range(count)] for i in range(count)]
    for i, j in combinations(range(count), 2):
        for a, b in _rated_both(matrix, i, j):
            won = 0.5 * ((a > b) - (a < b) + 1)
            wins[i][j] += won
            wins[j][i] += 1 - won
    strengths = [1.0] * count
    for _ in range(iterations):
        updated = []
        for i in range(count):
            games = sum((wins[i][j] + wins[j][i]) / (strengths[i] + strengths[j]) for j in range(count) if j != i)
            updated.append(sum(wins[i]) / games)
        scale = math.exp(_mean(math.log(s) for s in updated))
        strengths = [s / scale for s in updated]
    return [round(math.log(s), 9) + 0.0 for s in strengths]  # equal ones are equal to the last bit


def _rated_both(matrix: Matrix, i: int, j: int) -> list[tuple[float, float]]:
    """Return the ratings of two responses by the raters who saw both."""
    return [(a, b) for a, b in zip(matrix[i], matrix[j], strict=True) if a is not None and b is not None]


RULES: dict[str, Callable[[Matrix], list[float]]] = {
    "mean": mean_ratings,
    "majority": majority_votes,
    "bradley_terry": bradley_terry,
}


def merge(records: Sequence[Record]) -> Record:
    """Return records of one prompt by several raters as one: the union of responses, a column for each rater.

    A rater who rated a response twice counts with the mean.
    """
    wholes = list(dict.fromkeys(response for record in records for response in record.whole_responses))
    places = {whole: (record, place) for record in records for place, whole in enumerate(record.whole_responses)}
    parts = [record.parts[place] if record.parts else "" for record, place in map(places.__getitem__, wholes)]
    raters = list(dict.fromkeys(rater for record in records for rater in record.raters))
    ratings: dict[tuple[int, int], list[float]] = {}
    for record in records:
        for response, row in zip(record.whole_responses, record.rater_ratings, strict=True):
            for rater, rating in zip(record.raters, row, strict=True):
                if rating is not None:
                    ratings.setdefault((wholes.index(response), raters.index(rater)), []).append(rating)
    matrix: list[list[float | None]] = [
        [_mean(ratings[i, a]) if (i, a) in ratings else None for a in range(len(raters))] for i in range(len(wholes))
    ]
    confidences = [record.confidence for record in records if record.confidence is not None]
    return replace(
        records[0],
        responses=[record.responses[place] for record, place in map(places.__getitem__, wholes)],
        parts=parts if any(parts) else [],
        ratings=mean_ratings(matrix),
        raters=raters,
        rater_ratings=matrix,
        confidence=_mean(confidences) if confidences else None,
    )


def resolve(record: Record, rule: str, held_out_share: float, seed: int) -> Record:
    """Return the record with `ratings` by the rule, from its raters; those held out go into `ratings_held_out` alone.

    A record whose raters are all held out, or that has no rater left for a response, keeps no ratings.
    """
    if not record.raters:
        return record
    trained_on, held_out = halves(record, held_out_share, seed)
    return replace(
        record, ratings=rated_by(record, trained_on, rule), ratings_held_out=rated_by(record, held_out, rule)
    )


def halves(record: Record, held_out_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return columns of the raters trained on, and of those held out: a rater is on one side in all records."""
    columns: tuple[list[int], list[int]] = ([], [])
    for a, rater in enumerate(record.raters):
        columns[unit(seed, "held-out rater", rater) < held_out_share].append(a)
    return columns


def rated_by(record: Record, raters: Sequence[int], rule: str) -> list[float] | None:
    """Return (R,) ratings by the raters of some columns; None when they leave a response unrated."""
    matrix = columns_of(record, raters)
    if not raters or any(all(rating is None for rating in row) for row in matrix):
        return None
    return RULES[rule](matrix) if len(matrix) > 1 else mean_ratings(matrix)


def columns_of(record: Record, raters: Sequence[int]) -> list[list[float | None]]:
    """Return the rating matrix of the raters of some columns."""
    return [[row[a] for a in raters] for row in record.rater_ratings]


def by_split(record: Record, split_of: Callable[[str], str]) -> list[Record]:
    """Return one record for each split that the raters belong to, each with its own raters' ratings only."""
    columns: dict[str, list[int]] = {}
    for a, rater in enumerate(record.raters):
        columns.setdefault(split_of(rater), []).append(a)
    return [
        replace(record, raters=[record.raters[a] for a in own], rater_ratings=columns_of(record, own), split=split)
        for split, own in columns.items()
    ]


def clear_pairs(record: Record, rule: str, min_difference: float) -> list[tuple[int, int]]:
    """Return (better, worse) for every pair of responses that differs by enough, in the unit of `min_difference`."""
    ratings = record.ratings or []
    scale = 0.5 if rule == "majority" and len(ratings) == 2 else 1.0  # the share of votes of two is s and -s
    return [
        (i, j) if ratings[i] > ratings[j] else (j, i)
        for i, j in combinations(range(len(ratings)), 2)
        if is_clear(scale * abs(ratings[i] - ratings[j]), min_difference)
    ]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
