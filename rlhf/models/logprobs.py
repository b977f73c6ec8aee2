"""Log-probabilities of tokens from logits, in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.base.tensors import check_shapes, upcast
from rlhf.models.compute import device_kind

#: Positions whose distributions a CPU computes together.
_POSITIONS_AT_ONCE = 8


@contextlib.contextmanager
def positions_at_once(count: int) -> Iterator[None]:
    """Context in which a CPU computes the distributions of `count` positions together: the same results in fewer calls."""
    global _POSITIONS_AT_ONCE
    before, _POSITIONS_AT_ONCE = _POSITIONS_AT_ONCE, count
    try:
        yield
    finally:
        _POSITIONS_AT_ONCE = before


def log_distribution(logits: Tensor, *, temperature: float) -> Tensor:
    """Return log pi = log softmax(logits / temperature): the scaled logits minus their log-sum-exp.

    Args: logits (..., V), where -inf means a token that cannot be drawn; temperature > 0, the sampler's own.
    Returns: (..., V), nats.
    """
    return _tempered(logits, temperature).log_softmax(-1)


def gather_logprobs(log_pi: Tensor, tokens: Tensor) -> Tensor:
    """Return log pi(token) per position.

    Position t of `log_pi` must already be the prediction *of* position t of `tokens` (the caller slices P-1:-1).

    Args: log_pi (..., V); tokens (...) int64 from 0 to V - 1. Returns: (...), nats.
    """
    check_shapes(log_pi.shape[:-1], tokens=tokens)
    return log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def sequence_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """Return log pi(token) with pi = softmax(logits / temperature), per position.

    Args: logits (..., V); tokens (...) int64; temperature > 0. Returns: (...), nats.
    """
    check_shapes(logits.shape[:-1], tokens=tokens)
    parts = position_chunks(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1))
    logprobs = [gather_logprobs(log_distribution(few, temperature=temperature), target) for few, target in parts]
    return torch.cat(logprobs).view(tokens.shape)


def position_chunks(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors (N, ...) into parts of a few positions on a CPU; elsewhere one part holds all.

    Distributions of a few positions stay in a CPU's cache from one pass over the vocabulary to the next. The result of a
    position does not depend on its part.
    """
    at_once = _POSITIONS_AT_ONCE if device_kind(flat[0]) == "cpu" else max(len(flat[0]), 1)
    return zip(*(x.split(at_once) for x in flat), strict=True)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in at least fp32; not a copy at temperature 1, as (..., V) is PPO's largest tensor."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return upcast(logits) if temperature == 1 else upcast(logits) / temperature
