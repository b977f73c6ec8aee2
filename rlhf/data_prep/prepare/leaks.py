"""The leak gate: refuses prompts, and near-duplicates of them, on both sides of a border between splits or stages.

docs/data.md has the table of the borders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.base.errors import UserError
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import DataConfig
from rlhf.data_prep.prepare.splits import Prompts

#: Leaks, and rows of a leak, that a message names.
_NAMED = 3


@dataclass(frozen=True)
class Leak:
    """Rows of one set whose prompts are in another set, too."""

    keeper: str
    """Set that keeps its rows."""
    loser: str
    """Set that would lose its rows."""
    rows: np.ndarray
    """(n,) staged rows of `loser`."""
    twins: np.ndarray
    """(n,) for each of them a row of `keeper` with the same prompt, or a near-duplicate of it."""
    exact: int
    """Rows whose prompt itself, not a near-duplicate, is in `keeper`."""


def overlap(plan: Plan, prompts: Prompts, keeper: str, loser: str) -> Leak:
    """Return the rows of `loser` whose prompt, or a near-duplicate of it, is in `keeper`."""
    sets = plan.sets()
    a, b = sets[keeper], sets[loser]
    near, order = np.unique(prompts.near[a], return_index=True)
    leaked = b[np.isin(prompts.near[b], near)]
    twins = a[order[np.searchsorted(near, prompts.near[leaked])]] if len(leaked) else leaked
    hashes = plan.staged.hashes["prompt"]
    return Leak(keeper, loser, leaked, twins, int(np.isin(hashes[leaked], hashes[a]).sum()))


def forbidden_pairs(names: list[str], config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield (set that keeps its rows, set that would lose them) for every border that must not be crossed."""
    for one, other in combinations(names, 2):
        (kind, split), (other_kind, other_split) = one.split("/"), other.split("/")
        if split == other_split and (split != "train" or config.stages == "shared"):
            continue
        # Where splits are made of raters, held-out comparisons are of the same prompts on purpose.
        compared = {s for k, s in ((kind, split), (other_kind, other_split)) if k == "comparisons" and s != "train"}
        if config.split_by == "rater" and compared:
            continue
        # test keeps its rows against validation, and both against train
        yield (one, other) if _worth(split) >= _worth(other_split) else (other, one)


def _worth(split: str) -> int:
    return ("train", "validation", "test").index(split)


def gate(plan: Plan, prompts: Prompts, config: DataConfig, report: Path) -> dict[str, Any]:
    """Check every border.

    Args:
        report: file for all leaked rows when the gate refuses.

    Returns:
        `{"A / B": {"exact", "near"}}` for every pair of sets that share prompts, those that may included.

    Raises:
        UserError: with `on_leak: refuse`, the first rows and the file with all of them.
    """
    _check_raters(plan, config)
    names = [name for name, rows in plan.sets().items() if len(rows)]
    forbidden = list(forbidden_pairs(names, config))
    leaks = [leak for pair in forbidden if len((leak := overlap(plan, prompts, *pair)).rows)]
    if leaks and config.on_leak == "refuse":
        raise UserError(_refusal(plan, leaks, report))
    for leak in leaks if config.on_leak == "drop" else ():
        plan.take_out(leak.rows, leak.loser.split("/")[0], "leaks", f"its prompt, or nearly, is in {leak.keeper}")
    counts = {}
    for one, other in combinations(names, 2):
        leak = overlap(plan, prompts, one, other)
        if len(leak.rows):
            near = len(leak.rows) - leak.exact
            allowed = (one, other) not in forbidden and (other, one) not in forbidden
            counts[f"{one} / {other}"] = {"exact": leak.exact, "near": near, "allowed": allowed}
    return {"pairs_checked": len(forbidden), "overlaps": counts}


def _check_raters(plan: Plan, config: DataConfig) -> None:
    """Raise `UserError` where splits are made of raters and a rater is in two of them."""
    if config.split_by != "rater":
        return
    splits: dict[str, str] = {}
    for name, rows in plan.sets().items():
        kind, split = name.split("/")
        for record in plan.staged.records(rows) if kind == "comparisons" else ():
            for rater in record.raters if record.split else ():
                if splits.setdefault(rater, split) != split:
                    raise UserError(f"rater '{rater}' is in {splits[rater]} and in {split}")


def _refusal(plan: Plan, leaks: list[Leak], report: Path) -> str:
    with report.open("w", encoding="utf-8") as file:
        for leak in leaks:
            for row, twin in zip(leak.rows.tolist(), leak.twins.tolist(), strict=True):
                record, other = plan.staged.record(row), plan.staged.record(twin)
                line = {
                    leak.loser: record.place, leak.keeper: other.place, "prompt": record.last_turn, "twin": other.last_turn,
                }  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    first = leaks[0]
    pairs = [
        f"{plan.staged.record(int(row)).place} = {plan.staged.record(int(twin)).place}"
        for row, twin in zip(first.rows[:_NAMED], first.twins[:_NAMED], strict=True)
    ]
    borders = ", ".join(f"{leak.loser} and {leak.keeper}: {len(leak.rows):,}" for leak in leaks[:_NAMED])
    return (
        f"the leak gate found prompts on both sides of {len(leaks)} borders ({borders}); first: {'; '.join(pairs)}; all in "
        f"{report}. Set on_leak: drop to take them out of the training side, or allow to keep them"
    )
