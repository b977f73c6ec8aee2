"""A few token rows and the trained model's outputs on them, stored with an artefact to test later loads.

An adapter on another base, merged twice or not at all, a lost head, another type or attention code: each loads without an
error and changes the outputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.base.reading import fit
from rlhf.registry import Artifact

FILE = "probe.json"
#: Rows that are stored with an artefact.
ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Outputs of a model when it was trained."""

    rows: list[list[int]]
    """Tokens of prompt and answer."""
    prompt_lengths: list[int]
    """Length of the prompt in each row, in tokens; empty for reward models."""
    values: list[float]
    """Policy: mean log-likelihood of each answer, nats a token. Reward model: raw scores."""
    dtype: str
    """Compute type, e.g. `bfloat16`."""

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[int]], values: Tensor, dtype: torch.dtype, prompt_lengths: Sequence[int] = ()
    ) -> Probe:
        """Make a probe of the first few rows."""
        return cls(
            rows=[list(row) for row in rows[:ROWS]],
            prompt_lengths=list(prompt_lengths[:ROWS]),
            values=[float(value) for value in values[:ROWS]],
            dtype=str(dtype).removeprefix("torch."),
        )

    def save(self, folder: Path) -> None:
        """Write the probe beside the weights."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_probe(artifact: Artifact) -> Probe | None:
    """Return the probe of an artefact whose files were verified; None if it was registered without one."""
    if FILE not in artifact.manifest.files:
        return None
    content = read_object(artifact.path / FILE)
    if problems := fit(content, Probe)[1]:
        raise UserError(f"{artifact.path / FILE} is no probe of this package: {problems[0]}")
    return Probe(**content)
