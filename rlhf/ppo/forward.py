"""Forward passes shared by rollout and optimiser: one code path, so the first probability ratio is exactly 1.

Legend: B responses, P padded prompt, R padded response, T = P + R, N real response tokens of the batch, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.models import Role, SharedModels
from rlhf.ppo import functional as F
from rlhf.ppo.types import Sequences

#: Positions whose logits are in memory together when nothing is trained; few enough to stay in a processor's cache.
_TOKENS_AT_ONCE = 128


def token_logprobs(models: SharedModels, role: Role, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens, and the entropy at each, both (B, R) in nats, 0 where masked.

    The entropy carries no gradient, and is 0 while training. Logits exist only for real response tokens: never (B, T, V).
    """
    tokens, training = batch.responses[batch.mask], torch.is_grad_enabled()
    logprobs, entropies = [], []
    with models.role(role):
        states = _states_before_tokens(models, batch)
        for part, target in zip(states.split(_TOKENS_AT_ONCE), tokens.split(_TOKENS_AT_ONCE), strict=True):
            logits = models.logits(part)
            logprobs.append(F.sequence_logprobs(logits, target, temperature=temperature))
            entropies.append(torch.zeros_like(logprobs[-1]) if training else F.entropy(logits, temperature=temperature))
    return _scatter(torch.cat(logprobs), batch.mask), _scatter(torch.cat(entropies), batch.mask)


def token_values(models: SharedModels, batch: Sequences) -> Tensor:
    """V(s_t) (B, R), read *before* token t, in units of the score; 0 where masked."""
    with models.role("value"):
        flat = models.values(_states_before_tokens(models, batch))
    return _scatter(flat, batch.mask)


def sequence_scores(models: SharedModels, batch: Sequences) -> Tensor:
    """The reward model's normalised score (B,), read at the last real response token."""
    with models.role("reward"):
        hidden = models.hidden(batch.input_ids, batch.attention_mask)
        last = batch.prompts.shape[1] + batch.mask.sum(dim=1) - 1
        return models.scores(hidden[torch.arange(len(batch), device=last.device), last])


def _states_before_tokens(models: SharedModels, batch: Sequences) -> Tensor:
    """Hidden states (N, d) from which the real response tokens are predicted: one position to the left of each."""
    hidden = models.hidden(batch.input_ids, batch.attention_mask)
    return hidden[:, batch.prompts.shape[1] - 1 : -1][batch.mask]


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
