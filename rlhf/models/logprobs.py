"""Log-probabilities of tokens from logits or hidden states, in fp32.

Legend: N tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.base.tensors import check_shapes, upcast
from rlhf.models.compute import device_kind

#: Tokens whose logits are computed together: enough for an efficient product, few enough to hold.
_LOGITS_AT_ONCE = {"cpu": 128, "cuda": 1024}
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


def state_logprobs(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    tokens: Tensor,
    *,
    temperature: float,
    head_frozen: bool,
    recompute: bool = False,
    observe: Callable[[Tensor, Tensor], Any] = lambda logits, tokens: None,
) -> Tensor:
    """Return log pi(token) (N,), nats, from the hidden states (N, d) before each token; logits (N, V) never exist together.

    Args:
        head: maps states to logits, row by row.
        head_frozen: nothing that the head computes with is trained.
        recompute: make the logits of a head that trains again in the backward pass, instead of keeping them.
        observe: is called with the logits and the tokens of each part.
    """

    def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states)
        observe(logits.detach(), tokens)
        return sequence_logprobs(logits, tokens, temperature=temperature)

    compute = partial(_Rowwise.apply, logprobs) if head_frozen and states.requires_grad else logprobs
    if recompute and not head_frozen:
        compute = partial(checkpoint, logprobs, use_reentrant=False)
    return torch.cat([compute(*part) for part in split_positions(states, tokens)])


def split_positions(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors (N, ...) into parts whose logits are computed together."""
    return zip(*(x.split(_LOGITS_AT_ONCE.get(device_kind(x), 1024)) for x in flat), strict=True)


class _Rowwise(torch.autograd.Function):
    """Applies a function of rows (N, d) whose result (N,) depends on its own row alone, and on nothing else trained.

    The forward pass takes the gradient at once and stores it, (N, d); autograd would store the logits' softmax, (N, V),
    until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor, Tensor], Tensor], states: Tensor, tokens: Tensor) -> Tensor:
        with torch.enable_grad():
            rows = states.detach().requires_grad_()
            result = function(rows, tokens)
            ctx.save_for_backward(*torch.autograd.grad(result.sum(), rows))
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return None, (gradients[0][:, None] * slopes).to(slopes.dtype), None


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
