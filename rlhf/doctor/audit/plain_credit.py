"""Rewards, advantages, losses, optimiser and schedule of PPO, written plainly: loops and sums in float64, one row at a time.

Legend: B responses, R padded response. Tensors are (B, R) unless said; `mask` is True at sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def score_of(raw: float, length: int, *, stopped: bool, config: Mapping[str, Any]) -> float:
    """Return the score that is optimised, of one response: the raw one, clipped, less the penalties."""
    clip = config["reward_clip"]
    score = raw if clip is None else min(max(raw, -clip), clip)
    score -= 0.0 if stopped else config["missing_eos_penalty"]
    return score - config["short_response_penalty"] * max(config["min_response_length"] - length, 0)


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Return the penalty for the KL at each token, and the score (B,) at the last real one."""
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        for t in range(length):
            rewards[row, t] = -kl_coef * (float(logprobs[row, t]) - float(reference[row, t]))
        rewards[row, length - 1] += float(scores[row])
    return rewards


def spread_to_one(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return rewards with a standard deviation of 1 over the real tokens and the mean that they had."""
    values = rewards[mask].double()
    mean, std = values.mean(), values.std(correction=0)
    scaled = (values - mean) / std + mean if std > _rounding(values) else values
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, scaled)


def advantages(values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return generalised advantage estimates; nothing comes after the last real token."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        v, r = values[row].double().tolist(), rewards[row].double().tolist()
        advantage = 0.0
        for t in reversed(range(length)):
            following = v[t + 1] if t + 1 < length else 0.0
            advantage = r[t] + gamma * following - v[t] + gamma * lam * advantage
            result[row, t] = advantage
    return result


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with mean 0 and standard deviation 1 over the real tokens."""
    values = x[mask].double()
    std = values.std(correction=0)
    scaled = (values - values.mean()) / std if std > _rounding(values) else torch.zeros_like(values)
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, scaled)


def _rounding(values: Tensor) -> float:
    """Return the spread that equal numbers may seem to have in fp32."""
    return 8 * torch.finfo(torch.float32).eps * float(values.abs().max())


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """Return the clipped loss of each token, of any one shape; a gradient flows through `new`."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_loss(new: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Return half the larger squared error of a value and of itself held near the old one; a gradient flows through `new`."""
    near = torch.minimum(torch.maximum(new, old - clip), old + clip)
    return 0.5 * torch.maximum((new - returns) ** 2, (near - returns) ** 2)


def kl_coef_after(coef: float, kl: float, episodes: int, config: Mapping[str, Any]) -> float:
    """Return the KL coefficient after a rollout whose KL was `kl` nats a response."""
    if config["kl_target"] is None:
        return coef
    error = max(-0.2, min(0.2, kl / config["kl_target"] - 1))
    return float(coef * (1 + error * episodes / config["kl_horizon"]))


def uniform_numbers(seed: int, update: int, rows: int, length: int) -> Tensor:
    """Return the random numbers (rows, length) by which a rollout's tokens are drawn, `update` from 0."""
    generator = torch.Generator().manual_seed((seed * 4 + 1) * 1_000_003 + update)
    return torch.stack([torch.rand(rows, 1, generator=generator)[:, 0] for _ in range(length)], dim=1)


def covers(minibatches: Sequence[Sequence[Sequence[int]]], rows: int, epochs: int) -> str:
    """Return what is wrong with the row numbers (minibatch, microbatch, row) of an update; empty: each row once an epoch."""
    flat = [[row for part in parts for row in part] for parts in minibatches]
    per_epoch, odd = divmod(len(flat), epochs)
    if odd:
        return f"{len(flat)} minibatches in {epochs} epochs"
    for epoch in range(epochs):
        seen = sorted(row for part in flat[epoch * per_epoch : (epoch + 1) * per_epoch] for row in part)
        if seen != list(range(rows)):
            missing, twice = rows - len(set(seen)), len(seen) - len(set(seen))
            return f"in epoch {epoch + 1}, {missing} of {rows} rows are left out and {twice} come again"
    return ""
