"""The optimiser's arithmetic, in plain float64: the schedule, AdamW's step, and moments that are kept in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def share_of_peak(step: int, steps: int, config: Mapping[str, Any], *, start: float) -> float:
    """Return the step size of optimiser step `step`, from 0, of `steps`, as a share of the peak.

    Args:
        start: share at which the warm-up begins: 0.1 in PPO, 0 in transformers' schedules.
    """
    warmup = config["warmup_steps"]
    if step < warmup:
        return float(start + (1 - start) * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    shares = {"linear": max(0.0, 1 - progress), "constant_with_warmup": 1.0, "cosine": cosine}
    return float(shares.get(config["lr_scheduler_type"], 0.1 + 0.9 * cosine))


def adam_step(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight and moments (float64) after AdamW's step number `step`, from 1."""
    weight, gradient, first, second = (x.double() for x in (weight, gradient, first, second))
    b1, b2 = config["adam_beta1"], config["adam_beta2"]
    first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
    weight = weight * (1 - rate * config["weight_decay"])
    direction = (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + config["adam_epsilon"])
    return weight - rate * direction, first, second


def dequantised(codes: Tensor, table: Tensor, largest: Tensor) -> Tensor:
    """Return the numbers that 8-bit codes stand for; each block of 256 has its own largest number."""
    flat = table.double()[codes.flatten().long()]
    return (flat * largest.double().repeat_interleave(256)[: len(flat)]).view(codes.shape)


def code_width(codes: Tensor, table: Tensor, largest: Tensor) -> Tensor:
    """Return by how much rounding to a code can move a number: to a neighbour's, and for numbers near 0 a little further.

    On a CPU bitsandbytes looks codes up in a table of its own, which is coarse near 0: off by 2.5e-5 of a block's largest number.
    """
    gaps = table.double().diff()
    edge = torch.zeros(1, dtype=torch.float64)
    width = torch.maximum(torch.cat([gaps, edge]), torch.cat([edge, gaps])) + 5e-5
    return dequantised(codes, width, largest)


def moment(state: Mapping[str, Tensor], name: str, which: int, gradient: Tensor) -> Tensor:
    """Return the first or second moment of a weight as numbers, of torch's or bitsandbytes' AdamW; 0 before the first step."""
    own = state.get(f"{ {1: 'exp_avg', 2: 'exp_avg_sq'}[which] }/{name}", state.get(f"state{which}/{name}"))
    if own is None:
        return torch.zeros_like(gradient, dtype=torch.float64)
    if own.dtype != torch.uint8:
        return own.double()
    return dequantised(own, state[f"qmap{which}/{name}"], state[f"absmax{which}/{name}"])
