"""The inputs of a preflight, and the checks that several stages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import SFTConfig, StageConfig
from rlhf.data_prep.load import Loaded
from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.data import check_fingerprints, check_leaks
from rlhf.doctor.preflight.models import check_probe
from rlhf.doctor.preflight.text import check_template, check_tokenizers
from rlhf.doctor.probe import read_probe
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.registry import Artifact

#: Rows at the head of the data among which short ones are picked.
_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class PreflightContext:
    """Inputs of every stage's preflight."""

    config: StageConfig
    compute: Compute
    folder: Path
    """Folder of the run; small files are written there and removed again."""
    registry: Path
    """Root of the registry."""
    parents: Sequence[Artifact]
    parents_data: Mapping[str, dict[str, Loaded] | str]
    """Their data sets, as `load_parents_data` returns them."""
    tokenizer: PreTrainedTokenizerBase
    training: Mapping[str, Loaded]
    """Training sets of this stage by name."""
    validation: Loaded

    @property
    def pad_token_id(self) -> int:
        """Padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def quantized(self) -> bool:
        """True if this run or a parent's holds its base in fewer bits: outputs then differ by more than rounding."""
        parents = (parent.manifest.config["quantization"] for parent in self.parents)
        return any(kind != "none" for kind in (self.config.quantization, *parents))


def pick_short_rows(lengths: Sequence[int], count: int) -> list[int]:
    """Return indices of a few short rows of different lengths, shortest first."""
    order = sorted(range(min(len(lengths), _CANDIDATES)), key=lambda i: lengths[i])
    short = order[: max(count, len(order) // 2)]
    return short[:: max(1, len(short) // count)][:count]


def check_data(context: PreflightContext, model: PreTrainedModel, *, by: str) -> list[Check]:
    """Return the checks of tokenizer, template and data.

    Args:
        by: unit that must not be both trained on and judged: `prompt` (in any stage), or `row` (in this one).
    """
    data = context.parents_data
    training = dict(context.training)
    if by == "prompt":
        for reference, sets in data.items():
            if not isinstance(sets, str):
                training[f"the training rows of {reference}"] = sets["train"]
    # The SFT stage's only parent is the judge of its checkpoints, which reads texts through a tokenizer of its own.
    sharing = [] if isinstance(context.config, SFTConfig) else context.parents
    prompts = (row["prompt"] for row in next(iter(context.training.values())).rows)
    checks = [
        check_tokenizers(context.tokenizer, sharing, int(cast(Any, model.get_input_embeddings()).weight.shape[0])),
        check_template(context.tokenizer, prompts),
        check_leaks(context.config.dataset, context.validation, training, by=by),
    ]
    return checks + ([check_fingerprints(context.parents, data)] if data else [])


def check_policy(context: PreflightContext, policy: PreTrainedModel) -> list[Check]:
    """Check that the SFT policy, merged and plain, scores its probe as it did when it was trained; none without a probe."""
    (artifact,) = [parent for parent in context.parents if parent.manifest.stage == "sft"]
    probe = read_probe(artifact)
    if probe is None or context.quantized:
        return []
    now = likelihoods(context, policy, probe.rows, probe.prompt_lengths)
    return [check_probe(artifact.reference, now, probe.values, probe.dtype, context.compute)]


def likelihoods(
    context: PreflightContext, policy: PreTrainedModel, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> Tensor:
    """Return the (n,) mean log-likelihoods of answers, nats a token, of token rows (prompt and answer)."""
    return mean_logprobs(
        policy,
        rows,
        prompt_lengths,
        torch.arange(len(rows)),
        pad_token_id=context.pad_token_id,
        compute=context.compute,
        batch_size=len(rows),
    )
