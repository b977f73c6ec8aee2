"""Sampling responses from a causal model: temperature only, nothing inherited from its generation config.

A plain loop over the library's own cache. It samples from exactly the distribution that PPO scores: softmax(logits / T) over
the whole vocabulary, no top-k, no top-p, no penalties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StopStringCriteria

from rlhf.packing import common_prefix

#: The batch is cut down to its unfinished rows once fewer than this share of it is still being written.
_COMPACT_BELOW = 0.75
#: Responses that evaluations sample together: their keys and values are in memory at once.
SAMPLED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses of a batch of prompts."""

    responses: Tensor
    """(B, R) int64: sampled tokens, the stop token included, then padding."""
    mask: Tensor
    """(B, R) bool: True at sampled tokens; always a prefix of at least one token."""
    logprobs: Tensor
    """(B, R) fp32: log-probability of each token under the model that sampled it, nats; 0 where masked."""
    stopped: Tensor
    """(B,) bool: True where the response ended in a stop token within the length limit."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: list[int],
    pad_token_id: int,
    generator: torch.Generator,
    stop_strings: StopStringCriteria | None = None,
    drawn: tuple[int, Tensor] | None = None,
) -> Sampled:
    """Samples one response for each left-padded prompt (B, P). The token that completes a stop string is its last.

    Each step draws one uniform number for every row of the *whole* batch, finished or not, so a row's tokens do not depend on
    when its neighbours finish. Where the rows are a part of a larger batch, `drawn` is its size and their numbers in it.
    """
    size, device = prompts.shape[0], prompts.device
    total, numbers = drawn or (size, torch.arange(size))
    numbers = numbers.to(device)
    responses = torch.full((size, max_new_tokens), pad_token_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(size, max_new_tokens, dtype=torch.float32, device=device)
    mask = torch.zeros(size, max_new_tokens, dtype=torch.bool, device=device)
    stopped = torch.zeros(size, dtype=torch.bool, device=device)
    stops = torch.tensor(stop_token_ids, device=device)

    cache = DynamicCache(config=model.config)
    logits, attention = _prefill(model, prompts, prompt_mask, cache)
    position = prompt_mask.sum(dim=1, keepdim=True)  # of the next token, per row
    rows = torch.arange(size, device=device)  # which rows of the batch are still in the model's batch
    for t in range(max_new_tokens):
        uniform = torch.rand(total, 1, generator=generator, device=generator.device).to(device)
        tokens, token_logprobs = _draw(logits, uniform[numbers[rows]], temperature)
        live = ~stopped[rows]
        responses[rows, t] = torch.where(live, tokens, pad_token_id)
        logprobs[rows, t] = torch.where(live, token_logprobs, 0.0)
        mask[rows, t] = live
        ended = torch.isin(tokens, stops)
        if stop_strings is not None:
            ended |= stop_strings(responses[rows, : t + 1], None)
        stopped[rows] |= live & ended
        live = ~stopped[rows]
        if t + 1 == max_new_tokens or not live.any():
            break
        if live.sum() < _COMPACT_BELOW * len(rows):
            keep = live.nonzero().squeeze(1)
            rows, tokens, attention, position = rows[keep], tokens[keep], attention[keep], position[keep]
            cache.batch_select_indices(keep)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        logits = _last_logits(model, tokens[:, None], attention, position, cache)
        position = position + 1
    width = int(mask.sum(dim=1).max())
    return Sampled(responses=responses[:, :width], mask=mask[:, :width], logprobs=logprobs[:, :width], stopped=stopped)


def _prefill(model: PreTrainedModel, prompts: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Fills the cache with the prompts, their common opening once; logits (B, V), and the mask (B, columns) of the cache."""
    shared, positions = common_prefix(prompts, mask), mask.long().cumsum(dim=1) - 1
    rest = mask & (positions >= shared)
    if shared:
        opening = prompts[0][mask[0]][:shared][None]
        _last_logits(model, opening, torch.ones_like(opening), torch.arange(shared, device=mask.device)[None], cache)
        cache.batch_repeat_interleave(len(prompts))
        # Prompts end in the last column, so what is left of them does too.
        width = int(rest.sum(dim=1).max())
        prompts, rest, positions = prompts[:, -width:], rest[:, -width:], positions[:, -width:]
    attention = torch.cat([rest.new_ones(len(prompts), shared), rest], dim=1).long()
    return _last_logits(model, prompts, attention, positions.clamp_min(0), cache), attention


def _last_logits(
    model: PreTrainedModel, input_ids: Tensor, attention: Tensor, position_ids: Tensor, cache: DynamicCache
) -> Tensor:
    """Next-token logits (B, V) after the last column; the cache takes up all of them."""
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(
        input_ids=input_ids, attention_mask=attention, position_ids=position_ids, past_key_values=cache, use_cache=True
    ).last_hidden_state
    # Flat: from a strided slice the head's product would copy the embedding matrix for every row.
    return model.get_output_embeddings()(hidden[:, -1].contiguous())


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row of (B, V) logits by inverse CDF, and its log-probability in fp32.

    `torch.multinomial` draws a random number for every entry of the vocabulary, on one thread; this draws one a row.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    cdf = logprobs.exp().cumsum(dim=-1)
    # right=True: the first index whose cdf exceeds u, so a token of probability 0 is never drawn, not even at u = 0.
    tokens = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)
