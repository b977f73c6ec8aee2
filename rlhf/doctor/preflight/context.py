"""What the checks of the preflight look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import (
    SFTConfig,
    StageConfig,
)
from rlhf.data_prep.load import Loaded
from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.data import check_leaks, check_registered, parents_data
from rlhf.doctor.preflight.models import check_probe
from rlhf.doctor.preflight.text import check_template, check_tokenizers
from rlhf.doctor.probe import read_probe
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.registry import Artifact

#: Rows of data among which a few are chosen.
_AMONG = 64


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the preflight of every stage stands on."""

    config: StageConfig
    compute: Compute
    folder: Path
    """Of the run; small files are written there and removed again."""
    registry: Path
    """Root of the registry."""
    parents: Sequence[Artifact]
    tokenizer: PreTrainedTokenizerBase
    training: Mapping[str, Loaded]
    """Name -> rows that this stage trains on."""
    validation: Loaded

    @property
    def pad_token_id(self) -> int:
        """Token id of padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def quantized(self) -> bool:
        """Whether this run or a parent's holds its base in fewer bits: their outputs then differ by more than rounding."""
        return any(
            held != "none"
            for held in (self.config.quantization, *(p.manifest.config["quantization"] for p in self.parents))
        )


def few(lengths: Sequence[int], count: int) -> list[int]:
    """Numbers of a few short rows of different lengths: enough to see what is wrong, and quick."""
    order = sorted(range(min(len(lengths), _AMONG)), key=lambda i: lengths[i])
    short = order[: max(count, len(order) // 2)]
    return short[:: max(1, len(short) // count)][:count]


def check_data(ground: Ground, model: PreTrainedModel, *, by: str) -> list[Check]:
    """The checks of tokenizer, template and data.

    Args:
        by: what must not be trained on and judged: `prompt` (in any stage), or `row` (in this one).
    """
    data = parents_data(ground.parents)
    training = dict(ground.training)
    if by == "prompt":
        for reference, sets in data.items():
            if not isinstance(sets, str):
                training[f"the training rows of {reference}"] = sets["train"]
    # The SFT stage's only parent is the judge of its checkpoints, which reads texts through a tokenizer of its own.
    sharing = [] if isinstance(ground.config, SFTConfig) else ground.parents
    prompts = (row["prompt"] for row in next(iter(ground.training.values())).rows)
    checks = [
        check_tokenizers(ground.tokenizer, sharing, int(cast(Any, model.get_input_embeddings()).weight.shape[0])),
        check_template(ground.tokenizer, prompts),
        check_leaks(ground.config.dataset, ground.validation, training, by=by),
    ]
    return checks + ([check_registered(ground.parents, data)] if data else [])


def check_policy(ground: Ground, policy: PreTrainedModel) -> list[Check]:
    """That the SFT policy, merged and plain, answers its probe as it did when it was trained; nothing without a probe."""
    (artifact,) = [parent for parent in ground.parents if parent.manifest.stage == "sft"]
    probe = read_probe(artifact)
    if probe is None or ground.quantized:
        return []
    now = likelihoods(ground, policy, probe.rows, probe.prompt_lengths)
    return [check_probe(artifact.reference, now, probe.values, probe.dtype, ground.compute)]


def likelihoods(
    ground: Ground, policy: PreTrainedModel, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> Tensor:
    """(n,) mean log-likelihood of the answers, nats a token, of token rows (prompt and answer)."""
    return mean_logprobs(
        policy,
        rows,
        prompt_lengths,
        torch.arange(len(rows)),
        pad_token_id=ground.pad_token_id,
        compute=ground.compute,
        batch_size=len(rows),
    )
