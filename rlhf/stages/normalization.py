"""The zero and the unit of a reward model: the responses whose scores become 0 on average, with a spread of 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.errors import require
from rlhf.config import RewardConfig
from rlhf.data_prep.load import Loaded, NoneOfKind, load_rows
from rlhf.data_prep.writable import writable
from rlhf.models.base import context_length
from rlhf.models.responses import answer_prompts, answerable
from rlhf.models.tokenization import encode_prompt, encode_response
from rlhf.reward.rankings import Encoded
from rlhf.reward.scorer import Scorer

#: Responses whose scores set the zero and the unit of the reward.
NORMALIZATION_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class NormalizingRows:
    """Responses whose scores become 0 on average."""

    kind: str
    """Where they come from, in words."""
    rows: list[list[int]]
    """Token ids of prompt and response."""
    too_long: int
    """Responses left out because they are longer than anything the model is trained on."""


def normalizing_data(config: RewardConfig) -> Loaded | None:
    """Load the rows that `normalize_on` needs: demonstrations, or the prompts that the policy answers.

    Returns None where the data has no demonstrations at all; unreadable ones are an error, or the zero would silently be
    another.
    """
    if config.normalize_on == "policy":
        return load_rows(config.dataset, "train", kind="prompts")
    try:
        return load_rows(config.dataset, "train", kind="demonstrations")
    except NoneOfKind:
        return None


def normalizing_rows(
    config: RewardConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Encoded,
    data: Loaded | None,
    limit: int,
) -> NormalizingRows:
    """Return the responses that `normalize_on` names, those of at most `limit` tokens with their prompt.

    They are the SFT policy's own, or demonstrations; without demonstrations, the best response of each training ranking.

    Raises:
        UserError: all are too long.
    """
    if data is not None:
        data, _ = writable(data, tokenizer)
    if data is None:
        kind, responses = "best responses of the comparisons (there are no demonstrations)", _best(training)
    elif config.normalize_on == "policy":
        kind, responses = "responses of the SFT policy", _answers(config, base, tokenizer, data)
    else:
        kind, responses = "demonstrations", _demonstrations(tokenizer, data)
    rows: list[list[int]] = []
    too_long = 0
    for ids in responses:
        if len(ids) > limit:
            too_long += 1
        else:
            rows.append(ids)
        if len(rows) == NORMALIZATION_SAMPLES:
            break
    require(
        bool(rows),
        f"normalize_on {config.normalize_on}: none of the {too_long} {kind} fits into max_length={limit} tokens, so "
        "nothing can score 0; raise max_length, or normalise on something else",
    )
    return NormalizingRows(kind=kind, rows=rows, too_long=too_long)


def _best(training: Encoded) -> Iterator[list[int]]:
    for row in training.rows:
        yield row["input_ids"][row["ratings"].index(max(row["ratings"]))]


def _demonstrations(tokenizer: PreTrainedTokenizerBase, data: Loaded) -> Iterator[list[int]]:
    for row in data.rows:
        prompt = row["prompt"]
        yield encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, row["completion"])


def _answers(
    config: RewardConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Loaded
) -> Iterator[list[int]]:
    """Sample answers to each prompt in turn, until there are enough."""
    first = data.rows.select(range(min(len(data.rows), NORMALIZATION_SAMPLES)))["prompt"]
    prompts = answerable(first, tokenizer, context_length(base), config.response_length)
    prompts = [prompts[i % len(prompts)] for i in range(NORMALIZATION_SAMPLES)]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = answer_prompts(base, tokenizer, encoded, response_length=config.response_length, seed=config.seed)
    return iter([prompt + response for prompt, response in zip(encoded, answers.tokens, strict=True)])


def normalization(config: RewardConfig, scorer: Scorer, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the mean and the spread of raw scores of token rows; the spread is 1 unless `normalize_std` is set."""
    scores = scorer.raw(rows)
    std = float(scores.std()) if config.normalize_std and len(scores) > 1 else 1.0
    require(std > 0, "the reward model gives every response the same score; it has learned nothing")
    return float(scores.mean()), std
