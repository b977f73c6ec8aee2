"""What a reward model is compared with: independent scorers, and the SFT policy's own answers and likelihoods."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import require
from rlhf.errors import UserError
from rlhf.models import Compute, before_head
from rlhf.packing import prompt_batches
from rlhf.ppo.functional import sequence_logprobs
from rlhf.sampling import SAMPLED_AT_ONCE, sample
from rlhf.tokenization import Message, encode_prompt, pad, stop_token_ids

#: A scorer of texts that nothing was trained on.
GoldFunction = Callable[[Sequence[str]], list[float]]
#: Positions whose logits are made together.
_TOKENS_AT_ONCE = 128


def prompt_numbers(nested: Sequence[Sequence[Any]]) -> Tensor:
    """(M,) int64: which prompt each response answers, for responses that are listed prompt by prompt."""
    return torch.tensor([i for i, inner in enumerate(nested) for _ in inner])


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
    """(M,) mean log-likelihood a token of each response, nats: a sum would only rank by length.

    Args:
        rows: token ids of prompt and response.
        prompt_lengths: tokens of the prompt in each row.
        prompt: (M,) int64, which prompt each row answers; what the rows of a prompt share is computed once.
    """
    means = torch.zeros(len(rows))
    for numbers in prompt_batches(prompt, batch_size):
        ids, mask = pad([rows[i] for i in numbers], pad_token_id, side="right")
        column = torch.arange(ids.shape[1] - 1)
        starts = torch.tensor([prompt_lengths[i] for i in numbers])
        answer = (mask[:, 1:] & (column >= starts[:, None] - 1)).to(compute.device)
        ids, mask = ids.to(compute.device), mask.to(compute.device)
        with compute.autocast():
            states, head = before_head(policy, ids, mask.long())
            before, tokens = states[:, :-1][answer], ids[:, 1:][answer]  # (N, ...), (N,): the state before each token
            parts = [
                sequence_logprobs(head(part), target, temperature=1.0)
                for part, target in zip(before.split(_TOKENS_AT_ONCE), tokens.split(_TOKENS_AT_ONCE), strict=True)
            ]
        logprobs = torch.zeros(answer.shape, device=compute.device).masked_scatter(answer, torch.cat(parts).float())
        means[numbers] = (logprobs.sum(dim=1) / answer.sum(dim=1)).cpu()
    return means


def load_function(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load '{path}' (expected package.module:function): {error}") from error
    if not callable(function):
        raise UserError(f"'{path}' is no function (expected package.module:function)")
    return function
