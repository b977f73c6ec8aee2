"""Choices by hash, which are the same on every machine: of texts one by one, and of arrays of hashes."""

from __future__ import annotations

import hashlib

import numpy as np


def sha256(*parts: object) -> str:
    """Return the sha256 of the parts as text, in hexadecimal digits."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def unit(*parts: object) -> float:
    """Return a hash of the parts in [0, 1); it has 52 bits, which a float holds exactly."""
    return int(sha256(*parts)[:13], 16) / 16**13


def hash64(*parts: str) -> int:
    """Return 64 bits, never 0. Two of a million texts collide once in 37 million data sets."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


def units(values: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Return (N,) float64 in [0, 1), a hash of (seed, purpose, value) for each value (splitmix64)."""
    with np.errstate(over="ignore"):
        x = values ^ np.uint64(hash64(str(seed), purpose))
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
