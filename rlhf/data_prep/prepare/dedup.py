"""Near-duplicates by MinHash and locality-sensitive hashing, in memory that does not grow with the texts.

A text is the set of its 6-byte shingles (UTF-8): six Latin letters, two Chinese characters; words need no borders.
rensa computes the signatures (`benchmarks/dedup.py` has the comparison with datasketch). Signatures are cut into bands, and
only the bands' hashes are kept, in a file on disk. Texts that agree in a band are candidates: one band is sorted at a time,
and every candidate pair is compared by its exact Jaccard similarity, so that no near-duplicate is a false one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rensa import RMinHash

from rlhf.run.progress import progress

SHINGLE_BYTES = 6
NUM_PERMUTATIONS = 128
#: Least probability to find a pair that is just at the similarity of the recipe.
RECALL = 0.99
_SEED = 42
_BATCH = 2000
#: More rows than this take long enough for a progress bar.
_MANY_ROWS = 20_000

Texts = Callable[[int, int], Sequence[tuple[str, ...]]]
"""Function of (start, stop) to the parts of each text in that range. Every part of a pair has to be similar."""


def band_rows(similarity: float) -> tuple[int, int]:
    """Return (bands, rows a band), the most selective that find a pair of this similarity with probability `RECALL`.

    A pair of Jaccard similarity s agrees in one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    for rows in range(NUM_PERMUTATIONS, 0, -1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** bands >= RECALL:
            return bands, rows
    return NUM_PERMUTATIONS, 1


def shingles(text: str) -> np.ndarray:
    """Return (n,) uint64, every run of `SHINGLE_BYTES` bytes, repeats included; a shorter text is one shingle."""
    raw = text.encode("utf-8", "surrogatepass")
    count = max(1, len(raw) - SHINGLE_BYTES + 1)
    padded = np.frombuffer(raw + b"\0" * 8, dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 8)[:count]
    return np.ascontiguousarray(windows).view("<u8").ravel() & np.uint64((1 << 8 * SHINGLE_BYTES) - 1)


def jaccard(one: str, other: str) -> float:
    """Return shared shingles / all shingles of two texts."""
    if one == other:
        return 1.0
    a, b = set(shingles(one).tolist()), set(shingles(other).tolist())
    return len(a & b) / len(a | b)


def near_duplicates(texts: Texts, count: int, similarity: float, scratch: Path) -> np.ndarray:
    """Return for each text the first one of its group; chains of near-duplicates join texts to groups.

    Args:
        texts: function that reads texts by range, called again for those that have to be compared.
        similarity: Jaccard similarity from which two texts are near-duplicates; 1 or more: only equal texts are.
        scratch: folder for the file of band hashes, `bands * count * 8` bytes; it is removed at the end.

    Returns:
        (count,) int64; `result[i] <= i`, and equal to i for the first of a group.
    """
    groups = Groups(count)
    if count < 2:
        return groups.firsts()
    bands, rows = band_rows(min(similarity, 1.0))
    file = scratch / "bands.u64"
    try:
        hashes = np.memmap(file, dtype=np.uint64, mode="w+", shape=(bands, count))
        starts = range(0, count, _BATCH)
        for start in progress(starts, "near-duplicates", unit="batch") if count > _MANY_ROWS else starts:
            stop = min(start + _BATCH, count)
            hashes[:, start:stop] = _band_hashes(texts(start, stop), bands, rows)
        for band in range(bands):
            _join_candidates(np.asarray(hashes[band]), groups, texts, similarity)
        del hashes
    finally:
        file.unlink(missing_ok=True)
    return groups.firsts()


def _band_hashes(texts: Sequence[tuple[str, ...]], bands: int, rows: int) -> np.ndarray:
    """Return (bands, texts) uint64."""
    sets = [shingles("\x1f".join(parts)) for parts in texts]
    offsets = np.zeros(len(sets) + 1, dtype=np.uint64)
    np.cumsum([len(s) for s in sets], out=offsets[1:])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, NUM_PERMUTATIONS, _SEED)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64)[:, : bands * rows].reshape(len(sets), bands, rows)
    hashed = np.zeros((len(sets), bands), dtype=np.uint64)
    for column in range(rows):  # FNV-like, in 64 bits with wrap-around; equal bands stay equal, others hardly ever meet
        hashed = (hashed ^ signatures[:, :, column]) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    return hashed.T


def _join_candidates(hashes: np.ndarray, groups: Groups, texts: Texts, similarity: float) -> None:
    """Join the similar ones among texts that agree in a band.

    A run of k texts costs at most 2k comparisons: of each text with the first, and with its neighbour. Each band has other
    runs, so a pair that is missed in one is met in another.
    """
    order = np.argsort(hashes, kind="stable")  # equal ones stay in the order of the rows
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        members = order[start : start + length].tolist()
        for neighbour, member in pairwise(members):
            for other in dict.fromkeys((members[0], neighbour)):
                if groups.first(other) != groups.first(member) and _similar(texts, other, member, similarity):
                    groups.join(other, member)


def _similar(texts: Texts, one: int, other: int, similarity: float) -> bool:
    (parts,), (other_parts,) = texts(one, one + 1), texts(other, other + 1)
    return all(jaccard(a, b) >= similarity for a, b in zip(parts, other_parts, strict=True))


class Groups:
    """Disjoint sets of row numbers, each named by its smallest member."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count, dtype=np.int64)

    def first(self, row: int) -> int:
        """Return the smallest member of a row's set."""
        parent = self.parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return int(row)

    def join(self, one: int, other: int) -> None:
        """Make one set of the sets of two rows."""
        low, high = sorted((self.first(one), self.first(other)))
        self.parent[high] = low

    def firsts(self) -> np.ndarray:
        """Return (N,) the smallest member of the set of every row."""
        parent = self.parent
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
        return parent


def first_of_equal(values: np.ndarray) -> np.ndarray:
    """Return (N,) int64, for each value the row in which it occurs first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]
