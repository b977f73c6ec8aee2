"""Evaluation of a PPO run's policy on held-out prompts, before and after the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.functions import GoldFunction
from rlhf.base.text import distinct_n
from rlhf.models.responses import Answers, sample_in_batches
from rlhf.models.roles import RoleModels
from rlhf.models.sampling import SAMPLED_AT_ONCE, Sampled, sampled_together
from rlhf.models.sequences import Sequences, length_sorted_batches
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.rollout import SamplingOptions, respond
from rlhf.reward.sources import Responses, Reward

#: VADER calls a text positive above .05 and negative below -.05 (Hutto & Gilbert, ICWSM 2014).
GOLD_THRESHOLD = 0.05


@dataclass(frozen=True)
class PolicyEvaluation:
    """One answer to each of B prompts, with their scores and figures."""

    answers: Answers
    scores: Tensor
    """(B,) scores of the reward, without penalties."""
    kl: Tensor
    """(B,) log pi - log pi_ref on sampled tokens (k1), nats."""
    gold: Tensor | None
    """(B,) scores of the independent judge, if there is one."""
    figures: dict[str, float | None]
    """Means over the answers, by the names of a PPO manifest."""

    def metrics(self, count: int) -> dict[str, float]:
        """Return means over the first `count` answers, by the names of the metrics during training."""
        answers, gold = self.answers, {} if self.gold is None else {"eval/gold": float(self.gold[:count].mean())}
        return {
            "eval/score": float(self.scores[:count].mean()),
            **gold,
            "eval/kl": float(self.kl[:count].mean()),
            "eval/length": float(answers.lengths[:count].mean()),
            "eval/stop_rate": sum(answers.stopped[:count]) / len(answers.stopped[:count]),
            "eval/distinct_2": distinct_n(answers.texts[:count], 2),
        }


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
) -> PolicyEvaluation:
    """Sample and score one answer to each prompt, of the policy or the SFT reference, with the same random numbers for both.

    Args:
        prompts, rows: token ids of the prompts, and the data rows that they came from.
        batch_size, batch_tokens: responses a scoring pass, and tokens (responses times the longest of them).
    """

    def draw(batch: Sequence[Sequence[int]], first: int) -> Sampled:
        seeds = [seed + first + start for start in range(0, len(batch), SAMPLED_AT_ONCE)]
        return respond(models, batch, options, reference=reference, seed=seeds)[1]

    at_once = sampled_together(models.causal, max(map(len, prompts)), options.max_new_tokens)
    answers = sample_in_batches(tokenizer, prompts, draw, at_once=at_once)
    sequences = answers.sequences(prompts, options.pad_token_id, models.compute.device)
    batches = length_sorted_batches(sequences.lengths, batch_size, batch_tokens)
    scores, _ = reward(Responses(sequences=sequences, batches=batches, texts=answers.texts, rows=rows))
    judged = None if gold is None else torch.tensor(gold(answers.texts))
    kl, mean_kl = torch.zeros(len(sequences)), 0.0
    if not reference:
        kl, mean_kl = _kl(models, sequences, batches, options.temperature)
    figures = {
        "score": float(scores.mean()),
        "reward_positive": float((scores > 0).float().mean()),
        "distinct2": distinct_n(answers.texts, 2),
        "length": float(sequences.mask.sum(dim=1).float().mean()),
        "stop_rate": float(torch.tensor(answers.stopped).float().mean()),
        **_gold_figures(judged),
        "kl": mean_kl,
    }
    return PolicyEvaluation(answers, scores.cpu(), kl, judged, figures)


def _gold_figures(scores: Tensor | None) -> dict[str, float | None]:
    """Return the mean of the independent judge's scores, and the shares of answers that it finds positive and negative."""
    if scores is None:
        return {"gold": None, "gold_positive": None, "gold_negative": None}
    return {
        "gold": float(scores.mean()),
        "gold_positive": float((scores > GOLD_THRESHOLD).float().mean()),
        "gold_negative": float((scores < -GOLD_THRESHOLD).float().mean()),
    }


def _kl(
    models: RoleModels, sequences: Sequences, batches: Sequence[Tensor], temperature: float
) -> tuple[Tensor, float]:
    """Return log pi - log pi_ref on sampled tokens (k1), nats: of each response (B,), and their mean."""
    kl, total = torch.zeros(len(sequences)), 0.0
    for rows in batches:
        batch = sequences.select(rows)
        new = forward.token_logprobs(models, "policy", batch, temperature)
        old = forward.token_logprobs(models, "reference", batch, temperature)
        k1 = F.kl_k1(new, old)
        kl[rows.cpu()] = F.masked_sum(k1, batch.mask, dim=1).float().cpu()
        total += float(F.masked_sum(k1, batch.mask))
    return kl, total / len(sequences)
