"""Random draws of PPO: prompts, responses, minibatches, texts.

Each is a function of (seed, stream, position), so a resumed run needs no generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.models.sequences import length_sorted_batches

#: One stream of random numbers for each kind of draw.
PROMPTS, RESPONSES, MINIBATCHES, TEXTS = range(4)


def draw_seed(seed: int, position: int, *, stream: int) -> int:
    """Return the generator seed of one draw of a stream."""
    return (seed * 4 + stream) * 1_000_003 + position


def shuffled_rows(size: int, first: int, count: int, *, seed: int, stream: int) -> list[int]:
    """Return rows first .. first + count - 1 of an endless walk over `size` rows.

    Each pass over the rows is a fresh permutation.
    """
    passes = {
        number: torch.randperm(
            size, generator=torch.Generator().manual_seed(draw_seed(seed, number, stream=stream))
        ).tolist()
        for number in range(first // size, (first + count - 1) // size + 1)
    }
    return [passes[at // size][at % size] for at in range(first, first + count)]


def prompt_rows(config: PPOConfig, size: int, update: int) -> list[int]:
    """Return the rows, of `size` prompts, that a rollout answers, each repeated `num_responses_per_prompt` times."""
    repeats = config.num_responses_per_prompt
    count = config.rollout_batch_size // repeats
    rows = shuffled_rows(size, update * count, count, seed=config.seed, stream=PROMPTS)
    return [row for row in rows for _ in range(repeats)]


def text_rows(config: PPOConfig, size: int, step: int) -> list[int]:
    """Return the rows, of `size` PPO-ptx texts, that are mixed into optimiser step `step`."""
    count = round(config.minibatch_size * config.ptx_ratio)
    return shuffled_rows(size, step * count, count, seed=config.seed, stream=TEXTS)


def minibatches(config: PPOConfig, lengths: Tensor, update: int, epoch: int) -> list[list[Tensor]]:
    """Return the minibatches of an epoch, each as the row numbers of its microbatches, similar lengths together.

    Old log-probabilities are computed in the first epoch's microbatches, so that the first ratios are 1 to the last bit:
    in bf16 other neighbours would round differently.

    Args: lengths (B,), tokens of each row.
    """
    seed = draw_seed(config.seed, update, stream=MINIBATCHES) + 500_000 * epoch
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).to(lengths.device)
    return [
        [rows[part] for part in length_sorted_batches(lengths[rows], config.microbatch, config.microbatch_tokens)]
        for rows in order.split(config.minibatch_size)
    ]
