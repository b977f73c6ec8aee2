"""Metrics of a rollout and of the updates made from it; `rlhf.run.metrics.METRICS` says what each name means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.base.text import distinct_n, repetition
from rlhf.models.tokenization import decode_response
from rlhf.ppo import functional as F
from rlhf.ppo.types import Rollout


class PolicySums(NamedTuple):
    """Sums over the tokens of a microbatch's policy loss, on its device: reading them waits for it."""

    tokens: float = 0
    loss: float | Tensor = 0.0
    clipped: float | Tensor = 0.0
    approx_kl: float | Tensor = 0.0
    ratio: float | Tensor = 0.0


class ValueSums(NamedTuple):
    """Sums over the tokens of a microbatch's value loss."""

    tokens: float = 0
    loss: float | Tensor = 0.0
    clipped: float | Tensor = 0.0


@dataclass
class LossStatistics:
    """Statistics of one minibatch: an entry for each of this process's microbatches."""

    tokens: int
    """Real tokens of the minibatch, in all processes."""
    policy: list[PolicySums] = field(default_factory=list)
    value: list[ValueSums] = field(default_factory=list)
    extremes: list[Tensor] = field(default_factory=list)
    """(2,) of each microbatch: the largest ratio, and the largest |ratio - 1|."""
    policy_tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Losses and log-probabilities (B, R) of each microbatch's policy loss."""
    value_tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Losses and values (B, R) of each microbatch's value loss."""

    @property
    def ratio_error(self) -> float:
        """Largest |ratio - 1|."""
        return _largest(self.extremes, 1)

    @property
    def approx_kl(self) -> float:
        """KL(old policy || policy) by k3, nats: this process's share of the mean over the minibatch's tokens."""
        return sum(float(part.approx_kl) for part in self.policy) / self.tokens

    def add_policy(self, losses: Tensor, clipped: Tensor, logprobs: Tensor, batch: Rollout) -> None:
        """Add a microbatch of the policy loss (B, R), and its ratios."""
        new, old = logprobs.detach(), batch.logprobs
        self.policy_tokens.append((losses.detach(), new))
        ratio = (new - old)[batch.places].exp()
        approx_kl = torch.where(batch.mask, F.kl_k3(old, new), 0.0).sum()
        sums = (losses.detach().sum(), clipped.sum(), approx_kl, ratio.sum())
        self.policy.append(PolicySums(len(ratio), *sums))
        self.extremes.append(torch.stack([ratio.max(), (ratio - 1).abs().max()]))

    def add_value(self, losses: Tensor, clipped: Tensor, values: Tensor, batch: Rollout) -> None:
        """Add a microbatch of the value loss (B, R)."""
        self.value_tokens.append((losses.detach(), values.detach()))
        self.value.append(ValueSums(len(batch.places[0]), losses.detach().sum(), clipped.sum()))


@dataclass
class Totals:
    """Statistics of the optimiser steps on one rollout."""

    policy: list[PolicySums] = field(default_factory=list)
    value: list[ValueSums] = field(default_factory=list)
    extremes: list[Tensor] = field(default_factory=list)
    text_losses: list[Tensor] = field(default_factory=list)
    steps: int = 0
    early_stop: bool = False
    first_ratio_error: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)

    def add(self, losses: LossStatistics) -> None:
        """Add the statistics of one minibatch."""
        if self.steps == 0:
            self.first_ratio_error = losses.ratio_error
        self.policy += losses.policy
        self.value += losses.value
        self.extremes += losses.extremes

    def add_step(self, policy_norm: float, value_norm: float) -> None:
        """Count an optimiser step, with its gradient norms before clipping."""
        self.steps += 1
        self.norms = (max(self.norms[0], policy_norm), max(self.norms[1], value_norm))

    def metrics(self) -> dict[str, float]:
        """Return means over the tokens of all processes; zeros for a policy that was not trained (value warm-up)."""
        # Zeros first, for a loss that was not computed.
        policy_columns = zip(PolicySums(), *self.policy, strict=True)
        value_columns = zip(ValueSums(), *self.value, strict=True)
        columns = [*policy_columns, *value_columns, self.text_losses]
        totals = distributed.total(
            torch.tensor([sum(map(float, column)) for column in columns], dtype=torch.float64)
        ).tolist()
        policy, value, text_loss = PolicySums(*totals[:5]), ValueSums(*totals[5:8]), totals[8]
        policy_tokens, value_tokens = max(policy.tokens, 1), max(value.tokens, 1)
        return {
            "ppo/policy_loss": policy.loss / policy_tokens,
            "ppo/value_loss": value.loss / value_tokens,
            "ppo/clipfrac": policy.clipped / policy_tokens,
            "ppo/value_clipfrac": value.clipped / value_tokens,
            "ppo/approx_kl": policy.approx_kl / policy_tokens,
            "ppo/ratio_mean": policy.ratio / policy_tokens,
            "ppo/ratio_max": distributed.largest(_largest(self.extremes, 0)),
            "ppo/first_ratio_error": distributed.largest(self.first_ratio_error),
            "ppo/grad_norm": self.norms[0],
            "ppo/value_grad_norm": self.norms[1],
            "ppo/early_stop": float(self.early_stop),
            "ppo/ptx_loss": text_loss / max(self.steps, 1),
        }


def _largest(extremes: Sequence[Tensor], which: int) -> float:
    return max((float(pair[which]) for pair in extremes), default=0.0)


def rollout_metrics(
    rollout: Rollout, kl_coef: float, sampling_seconds: float, texts: list[str], pad_token_id: int
) -> dict[str, float]:
    """Return the metrics of a rollout before the update; KL in nats a response, mean over the batch."""
    kl = rollout.kl.mean()
    kl_k3 = F.masked_sum(F.kl_k3(rollout.logprobs, rollout.ref_logprobs), rollout.mask, dim=1).mean()
    lengths = rollout.mask.sum(dim=1)
    tokens = int(lengths.sum())
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
    surprise, surprise_error = surprise_gap(rollout)
    padding = (rollout.input_ids == pad_token_id) & rollout.attention_mask
    metrics: dict[str, Any] = {
        "objective/score": rollout.scores.mean(),
        "objective/raw_score": rollout.raw_scores.mean(),
        "objective/score_std": rollout.raw_scores.std(correction=0),
        "objective/length_correlation": correlation(rollout.raw_scores, lengths),
        "objective/kl": kl,
        "objective/kl_k3": kl_k3,
        "objective/kl_full": rollout.exact_kl.mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": F.masked_mean(rollout.entropy, rollout.mask),
        "objective/rlhf_reward": rollout.scores.mean() - kl_coef * kl,
        "response/length": tokens / len(rollout),
        "response/stop_rate": rollout.stopped.float().mean(),
        "response/distinct_2": distinct_n(texts, 2),
        "response/repetition": sum(repetition(text, 3) for text in texts) / len(texts),
        "rollout/tokens_per_second": tokens / sampling_seconds,
        "rollout/logprob_gap": F.masked_mean(gap, rollout.mask),
        "rollout/surprise_gap": surprise,
        "rollout/surprise_error": surprise_error,
        "rollout/pad_tokens": padding.sum() / len(rollout),
    }
    return {name: float(value) for name, value in metrics.items()}


def surprise_gap(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return the mean of -log pi(token) - entropy over the sampled tokens, nats, and its standard error.

    The expectation of -log pi is the entropy if tokens are drawn from the distribution that is scored. Each token's
    difference has mean 0 given the tokens before it, so the squares add up without covariances.
    """
    difference = -rollout.logprobs - rollout.entropy
    squares = F.masked_sum(difference.square(), rollout.mask)
    return F.masked_mean(difference, rollout.mask), squares.sqrt() / rollout.mask.sum()


def judge_metrics(rollout: Rollout, scores: Sequence[float]) -> dict[str, float]:
    """Return the metrics of an independent judge's scores (B,) of the rollout's responses."""
    gold = torch.tensor(scores, dtype=torch.float32, device=rollout.raw_scores.device)
    return {
        "objective/gold": float(gold.mean()),
        "objective/gold_correlation": float(correlation(rollout.raw_scores, gold)),
    }


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two vectors (B,); 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum() / scale if scale > 0 else torch.zeros(())


def histogram_values(rollout: Rollout) -> dict[str, list[float]]:
    """Return the values of each response whose distributions are logged, by the names of the histograms."""
    lengths = rollout.mask.sum(dim=1)
    return {
        "histogram/score": rollout.scores.tolist(),
        "histogram/kl": rollout.kl.tolist(),
        "histogram/length": lengths.tolist(),
    }


def sample_rows(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    """Return the first `count` responses with their prompts, scores and KL, for the sample table."""
    kl = rollout.kl
    return [
        {
            "prompt": tokenizer.decode(rollout.prompts[i][rollout.prompt_mask[i]], skip_special_tokens=True),
            "response": decode_response(tokenizer, rollout.responses[i][rollout.mask[i]].tolist()),
            "score": float(rollout.scores[i]),
            "kl": float(kl[i]),
        }
        for i in range(min(count, len(rollout)))
    ]
