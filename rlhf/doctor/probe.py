"""A few token rows and what the trained model said to them, kept with an artefact: whoever loads it can ask again.

An adapter on another base, merged twice or not at all, a lost head, another type or attention code: each loads without a
word, and answers differently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.base.json_files import read_object
from rlhf.registry import Artifact

FILE = "probe.json"
#: Rows that are kept with an artefact.
ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a model said when it was trained."""

    rows: list[list[int]]
    """Token ids of prompt and answer."""
    prompt_lengths: list[int]
    """Tokens of the prompt in each row; empty where the answer's border does not matter."""
    values: list[float]
    """Of a policy: mean log-likelihood of each answer, nats a token. Of a reward model: raw scores."""
    dtype: str
    """The compute type, e.g. `bfloat16`."""

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[int]], values: Tensor, dtype: torch.dtype, prompt_lengths: Sequence[int] = ()
    ) -> Probe:
        """A probe of the first few rows."""
        return cls(
            rows=[list(row) for row in rows[:ROWS]],
            prompt_lengths=list(prompt_lengths[:ROWS]),
            values=[float(value) for value in values[:ROWS]],
            dtype=str(dtype).removeprefix("torch."),
        )

    def save(self, folder: Path) -> None:
        """Writes it beside the weights."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_probe(artifact: Artifact) -> Probe | None:
    """The probe of an artefact, whose files are verified when it is read; None where it was registered without one."""
    if FILE not in artifact.manifest.files:
        return None
    return Probe(**read_object(artifact.path / FILE))
