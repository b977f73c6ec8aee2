"""Measurements of the SFT policy for the report card, taken before it becomes the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.intervals import Array
from rlhf.config import RewardCardConfig, RewardConfig
from rlhf.models.base import context_length
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.models.responses import answer_prompts, answerable
from rlhf.models.sequences import prompt_numbers
from rlhf.models.tokenization import encode_prompt, last_user_text
from rlhf.reward.rankings import Encoded

Options = RewardConfig | RewardCardConfig


@dataclass(frozen=True, kw_only=True)
class PolicyEvidence:
    """The SFT policy's own responses, and its likelihoods of held-out responses."""

    samples: list[list[int]]
    """Token rows: training prompts with responses of the policy's own."""
    sample_texts: list[tuple[str, str]]
    """The texts (prompt, response) of these rows."""
    logprobs: Array
    """(m,) mean log-likelihood a token of the first m held-out responses, nats."""


def policy_evidence(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    compute: Compute,
    options: Options,
    training: Encoded,
    held_out: Encoded,
) -> PolicyEvidence:
    """Sample from the SFT policy, and measure its likelihoods of held-out responses."""
    first = [row["prompt"] for row in first_rows(training.rows, options.card_policy_samples)]
    prompts = answerable(first, tokenizer, context_length(policy), options.response_length)
    prompts = [prompts[i % len(prompts)] for i in range(options.card_policy_samples)]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = answer_prompts(policy, tokenizer, encoded, response_length=options.response_length, seed=options.seed)
    rows = first_rankings(held_out.rows, options.card_likelihood_responses)
    logprobs = mean_logprobs(
        policy,
        [ids for row in rows for ids in row["input_ids"]],
        [row["prompt_length"] for row in rows for _ in row["input_ids"]],
        prompt_numbers([row["input_ids"] for row in rows]),
        pad_token_id=int(tokenizer.pad_token_id),
        compute=compute,
        batch_size=options.per_device_eval_batch_size,
    )
    return PolicyEvidence(
        samples=[prompt + response for prompt, response in zip(encoded, answers.tokens, strict=True)],
        sample_texts=[(last_user_text(p), text) for p, text in zip(prompts, answers.texts, strict=True)],
        logprobs=logprobs.double().numpy(),
    )


def first_rows(rows: Dataset, count: int) -> list[dict[str, Any]]:
    """Return at most `count` rows from the beginning."""
    return rows.select(range(min(count, len(rows)))).to_list()


def first_rankings(rows: Dataset, responses: int) -> list[dict[str, Any]]:
    """Return rankings from the beginning, at least one, with at most `responses` responses together."""
    chosen: list[dict[str, Any]] = []
    for row in first_rows(rows, responses):
        responses -= len(row["input_ids"])
        if responses < 0 and chosen:
            break
        chosen.append(row)
    return chosen
