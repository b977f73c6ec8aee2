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
from rlhf.ppo.metrics import MinibatchSums, PolicySums, ValueSums
from rlhf.ppo.types import Rollout


def accumulate(
    models: RoleModels,
    config: PPOConfig,
    rollout: Rollout,
    credit: Credit,
    microbatches: Sequence[Tensor],
    *,
    train_policy: bool,
) -> MinibatchSums:
    """Add the gradients of one minibatch to the parameters; return the statistics of this process's share.

    Args:
        microbatches: row numbers of each microbatch, of all processes.
        train_policy: False leaves the policy as it is (value warm-up).
    """
    tokens = int(rollout.mask[torch.cat(list(microbatches))].sum())
    sums = MinibatchSums(tokens=tokens)
    for rows in distributed.share(microbatches):
        batch = rollout.select(rows)
        width = batch.mask.shape[1]
        advantages = credit.advantages[rows, :width]
        returns = None if credit.returns is None else credit.returns[rows, :width]
        if models.shared_trunk and returns is not None:
            policy, value = _both_backward(models, config, batch, advantages, returns, tokens)
            sums.policy.append(policy)
            sums.value.append(value)
            continue
        if train_policy:
            sums.policy.append(_policy_backward(models, config, batch, advantages, tokens))
        if returns is not None:
            sums.value.append(_value_backward(models, config, batch, returns, tokens))
    return sums


# Each backward pass is a function of its own, so that the policy's activations are gone before the value's are made.


def _policy_backward(
    models: RoleModels, config: PPOConfig, batch: Rollout, advantages: Tensor, tokens: int
) -> PolicySums:
    with models.training_as("policy"):
        logprobs = forward.token_logprobs(models, "policy", batch, config.temperature)
        loss, sums = _policy_loss(logprobs, batch, advantages, config.clip_range)
        (loss / tokens).backward()
    return sums


def _value_backward(models: RoleModels, config: PPOConfig, batch: Rollout, returns: Tensor, tokens: int) -> ValueSums:
    with models.training_as("value"):
        values = forward.token_values(models, batch)
        loss, sums = _value_loss(values, batch, returns, config.clip_range_value)
        (config.vf_coef * loss / tokens).backward()
    return sums


def _both_backward(
    models: RoleModels, config: PPOConfig, batch: Rollout, advantages: Tensor, returns: Tensor, tokens: int
) -> tuple[PolicySums, ValueSums]:
    with models.training_as("policy"):
        logprobs, values = forward.logprobs_and_values(models, batch, config.temperature)
        policy_loss, policy = _policy_loss(logprobs, batch, advantages, config.clip_range)
        value_loss, value = _value_loss(values, batch, returns, config.clip_range_value)
        ((policy_loss + config.vf_coef * value_loss) / tokens).backward()
    return policy, value


def _policy_loss(logprobs: Tensor, batch: Rollout, advantages: Tensor, clip_range: float) -> tuple[Tensor, PolicySums]:
    """Return the policy loss summed over a microbatch's tokens, with its statistics."""
    losses, clipped = F.policy_loss(logprobs, batch.logprobs, advantages, batch.mask, clip_range=clip_range)
    loss, new, old = losses.sum(), logprobs.detach(), batch.logprobs
    ratio = (new - old)[batch.mask].exp()
    return loss, PolicySums(
        tokens=len(ratio),
        loss=float(loss.detach()),
        clipped=float(clipped.sum()),
        approx_kl=float(torch.where(batch.mask, F.kl_k3(old, new), 0.0).sum()),
        ratio=float(ratio.sum()),
        ratio_max=float(ratio.max()),
        ratio_error=float((ratio - 1).abs().max()),
    )


def _value_loss(values: Tensor, batch: Rollout, returns: Tensor, clip_range_value: float) -> tuple[Tensor, ValueSums]:
    """Return the value loss summed over a microbatch's tokens, with its statistics."""
    losses, clipped = F.value_loss(values, batch.values, returns, batch.mask, clip_range_value=clip_range_value)
    loss = losses.sum()
    return loss, ValueSums(tokens=int(batch.mask.sum()), loss=float(loss.detach()), clipped=float(clipped.sum()))


def accumulate_texts(
    models: RoleModels, config: PPOConfig, texts: Sequence[tuple[list[int], list[int]]], pad_token_id: int
) -> list[float]:
    """Add the gradient of ptx_coef * mean negative log-likelihood of texts (PPO-ptx; InstructGPT, eq. 2).

    Args: texts, token ids of (prompt, answer); only answers have a loss.
    Returns: the share of each of this process's microbatches in that mean, nats a token.
    """
    prompts, prompt_mask = pad([prompt for prompt, _ in texts], pad_token_id, side="left")
    answers, mask = pad([answer for _, answer in texts], pad_token_id, side="right")
    batch = Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=answers, mask=mask)
    batch, tokens = batch.to(models.compute.device), int(mask.sum())
    shares = []
    for rows in distributed.share(
        length_sorted_batches(batch.lengths, config.microbatch_size, config.microbatch_tokens)
    ):
        with models.training_as("policy"):
            nll = -forward.token_logprobs(models, "policy", batch.select(rows), temperature=1.0).sum() / tokens
            (config.ptx_coef * nll).backward()
        shares.append(float(nll.detach()))
    return shares
