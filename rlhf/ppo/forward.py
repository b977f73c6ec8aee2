"""Forward passes shared by rollout and optimiser: one code path, so the first probability ratio is exactly 1.

Legend: B responses, P padded prompt, R padded response, T = P + R, N real response tokens of the batch, d hidden size,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.base.tensors import check_shapes
from rlhf.models.anatomy import head_is_frozen
from rlhf.models.logprobs import (
    gather_logprobs,
    log_distribution,
    position_chunks,
    split_positions,
    state_logprobs,
)
from rlhf.models.packing import LAYOUTS, PACKED
from rlhf.models.roles import Role, RoleModels
from rlhf.models.sequences import Sequences
from rlhf.ppo import functional as F


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
    for part, ref_part, targets in split_positions(states, ref_states, batch.responses[batch.places]):
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
    """Return log-probabilities (B, R) of the response tokens from the states (N, d) before them."""
    flat = state_logprobs(
        models.logits,
        states,
        batch.responses[batch.places],
        temperature=temperature,
        head_frozen=head_is_frozen(models.causal),
        recompute=models.training,  # gradient_checkpointing
    )
    return _scatter(flat, batch)


def _states_before_tokens(models: RoleModels, batch: Sequences) -> Tensor:
    """Return the hidden states (N, d) one position left of each real response token, from which it is predicted."""
    input_ids = batch.input_ids
    if models.causal.config._attn_implementation == PACKED:
        LAYOUTS[input_ids] = batch.layout
    hidden = models.hidden(input_ids, batch.attention_mask)
    return hidden[:, batch.prompts.shape[1] - 1 : -1][batch.places]


def _scatter(flat: Tensor, batch: Sequences) -> Tensor:
    return flat.new_zeros(batch.mask.shape).index_put(batch.places, flat)
