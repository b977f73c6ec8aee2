"""Likelihoods of given responses under a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models.anatomy import head_is_frozen
from rlhf.models.compute import Compute
from rlhf.models.heads import states_and_head
from rlhf.models.logprobs import state_logprobs
from rlhf.models.sequences import pad, prompt_batches


def answer_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    observe: Callable[[Tensor, Tensor], Any] = lambda logits, tokens: None,
) -> tuple[Tensor, int]:
    """Return the negative log-likelihood of all labelled tokens, nats, and their number.

    Args:
        labels: (B, T), -100 where there is no loss; no logits are made there.
        observe: is called with logits (n, V) and tokens (n,), part by part.
    """
    answer = labels[:, 1:] != -100
    states, head = states_and_head(model, input_ids, attention_mask)
    states, tokens = states[:, :-1][answer], labels[:, 1:][answer]
    frozen = head_is_frozen(model)
    logprobs = state_logprobs(head, states, tokens, temperature=1.0, head_frozen=frozen, observe=observe)
    return -logprobs.sum(), len(tokens)


@torch.no_grad()
def mean_logprobs(
    policy: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    prompt: Tensor,
    *,
    pad_token_id: int,
    compute: Compute,
    batch_size: int,
) -> Tensor:
    """Return the mean log-likelihood (M,) a token of each response, nats; sums would mostly rank by length.

    Args:
        rows: token ids of prompt and response.
        prompt_lengths: tokens of the prompt in each row.
        prompt: (M,) int64, number of each row's prompt; the common beginning of a prompt's rows is computed once.
    """
    means = torch.zeros(len(rows))
    for numbers in prompt_batches(prompt, batch_size):
        ids, mask = pad([rows[i] for i in numbers], pad_token_id, side="right")
        column = torch.arange(ids.shape[1] - 1)
        starts = torch.tensor([prompt_lengths[i] for i in numbers])
        answer = (mask[:, 1:] & (column >= starts[:, None] - 1)).to(compute.device)
        ids, mask = ids.to(compute.device), mask.to(compute.device)
        with compute.autocast():
            states, head = states_and_head(policy, ids, mask.long())
            states, tokens = (
                states[:, :-1][answer],
                ids[:, 1:][answer],
            )  # (N, d), (N,): each token and the state before it
            flat = state_logprobs(head, states, tokens, temperature=1.0, head_frozen=True)
        logprobs = torch.zeros(answer.shape, device=compute.device).masked_scatter(answer, flat.float())
        means[numbers] = (logprobs.sum(dim=1) / answer.sum(dim=1)).cpu()
    return means
