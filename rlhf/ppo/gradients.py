"""Gradients of one minibatch: policy, value and text losses, added up microbatch by microbatch.

Every loss is divided by the minibatch's real tokens (of all processes), so any split into microbatches gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.base import distributed
from rlhf.config import PPOConfig
from rlhf.models.roles import RoleModels
from rlhf.models.sequences import Sequences, length_sorted_batches, pad
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.credit import Credit
from rlhf.ppo.metrics import LossStatistics
from rlhf.ppo.types import Rollout


def accumulate(
    models: RoleModels,
    config: PPOConfig,
    rollout: Rollout,
    credit: Credit,
    microbatches: Sequence[Tensor],
    *,
    train_policy: bool,
) -> LossStatistics:
    """Add the gradients of one minibatch to the parameters; return the statistics of this process's share.

    Args:
        microbatches: row numbers of each microbatch, of all processes.
        train_policy: False leaves the policy as it is (value warm-up).
    """
    tokens = int(rollout.mask[torch.cat(list(microbatches))].sum())
    statistics = LossStatistics(tokens=tokens)
    for rows in distributed.share(microbatches):
        batch = rollout.select(rows)
        forward.prepare(models, batch)
        width = batch.mask.shape[1]
        advantages = credit.advantages[rows, :width]
        returns = None if credit.returns is None else credit.returns[rows, :width]
        _train(models, config, batch, advantages, returns, statistics, train_policy=train_policy)
    return statistics


def _train(
    models: RoleModels,
    config: PPOConfig,
    batch: Rollout,
    advantages: Tensor,
    returns: Tensor | None,
    statistics: LossStatistics,
    *,
    train_policy: bool,
) -> None:
    """Add the gradients of one microbatch; the host does not wait for any of its numbers."""
    tokens, shared = statistics.tokens, models.shared_trunk and returns is not None
    if train_policy:
        with models.training_as("policy"):
            loss = _policy_loss(models, config, batch, advantages, returns if shared else None, statistics)
            (loss / tokens).backward()
            del loss  # the policy's activations are gone before the value's are made
    if returns is not None and not shared:
        with models.training_as("value"):
            values = forward.token_values(models, batch)
            (config.vf_coef * _value_loss(config, values, batch, returns, statistics) / tokens).backward()


def _policy_loss(
    models: RoleModels,
    config: PPOConfig,
    batch: Rollout,
    advantages: Tensor,
    returns: Tensor | None,
    statistics: LossStatistics,
) -> Tensor:
    """Return the policy loss summed over a microbatch; with `returns`, the value loss on the shared trunk is added."""
    if returns is None:
        logprobs = forward.token_logprobs(models, "policy", batch, config.temperature)
    else:
        logprobs, values = forward.logprobs_and_values(models, batch, config.temperature)
    losses, clipped = F.policy_loss(logprobs, batch.logprobs, advantages, batch.mask, clip_range=config.clip_range)
    statistics.add_policy(losses, clipped, logprobs, batch)
    if returns is None:
        return losses.sum()
    return losses.sum() + config.vf_coef * _value_loss(config, values, batch, returns, statistics)


def _value_loss(
    config: PPOConfig, values: Tensor, batch: Rollout, returns: Tensor, statistics: LossStatistics
) -> Tensor:
    """Return the value loss summed over a microbatch."""
    losses, clipped = F.value_loss(values, batch.values, returns, batch.mask, clip_range_value=config.clip_range_value)
    statistics.add_value(losses, clipped, values, batch)
    return losses.sum()


def accumulate_texts(
    models: RoleModels, config: PPOConfig, texts: Sequence[tuple[list[int], list[int]]], pad_token_id: int
) -> list[Tensor]:
    """Add the gradient of ptx_coef * mean negative log-likelihood of texts (PPO-ptx; InstructGPT, eq. 2).

    Args: texts, token ids of (prompt, answer); only answers have a loss.
    Returns: the share of each of this process's microbatches in that mean, nats a token.
    """
    prompts, prompt_mask = pad([prompt for prompt, _ in texts], pad_token_id, side="left")
    answers, mask = pad([answer for _, answer in texts], pad_token_id, side="right")
    batch = Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=answers, mask=mask)
    batch, tokens = batch.to(models.compute.device), int(mask.sum())
    shares = []
    for rows in distributed.share(length_sorted_batches(batch.lengths, config.microbatch, config.microbatch_tokens)):
        with models.training_as("policy"):
            nll = -forward.token_logprobs(models, "policy", batch.select(rows), temperature=1.0).sum() / tokens
            (config.ptx_coef * nll).backward()
        shares.append(nll.detach())
    return shares
