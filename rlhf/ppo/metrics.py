"""Figures of a rollout and of the updates made from it; their names and meanings are in `rlhf.run.metrics.METRICS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.base import distributed
from rlhf.base.text import distinct_n, repetition
from rlhf.ppo import functional as F
from rlhf.ppo.types import Rollout


class Totals:
    """Sums over the microbatches of one rollout, divided once at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(
            (
                "ppo/policy_loss",
                "ppo/value_loss",
                "ppo/clipfrac",
                "ppo/value_clipfrac",
                "ppo/approx_kl",
                "ppo/ratio_mean",
            ),
            0.0,
        )
        self.tokens = {"policy": 0, "value": 0}
        self.steps = 0
        self.early_stop = False
        self.text_loss = 0.0
        self.ratio_max = 0.0
        self.first_ratio_error = 0.0
        self.norms = (0.0, 0.0)

    def add_policy(self, loss: Tensor, clipped: Tensor, logprobs: Tensor, batch: Rollout, *, first: bool) -> float:
        """Figures of one microbatch's policy loss; returns the sum of its tokens' approx_kl."""
        new, old = logprobs.detach(), batch.logprobs
        ratio = (new - old)[batch.mask].exp()
        approx_kl = float(torch.where(batch.mask, F.kl_k3(old, new), 0.0).sum())
        self.tokens["policy"] += int(batch.mask.sum())
        self.sums["ppo/policy_loss"] += float(loss.detach().sum())
        self.sums["ppo/clipfrac"] += float(clipped.sum())
        self.sums["ppo/approx_kl"] += approx_kl
        self.sums["ppo/ratio_mean"] += float(ratio.sum())
        self.ratio_max = max(self.ratio_max, float(ratio.max()))
        if first:
            self.first_ratio_error = max(self.first_ratio_error, float((ratio - 1).abs().max()))
        return approx_kl

    def add_value(self, loss: Tensor, clipped: Tensor, tokens: int) -> None:
        """Figures of one microbatch's value loss."""
        self.tokens["value"] += tokens
        self.sums["ppo/value_loss"] += float(loss.detach().sum())
        self.sums["ppo/value_clipfrac"] += float(clipped.sum())

    def add_text(self, nll: Tensor) -> None:
        """The share of one microbatch in the mean negative log-likelihood of an update's texts (PPO-ptx)."""
        self.text_loss += float(nll.detach())

    def add_step(self, policy_norm: float, value_norm: float) -> None:
        """Gradient norms of one optimiser update, before clipping."""
        self.steps += 1
        self.norms = (max(self.norms[0], policy_norm), max(self.norms[1], value_norm))

    def add_up(self) -> None:
        """Takes in what the other processes have counted."""
        names = list(self.sums)
        counted = torch.tensor(
            [*(self.sums[name] for name in names), *self.tokens.values(), self.text_loss], dtype=torch.float64
        )
        *sums, policy, value, self.text_loss = distributed.total(counted).tolist()
        self.sums, self.tokens = dict(zip(names, sums, strict=True)), {"policy": int(policy), "value": int(value)}
        self.ratio_max = distributed.largest(self.ratio_max)
        self.first_ratio_error = distributed.largest(self.first_ratio_error)

    def figures(self) -> dict[str, float]:
        """Means over the tokens that went into each; zeros for a policy that was not trained (value warm-up)."""
        means = {
            name: total / max(self.tokens["value" if "value" in name else "policy"], 1)
            for name, total in self.sums.items()
        }
        return means | {
            "ppo/ratio_max": self.ratio_max,
            "ppo/first_ratio_error": self.first_ratio_error,
            "ppo/grad_norm": self.norms[0],
            "ppo/value_grad_norm": self.norms[1],
            "ppo/early_stop": float(self.early_stop),
            "ppo/ptx_loss": self.text_loss / max(self.steps, 1),
        }


def rollout_metrics(
    rollout: Rollout, kl_coef: float, sampling_seconds: float, texts: list[str], pad_token_id: int
) -> dict[str, float]:
    """Figures of a rollout before the update; KL in nats: summed over the response, mean over the batch."""
    kl = F.masked_sum(F.kl_k1(rollout.logprobs, rollout.ref_logprobs), rollout.mask, dim=1).mean()
    kl_k3 = F.masked_sum(F.kl_k3(rollout.logprobs, rollout.ref_logprobs), rollout.mask, dim=1).mean()
    lengths = rollout.mask.sum(dim=1)
    tokens = int(lengths.sum())
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
    surprise, surprise_error = surprise_gap(rollout)
    padding = (rollout.input_ids == pad_token_id) & rollout.attention_mask
    figures: dict[str, Any] = {
        "objective/score": rollout.scores.mean(),
        "objective/raw_score": rollout.raw_scores.mean(),
        "objective/score_std": rollout.raw_scores.std(correction=0),
        "objective/length_correlation": correlation(rollout.raw_scores, lengths),
        "objective/kl": kl,
        "objective/kl_k3": kl_k3,
        "objective/kl_full": F.masked_sum(rollout.full_kl, rollout.mask, dim=1).mean(),
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
    return {name: float(value) for name, value in figures.items()}


def surprise_gap(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Mean of -log pi(token) - entropy over the sampled tokens, nats a token, and the standard error of that mean.

    The expectation of -log pi is the entropy, if tokens are drawn from the distribution that is scored. Each token's difference
    has mean 0 given the tokens before it, so the squares add up without covariances.
    """
    difference = -rollout.logprobs - rollout.entropy
    squares = F.masked_sum(difference.square(), rollout.mask)
    return F.masked_mean(difference, rollout.mask), squares.sqrt() / rollout.mask.sum()


def credit_metrics(rollout: Rollout, returns: Tensor, advantages: Tensor, whitened: Tensor) -> dict[str, float]:
    """Figures of values, returns and advantages of a rollout; `whitened` is what the optimiser gets."""
    mask = rollout.mask
    return {
        "ppo/explained_variance": float(F.explained_variance(rollout.values, returns, mask)),
        "ppo/value_std": float(rollout.values[mask].std(correction=0)),
        "ppo/advantage_std": float(advantages[mask].std(correction=0)),
        "ppo/advantage_mean": float(F.masked_mean(whitened, mask)),
    }


def judge_metrics(rollout: Rollout, judged: Sequence[float]) -> dict[str, float]:
    """Figures of an independent judge's scores (B,) of the rollout's responses."""
    gold = torch.tensor(judged, dtype=torch.float32, device=rollout.raw_scores.device)
    return {
        "objective/gold": float(gold.mean()),
        "objective/gold_correlation": float(correlation(rollout.raw_scores, gold)),
    }


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two vectors (B,); 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum() / scale if scale > 0 else torch.zeros(())
