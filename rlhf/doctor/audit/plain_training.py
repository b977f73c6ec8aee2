"""Loss, schedule and optimiser of the supervised stages, written plainly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.doctor.audit.plain_optimizer import adam_step, code_width, moment

#: Ratings that differ by less are equal.
TIE = 1e-6


def ranking_loss(
    scores: Tensor, ratings: Tensor, prompt: Tensor, config: Mapping[str, Any], confidence: Tensor | None
) -> Tensor:
    """Return the mean over prompts of the mean over their pairs of -log sigmoid(better - worse), with the options' terms.

    Args:
        prompt: (M,) number of each response's prompt.
        confidence: (M, M) in a pair's order, or None: 1.
    """
    values, prompts, total = ratings.tolist(), prompt.tolist(), scores.new_zeros(())
    for i, j in itertools.permutations(range(len(values)), 2):
        gap = values[i] - values[j]
        if prompts[i] != prompts[j] or gap <= TIE or gap < config["min_rating_difference"] - TIE:
            continue
        k, wrong = prompts.count(prompts[i]), config["label_smoothing"]
        margin = scores[i] - scores[j] - config["margin_per_rating"] * gap
        loss = -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)
        loss = loss + config["center_rewards_coefficient"] * (scores[i] + scores[j]) ** 2
        total = total + loss * (2 / (k * (k - 1))) * (1.0 if confidence is None else float(confidence[i, j]))
    return total / len(set(prompts))


def updates(rows: int, config: Mapping[str, Any]) -> int:
    """Return the number of updates of a run, from its rows and options."""
    if config["max_steps"] > 0:
        return int(config["max_steps"])
    batches = math.ceil(rows / config["per_device_train_batch_size"])
    return math.ceil(config["num_train_epochs"] * math.ceil(batches / config["gradient_accumulation_steps"]))


def off_adamw(
    pair: tuple[Tensor, Tensor],
    gradient: Tensor,
    moments: Sequence[Tensor],
    after: Mapping[str, Tensor],
    name: str,
    step: int,
    rate: float,
    config: Mapping[str, Any],
) -> Iterator[tuple[str, float]]:
    """Yield how far a weight and its moments are from AdamW's, as multiples of what rounding can be.

    Args:
        pair: the weight before and after.
        moments: both moments before.
        after: states after, by kind and name.
    """
    weight, moved = pair
    expected, *own = adam_step(weight, gradient, moments[0], moments[1], step, rate, config)
    rounding = 3 * torch.finfo(weight.dtype).eps * weight.double().abs()
    limit = 5e-3 * (expected - weight.double()).abs() + 2e-3 * rate + rounding + 1e-12
    yield name, float(((moved.double() - expected).abs() / limit).max())
    coarse = 1e-3 + torch.finfo(gradient.dtype).eps  # products of bf16 numbers
    for which, numbers in enumerate(own, start=1):
        room = coarse * numbers.abs() + 1e-6 * numbers.abs().max() + _rounding(after, name, which)
        off = (moment(after, name, which, gradient) - numbers).abs()
        yield f"moment {which} of {name}", float((off / room.clamp_min(1e-30)).max())


def _rounding(state: Mapping[str, Tensor], name: str, which: int) -> Tensor | float:
    """Return the most by which a state's own rounding to 8 bits may move a moment."""
    codes = state.get(f"state{which}/{name}")
    if codes is None or codes.dtype != torch.uint8:
        return 0.0
    return code_width(codes, state[f"qmap{which}/{name}"], state[f"absmax{which}/{name}"])
