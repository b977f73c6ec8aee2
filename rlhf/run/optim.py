"""Optimisers and schedules of PPO. The two supervised stages use transformers' own, by the same names, through its Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rlhf.config import TrainingConfig

MIN_8BIT_SIZE = 4096
"""Elements below which bitsandbytes keeps a tensor's states in 32 bits (its own default): norms, biases."""
MIN_LR_RATE = 0.1
"""Start of a warm-up and end of `cosine_with_min_lr`, as a share of the peak (InstructGPT, appendix C)."""


def build_optimizer(groups: Sequence[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW over parameter groups (`params`, and `lr` where it differs), with 8-bit or 32-bit states."""
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
    """Clear bitsandbytes' settings for single parameters, which last for the whole process.

    They go by the index in the parameter groups: transformers' Trainer keeps the states of embeddings in 32 bits, and a later
    optimiser may have another parameter at that index.
    """
    import bitsandbytes

    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


def smallest_8bit(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of elements from which on a tensor's states have 8 bits.

    Heads with one output stay below it, however wide the model is: they decide the scale of values.
    """
    heads = [p.numel() for p in parameters if p.ndim < 2 or p.shape[0] == 1]
    return max([MIN_8BIT_SIZE, *(size + 1 for size in heads)])


def parameter_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def optimizer_bytes(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> int:
    """Return the bytes of Adam's two moments of each parameter."""
    eight_bit = config.optim == "adamw_8bit"
    return sum(
        2 * p.numel() * (1 if eight_bit and p.numel() >= MIN_8BIT_SIZE else p.element_size()) for p in parameters
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, num_updates: int) -> LambdaLR:
    """Return the schedule of the step size over optimiser updates (not episodes).

    It is transformers' schedule after a warm-up that rises linearly from a tenth of the peak (InstructGPT, appendix C). Theirs
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
    """Return the chosen schedule's arguments besides its length."""
    return {"min_lr_rate": MIN_LR_RATE} if config.lr_scheduler_type == "cosine_with_min_lr" else {}
