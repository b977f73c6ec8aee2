"""Answers of a policy to held-out prompts, and what is measured on their tokens.

Legend: P prompts, S samples a prompt, M = P S answers, prompt after prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.intervals import Array
from rlhf.config import RunConfig
from rlhf.evaluation.candidates import Candidate
from rlhf.models.base import load_base, load_policy
from rlhf.models.compute import Compute
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.sampling import SAMPLED_AT_ONCE
from rlhf.models.separate import FinishedPair
from rlhf.models.sequences import Sequences, concatenate, length_sorted_batches, pad, prompt_batches
from rlhf.models.tokenization import decode_response
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.rollout import SamplingOptions, respond
from rlhf.registry import Artifact
from rlhf.reward.sources import Responses, Source
from rlhf.run.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of one policy: plain data, so that they can be kept in a file."""

    samples: int
    """S"""
    texts: list[str]
    """(M,) without special tokens."""
    tokens: list[list[int]]
    """(M,) token ids, the stop token included."""
    stopped: list[bool]
    """(M,) the answer ended in a stop token."""
    sums: dict[str, list[float]]
    """Sums over the tokens of each answer, (M,) nats: `kl` (k1), `kl_k3`, `kl_full`, `entropy`; empty if not measured."""

    @property
    def prompt(self) -> Array:
        """(M,) int64: which prompt each one answers."""
        return np.arange(len(self.texts)) // self.samples

    @property
    def lengths(self) -> Array:
        """(M,) tokens, the stop token included."""
        return np.array([len(tokens) for tokens in self.tokens])


@contextmanager
def opened(
    candidate: Candidate, base: PreTrainedModel, reference: Artifact, config: RunConfig, compute: Compute
) -> Iterator[RoleModels]:
    """The policy beside the reference.

    Args:
        base: the reference as a plain model; it is as before when the context is left.

    Raises:
        UserError: the policy's files are broken or made for another model.
    """
    if candidate.sft is not None and candidate.sft.hash == reference.hash:
        models = SharedModels.finished(base, candidate.folder, compute)
        try:
            yield models
        finally:
            models.release()
        return
    if candidate.sft is None:
        policy = load_base(str(candidate.folder), config, compute)
    else:
        policy = load_policy(candidate.sft, config, compute, candidate.folder)
    yield FinishedPair(policy, base, compute)


@torch.no_grad()
def sample_answers(
    models: RoleModels,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    samples: int,
    options: SamplingOptions,
    *,
    batch_size: int,
    seed: int,
    measure: bool = True,
    label: str = "answers",
) -> Answers:
    """S answers of the policy to each of P prompts. All policies draw with the same random numbers.

    Args:
        prompts: token ids.
        batch_size: responses a forward pass.
        measure: also KL to the reference and entropy, both at the sampling temperature.
        label: in front of the progress bar.
    """
    repeated = [ids for ids in prompts for _ in range(samples)]
    parts = []
    with Progress(len(repeated), label, unit="answer") as bar:
        for first in range(0, len(repeated), SAMPLED_AT_ONCE):
            chunk = repeated[first : first + SAMPLED_AT_ONCE]
            parts.append(respond(models, chunk, options, reference=False, seed=seed * 1_000_003 + first))
            bar.update(len(chunk))
    sequences = concatenate([part for part, _ in parts], options.pad_token_id)
    tokens = [row[mask].tolist() for row, mask in zip(sequences.responses, sequences.mask, strict=True)]
    sums = _token_sums(models, sequences, options.temperature, batch_size) if measure else {}
    return Answers(
        samples=samples,
        texts=[decode_response(tokenizer, row) for row in tokens],
        tokens=tokens,
        stopped=torch.cat([sampled.stopped for _, sampled in parts]).tolist(),
        sums={name: values.tolist() for name, values in sums.items()},
    )


def _token_sums(models: RoleModels, sequences: Sequences, temperature: float, batch_size: int) -> dict[str, Tensor]:
    """Sums over the tokens of each answer, (M,) float64."""
    names = ("kl", "kl_k3", "kl_full", "entropy")
    sums = {name: torch.zeros(len(sequences), dtype=torch.float64) for name in names}
    for rows in length_sorted_batches(sequences.lengths, batch_size):
        batch = sequences.select(rows)
        policy, reference, entropy, full = forward.compared_logprobs(models, batch, temperature)
        planes = (F.kl_k1(policy, reference), F.kl_k3(policy, reference), full, entropy)
        for name, plane in zip(names, planes, strict=True):
            sums[name][rows.cpu()] = F.masked_sum(plane, batch.mask, dim=1).double().cpu()
    return sums


def score_answers(
    source: Source,
    answers: Answers,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    batch_size: int,
    device: torch.device,
) -> Array:
    """(M,) scores by a reward or an independent judge.

    Args:
        prompts, rows: token ids of the P prompts, and the data rows that they came from.
    """
    number = answers.prompt
    ids, mask = pad([prompts[i] for i in number], pad_token_id, side="left")
    responses, response_mask = pad(answers.tokens, pad_token_id, side="right")
    sequences = Sequences(prompts=ids, prompt_mask=mask, responses=responses, mask=response_mask).to(device)
    batches = prompt_batches(torch.from_numpy(number).to(device), batch_size)
    given = Responses(sequences=sequences, batches=batches, texts=answers.texts, rows=[rows[i] for i in number])
    return source(given).double().cpu().numpy()
