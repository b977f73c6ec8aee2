"""Mixing of sources: training rows in the proportion of the sources' weights. Rows are left out, never repeated."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.data_prep.hashes import units
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import KINDS, DataConfig


def mix(plan: Plan, config: DataConfig) -> dict[str, Any]:
    """Thin the training rows of each kind to the weights; a source without one has weight 1. Held-out rows all stay.

    The largest mix in these proportions is taken: all of one source, and of the others the rows of lowest hash.

    Returns:
        `{kind: {source: rows}}`, for the card; empty when no source has a weight.
    """
    if all(source.weight is None for source in config.sources):
        return {}
    weights = np.array([1.0 if source.weight is None else source.weight for source in config.sources])
    result: dict[str, Any] = {}
    for kind in KINDS:
        rows = plan.sets()[f"{kind}/train"]
        source = plan.staged.source[rows]
        counts = np.bincount(source, minlength=len(weights))
        present = counts > 0
        if not present.any():
            continue
        unit = (counts[present] / weights[present]).min()
        most = np.where(present, np.floor(unit * weights + 1e-9), 0).astype(np.int64)
        for number in np.flatnonzero(counts > most):
            own = rows[source == number]
            order = np.argsort(units(plan.staged.hashes["content"][own], config.seed, "mix"), kind="stable")
            surplus = np.sort(own[order[most[number] :]])
            plan.take_out(surplus, kind, "mix", f"more rows of {config.sources[number].name} than its weight allows")
        result[kind] = {str(s.name): int(n) for s, n in zip(config.sources, most, strict=True)}
    return result
