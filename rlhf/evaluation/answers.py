"""Answers of policies beside their reference, measured token by token, and scored.

Legend: P prompts, S samples a prompt, M = P S answers, prompt after prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.intervals import Array
from rlhf.config import RunConfig
from rlhf.evaluation.candidates import Candidate
from rlhf.models.base import load_base, load_policy
from rlhf.models.compute import Compute
from rlhf.models.responses import Answers, sample_in_batches
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.sampling import Sampled
from rlhf.models.separate import FinishedPair
from rlhf.models.sequences import Sequences, length_sorted_batches, prompt_batches
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.rollout import SamplingOptions, respond
from rlhf.registry import Artifact
from rlhf.reward.sources import Responses, Source
from rlhf.run import checkpoint
from rlhf.run.progress import Progress


@contextmanager
def opened(
    candidate: Candidate, base: PreTrainedModel, reference: Artifact, config: RunConfig, compute: Compute
) -> Iterator[RoleModels]:
    """Open a policy beside its reference.

    Args:
        base: the reference as a plain model; unchanged when the context is left.

    Raises:
        UserError: the policy's files are broken or made for another model.
    """
    if candidate.folder is not None:
        checkpoint.verify(candidate.folder)  # a snapshot; artefacts have been verified
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
) -> Answers:
    """Sample S answers of the policy to each of P prompts, with the same random numbers for all policies.

    Args:
        prompts: token ids.
        batch_size: answers a forward pass of the measurement.
        measure: fill `Answers.sums`: KL to the reference and entropy, both at the sampling temperature.
    """

    def draw(batch: Sequence[Sequence[int]], first: int) -> Sampled:
        return respond(models, batch, options, reference=False, seed=seed * 1_000_003 + first)[1]

    with Progress(len(prompts) * samples, "answers", unit="answer") as bar:
        answers = sample_in_batches(tokenizer, prompts, draw, samples=samples, on_batch=bar.update)
    if not measure:
        return answers
    sequences = answers.sequences(prompts, options.pad_token_id, models.compute.device)
    return dataclasses.replace(answers, sums=_token_sums(models, sequences, options.temperature, batch_size))


@torch.no_grad()
def _token_sums(
    models: RoleModels, sequences: Sequences, temperature: float, batch_size: int
) -> dict[str, list[float]]:
    """Return `Answers.sums` of M sequences."""
    names = ("kl", "kl_k3", "kl_full", "entropy")
    sums = {name: torch.zeros(len(sequences), dtype=torch.float64) for name in names}
    for rows in length_sorted_batches(sequences.lengths, batch_size):
        batch = sequences.select(rows)
        policy, reference, entropy, full = forward.compared_logprobs(models, batch, temperature)
        planes = (F.kl_k1(policy, reference), F.kl_k3(policy, reference), full, entropy)
        for name, plane in zip(names, planes, strict=True):
            sums[name][rows.cpu()] = F.masked_sum(plane, batch.mask, dim=1).double().cpu()
    return {name: values.tolist() for name, values in sums.items()}


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
    """Return the scores (M,) of answers by a reward or an independent judge.

    Args:
        prompts, rows: token ids of the P prompts, and the data rows that they came from.
    """
    responses = Responses(
        sequences=answers.sequences(prompts, pad_token_id, device),
        batches=prompt_batches(torch.from_numpy(answers.prompt).to(device), batch_size),
        texts=answers.texts,
        rows=[rows[i] for i in answers.prompt],
    )
    return source(responses).double().cpu().numpy()
