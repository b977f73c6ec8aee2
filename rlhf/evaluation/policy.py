"""Answers of a policy to held-out prompts, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.functions import GoldFunction
from rlhf.base.text import distinct_n
from rlhf.models.roles import RoleModels
from rlhf.models.sampling import SAMPLED_AT_ONCE
from rlhf.models.sequences import concatenate, length_sorted_batches
from rlhf.models.tokenization import decode_response
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.rollout import SamplingOptions, respond
from rlhf.reward.sources import Responses, Reward

#: VADER calls a text positive above .05 and negative below -.05 (Hutto & Gilbert, ICWSM 2014).
GOLD_THRESHOLD = 0.05


@dataclass(frozen=True)
class Answers:
    """Sampled answers and their figures."""

    texts: list[str]
    scores: Tensor
    """(B,) scores of the reward, without penalties."""
    figures: dict[str, float | None]


@torch.no_grad()
def evaluate_policy(
    models: RoleModels,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    options: SamplingOptions,
    reward: Reward,
    *,
    reference: bool,
    batch_size: int,
    batch_tokens: int | None = None,
    gold: GoldFunction | None,
    seed: int,
) -> Answers:
    """One answer to each prompt from the policy (or the SFT reference), with the same random numbers for both.

    Args:
        prompts, rows: token ids of the prompts, and the data rows that they came from.
        batch_size, batch_tokens: responses a scoring pass, and tokens (responses times the longest of them).
    """
    parts = [
        respond(models, prompts[i : i + SAMPLED_AT_ONCE], options, reference=reference, seed=seed + i)
        for i in range(0, len(prompts), SAMPLED_AT_ONCE)
    ]
    sequences = concatenate([part for part, _ in parts], options.pad_token_id)
    stopped = torch.cat([sampled.stopped for _, sampled in parts])
    batches = length_sorted_batches(sequences.lengths, batch_size, batch_tokens)
    texts = [
        decode_response(tokenizer, row[mask].tolist())
        for row, mask in zip(sequences.responses, sequences.mask, strict=True)
    ]
    scores, _ = reward(Responses(sequences=sequences, batches=batches, texts=texts, rows=rows))
    figures: dict[str, float | None] = {
        "score": float(scores.mean()),
        "reward_positive": float((scores > 0).float().mean()),
        "distinct2": distinct_n(texts, 2),
        "length": float(sequences.mask.sum(dim=1).float().mean()),
        "stop_rate": float(stopped.float().mean()),
        "gold_positive": None,
        "gold_negative": None,
    }
    if gold is not None:
        judged = torch.tensor(gold(texts))
        figures["gold_positive"] = float((judged > GOLD_THRESHOLD).float().mean())
        figures["gold_negative"] = float((judged < -GOLD_THRESHOLD).float().mean())
    if reference:
        figures["kl"] = 0.0
    else:
        total = 0.0
        for numbers in batches:
            batch = sequences.select(numbers)
            new = forward.token_logprobs(models, "policy", batch, options.temperature)
            old = forward.token_logprobs(models, "reference", batch, options.temperature)
            total += float(F.masked_sum(F.kl_k1(new, old), batch.mask))
        figures["kl"] = total / len(sequences)
    return Answers(texts=texts, scores=scores.cpu(), figures=figures)
