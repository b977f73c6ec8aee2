"""From the rows that could become a kind to those that do: how many each step takes, why, and the option behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import KINDS, SPLITS

#: What a step leaves out, and the options that change it.
STEPS = {
    "duplicates": ("they copy, nearly copy or contradict another row", "similarity"),
    "limits": ("more than a limit allows", "min_shared_prefix, max_prompts_per_user, limit"),
    "splits": ("rated for training, but their prompts are held out", "split_by"),
    "stages": ("prompts are shared out, and theirs serve another stage", "stages: shared, or stage_weights"),
    "repeated": ("their prompts are in the set already", ""),
    "mix": ("more than the weight of their source allows", "weight"),
    "leaks": ("their prompts are on both sides of a border", "on_leak"),
    "labels": ("too few prompts have good and bad answers", "validation_share"),
}


class Funnel:
    """Counts of one build, taken after each step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.possible = self._counts()
        """(3,) rows of the plan that could become each kind of `KINDS`."""
        self.left_out: dict[str, np.ndarray] = {}
        """(3,) rows that each step took out of each kind."""

    def _counts(self) -> np.ndarray:
        plan = self.plan
        if plan.becomes.any():
            return np.asarray(plan.becomes.sum(axis=0))
        return np.array([int((plan.staged.serves[plan.alive] & (1 << k) > 0).sum()) for k in range(len(KINDS))])

    def note(self, step: str) -> None:
        """Count what a step of `STEPS` took since the one before it."""
        self.left_out[step] = self.possible - sum(self.left_out.values()) - self._counts()

    def as_dict(self) -> dict[str, Any]:
        """Return `{kind: {"possible", "left_out": {step: rows}, "train", "validation", "test"}}` for the card."""
        sets = self.plan.sets()
        return {
            kind: {
                "possible": int(self.possible[k]),
                "left_out": {step: int(counts[k]) for step, counts in self.left_out.items() if counts[k]},
                **{split: len(sets[f"{kind}/{split}"]) for split in SPLITS},
            }
            for k, kind in enumerate(KINDS)
        }


def lines(uses: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines of text from `Funnel.as_dict`: for each kind its counts, and below them, indented, what was left out."""
    for kind, counts in uses.items():
        if counts["possible"]:
            sets = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
            yield f"{counts['possible']:,} rows could be {kind}; {sets}"
        for step, count in counts["left_out"].items():
            what, options = STEPS[step]
            yield f"  {count:,} left out: {what}" + (f" ({options})" if options else "")
