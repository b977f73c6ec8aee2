"""Responses of a policy to prompts, outside of PPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.errors import require
from rlhf.models.sampling import SAMPLED_AT_ONCE, sample
from rlhf.models.sequences import pad
from rlhf.models.tokenization import Message, encode_prompt, stop_token_ids


def answerable(
    prompts: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, context: int, response_length: int
) -> list[Sequence[Message]]:
    """The prompts that leave room in a context for an answer of `response_length`, both in tokens; says how many do not.

    Raises:
        UserError: none does.
    """
    kept = [prompt for prompt in prompts if len(encode_prompt(tokenizer, prompt)) + response_length <= context]
    require(
        bool(kept),
        f"no prompt leaves room for response_length={response_length} tokens in the model's context of {context}; "
        "lower response_length",
    )
    if left_out := len(prompts) - len(kept):
        print(
            f"{left_out} of {len(prompts)} prompts leave no room for response_length={response_length} tokens in the model's "
            f"context of {context}, and are not answered",
            flush=True,
        )
    return kept


@torch.no_grad()
def own_responses(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    response_length: int,
    seed: int,
) -> list[tuple[list[int], list[int]]]:
    """Token ids (prompt, response) of one response to each prompt, sampled at temperature 1.

    Args:
        prompts: with room for a response in the policy's context (`answerable`).
        response_length: longest response, tokens.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    answered: list[tuple[list[int], list[int]]] = []
    for first in range(0, len(encoded), SAMPLED_AT_ONCE):
        part = encoded[first : first + SAMPLED_AT_ONCE]
        ids, mask = pad(part, int(tokenizer.pad_token_id), side="left")
        sampled = sample(
            policy,
            ids.to(policy.device),
            mask.to(policy.device),
            max_new_tokens=response_length,
            temperature=1.0,
            stop_token_ids=stop_token_ids(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            generator=generator,
        )
        answers = [row[m].tolist() for row, m in zip(sampled.responses, sampled.mask, strict=True)]
        answered += list(zip(part, answers, strict=True))
    return answered
