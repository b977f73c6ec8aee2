"""Optimisers and schedules of PPO. The two supervised stages use transformers' own, by the same names, through its Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rlhf.config import TrainingConfig

#: bitsandbytes keeps the states of tensors with fewer elements than this in 32 bits (its own default): norms, biases.
MIN_8BIT_SIZE = 4096
#: Where a warm-up starts and where `cosine_with_min_lr` ends, as a share of the peak (InstructGPT, appendix C).
MIN_LR_RATE = 0.1


def build_optimizer(groups: Sequence[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups (`params`, and `lr` where it differs), with 8-bit or 32-bit states."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_8bit":
        import bitsandbytes

        forget_overrides()
        smallest = smallest_8bit(p for group in groups for p in group["params"])
        return bitsandbytes.optim.AdamW8bit(list(groups), min_8bit_size=smallest, **settings)
    return torch.optim.AdamW(list(groups), **settings)


def forget_overrides() -> None:
    """Takes back what earlier optimisers of this process asked of bitsandbytes.

    It notes by place in the parameter groups which states stay in 32 bits, for the whole process: transformers' Trainer does
    so for embeddings, and a later optimiser would find that note at a place where it has another parameter.
    """
    import bitsandbytes

    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


def smallest_8bit(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of a tensor from which on its states have 8 bits.

    Heads to one number stay below, however wide the model is: they decide the scale of values.
    """
    heads = [p.numel() for p in parameters if p.ndim < 2 or p.shape[0] == 1]
    return max([MIN_8BIT_SIZE, *(size + 1 for size in heads)])


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, num_updates: int) -> LambdaLR:
    """The course of the step size over optimiser updates (not episodes).

    transformers' schedules after a warm-up that rises linearly from a tenth of the peak (InstructGPT, appendix C). Theirs
    rises from 0, so the first update would change nothing: in PPO, a rollout thrown away.
    """
    warmup = config.warmup_steps
    schedule: Any = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_updates,
        scheduler_specific_kwargs=scheduler_kwargs(config),
    )
    course = schedule.lr_lambdas[0]

    def share_of_peak(update: int) -> float:
        return course(update) if update >= warmup else MIN_LR_RATE + (1 - MIN_LR_RATE) * update / warmup

    return LambdaLR(optimizer, share_of_peak)


def scheduler_kwargs(config: TrainingConfig) -> dict[str, float]:
    """What the chosen schedule needs besides its length."""
    return {"min_lr_rate": MIN_LR_RATE} if config.lr_scheduler_type == "cosine_with_min_lr" else {}
