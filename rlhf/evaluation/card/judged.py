"""Responses with people's ratings as flat arrays, and the pairs that they form.

Legend: M responses of all rankings, one ranking after the other; n pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from rlhf.base.intervals import Array
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.ratings import is_clear


@dataclass(frozen=True, kw_only=True)
class Judged:
    """M responses with ratings, ranking after ranking."""

    ranking: Array
    """(M,) int: number of each response's ranking; its responses are neighbours."""
    prompt: Array
    """(M,) int: number of each response's distinct prompt; several rankings may share one."""
    ratings: Array
    """(M,) by the raters whose verdicts a model is trained on; higher is better."""
    held_out: Array | None
    """(M,) by other raters, NaN where there are none; None without any."""
    lengths: Array
    """(M,) tokens of each response."""
    texts: Sequence[str]
    """(M,) the responses."""
    seen: Array | None
    """(M,) bool: the prompt is in the training comparisons, too; None where these are not known."""
    columns: Mapping[str, Sequence[str]]
    """Columns (M,) of the data by which accuracy is listed."""


def judge_rows(rows: Dataset, seen: Set[str] | None, columns: Sequence[str]) -> Judged:
    """Return tokenised rankings as flat arrays.

    Args:
        seen: keys of the training comparisons' prompts; None where these are not known.
        columns: names of columns to keep; names that the data lacks are ignored.
    """
    table = rows.remove_columns("input_ids").to_list()
    sizes = [len(row["lengths"]) for row in table]
    keys = [prompt_key(row["prompt"]) for row in table]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}

    def flat(name: str) -> Array:
        return np.array([value for row in table for value in row[name]], dtype=float)

    def repeated(values: Sequence[Any]) -> Array:
        return np.repeat(np.array(values), sizes)

    others = [row.get("ratings_held_out") or [np.nan] * size for row, size in zip(table, sizes, strict=True)]
    held_out = np.array([value for row in others for value in row], dtype=float)
    return Judged(
        ranking=repeated(range(len(table))),
        prompt=repeated([number[key] for key in keys]),
        ratings=flat("ratings"),
        held_out=None if np.isnan(held_out).all() else held_out,
        lengths=flat("lengths").astype(int),
        texts=[response[-1]["content"] for row in table for response in row["responses"]],
        seen=None if seen is None else repeated([key in seen for key in keys]),
        columns={
            name: list(repeated([str(row[name]) for row in table])) for name in columns if name in rows.column_names
        },
    )


@dataclass(frozen=True)
class RatedPairs:
    """n pairs of responses to one prompt, ordered by people's ratings."""

    better: Array
    """(n,) int: the response with the higher rating."""
    worse: Array
    """(n,) int: the other response."""
    difference: Array
    """(n,) above 0: difference of their ratings."""
    prompt: Array
    """(n,) int: the distinct prompt that both answer."""

    def __len__(self) -> int:
        return len(self.better)

    def where(self, mask: Array) -> RatedPairs:
        """Return the pairs at which `mask` (n,) bool is True."""
        return RatedPairs(self.better[mask], self.worse[mask], self.difference[mask], self.prompt[mask])

    def correct(self, scores: Array) -> Array:
        """Return (n,) 1 where scores (M,) order a pair as people do, 0 where they reverse it, 0.5 where they tie."""
        return (np.sign(scores[self.better] - scores[self.worse]) + 1) / 2


def rated_pairs(ratings: Array, judged: Judged, min_difference: float = 0.0) -> RatedPairs:
    """Return the pairs of each ranking whose ratings (M,) differ, and by at least `min_difference`."""
    better, worse = [np.empty(0, int)], [np.empty(0, int)]
    starts = np.flatnonzero(np.diff(judged.ranking)) + 1
    for rows in np.split(np.arange(len(ratings)), starts):
        gap = ratings[rows][:, None] - ratings[rows][None, :]
        i, j = np.nonzero(is_clear(gap, min_difference))
        better.append(rows[i])
        worse.append(rows[j])
    first, second = np.concatenate(better), np.concatenate(worse)
    return RatedPairs(first, second, ratings[first] - ratings[second], judged.prompt[first])
