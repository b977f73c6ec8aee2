"""Forward passes shared by rollout and optimiser: one code path, so the first probability ratio is exactly 1.

Legend: B responses, P padded prompt, R padded response, T = P + R, N real response tokens of the batch, d hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.base.tensors import check_shapes
from rlhf.models.anatomy import head_parameters
from rlhf.models.compute import device_kind
from rlhf.models.logprobs import gather_logprobs, log_distribution, position_chunks, sequence_logprobs
from rlhf.models.packing import LAYOUTS, PACKED
from rlhf.models.roles import Role, RoleModels
from rlhf.models.sequences import Sequences
from rlhf.ppo import functional as F

#: Positions whose logits are computed together: enough for an efficient product, few enough to hold.
_LOGITS_AT_ONCE = {"cpu": 128, "cuda": 1024}


def prepare(models: RoleModels, batch: Sequences) -> None:
    """Ask the device for the numbers of a batch that its passes need on the host, so that they never wait for it."""
    check_shapes(batch.mask.shape, mask=batch.mask)
    _ = batch.places
    if models.causal.config._attn_implementation == PACKED:
        _ = batch.layout


def token_logprobs(models: RoleModels, role: Role, batch: Sequences, temperature: float) -> Tensor:
    """Return log-probabilities (B, R) of the response tokens, nats, 0 where masked."""
    with models.role(role):
        return _logprobs(models, _states_before_tokens(models, batch), batch, temperature)


def logprobs_and_values(models: RoleModels, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the policy's log-probabilities and the values on its trunk, (B, R) each, from one pass (`shared_trunk`)."""
    with models.role("policy"):
        states = _states_before_tokens(models, batch)
        return _logprobs(models, states, batch, temperature), _scatter(models.values(states), batch)


@torch.no_grad()
def compared_logprobs(models: RoleModels, batch: Sequences, temperature: float) -> Tensor:
    """Compare the policy with the reference at every response token: (4, B, R) in nats, 0 where masked.

    Planes: log-probabilities of the response tokens under the policy and under the reference, the policy's entropy, and
    KL(policy || reference) over the whole vocabulary.
    """
    with models.role("policy"):
        states = _states_before_tokens(models, batch)
    with models.role("reference"):
        ref_states = _states_before_tokens(models, batch)
    parts = []
    for part, ref_part, targets in _split_positions(states, ref_states, batch.responses[batch.places]):
        with models.role("policy"):
            logits = models.logits(part)
        with models.role("reference"):
            ref_logits = models.logits(ref_part)
        for chunk, ref_chunk, target in position_chunks(logits, ref_logits, targets):
            log_pi = log_distribution(chunk, temperature=temperature)
            log_ref = log_distribution(ref_chunk, temperature=temperature)
            sampled = [gather_logprobs(log_pi, target), gather_logprobs(log_ref, target)]
            parts.append(torch.stack([*sampled, F.entropy(log_pi), F.full_kl(log_pi, log_ref)]))
    return torch.stack([_scatter(flat, batch) for flat in torch.cat(parts, dim=1)])


def token_values(models: RoleModels, batch: Sequences) -> Tensor:
    """Return V(s_t) (B, R), read *before* token t, in units of the score; 0 where masked."""
    with models.role("value"):
        flat = models.values(_states_before_tokens(models, batch))
    return _scatter(flat, batch)


def _logprobs(models: RoleModels, states: Tensor, batch: Sequences, temperature: float) -> Tensor:
    """Return log-probabilities (B, R); logits exist for real response tokens only, a few at a time, never (B, T, V)."""

    def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
        return sequence_logprobs(models.logits(states), tokens, temperature=temperature)

    frozen = not any(parameter.requires_grad for parameter in head_parameters(models.causal))
    compute = partial(_Rowwise.apply, logprobs) if frozen and states.requires_grad else logprobs
    if models.training and not frozen:  # gradient_checkpointing
        compute = partial(checkpoint, logprobs, use_reentrant=False)
    parts = [compute(*part) for part in _split_positions(states, batch.responses[batch.places])]
    return _scatter(torch.cat(parts), batch)


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


def _split_positions(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors (N, ...) into parts whose logits are computed together."""
    return zip(*(x.split(_LOGITS_AT_ONCE.get(device_kind(x), 1024)) for x in flat), strict=True)


def _states_before_tokens(models: RoleModels, batch: Sequences) -> Tensor:
    """Return the hidden states (N, d) one position left of each real response token, from which it is predicted."""
    input_ids = batch.input_ids
    if models.causal.config._attn_implementation == PACKED:
        LAYOUTS[input_ids] = batch.layout
    hidden = models.hidden(input_ids, batch.attention_mask)
    return hidden[:, batch.prompts.shape[1] - 1 : -1][batch.places]


def _scatter(flat: Tensor, batch: Sequences) -> Tensor:
    return flat.new_zeros(batch.mask.shape).index_put(batch.places, flat)
