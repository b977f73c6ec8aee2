"""Patches and spoilt data of the faults that are held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faults.patching import Row

# ---- patches ---------------------------------------------------------------------------------------------------------


def cut_at_the_end(rows: list[list[int]]) -> list[list[int]]:
    return [ids[:8] for ids in rows]


def kl_rewarded(original: Any) -> Any:
    return lambda *args, kl_coef, **rest: original(*args, kl_coef=-kl_coef, **rest)


def ends_early(original: Any) -> Any:
    return lambda optimizer, config, num_updates: original(optimizer, config, max(num_updates // 4, 1))


def never_zeroed(optimizer: Any) -> Any:
    optimizer.zero_grad = lambda *args, **kwargs: None
    return optimizer


def forgetful(optimizer: Any) -> Any:
    optimizer.register_step_pre_hook(lambda *args: optimizer.state.clear())
    return optimizer


def first_rollout_again(original: Any) -> Any:
    return lambda *args, update, **rest: original(*args, update=0, **rest)


def by_row(original: Any) -> Any:
    def whiten(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(dim=1, keepdim=True)
        x = torch.where(mask, x.float(), 0.0)
        centred = torch.where(mask, x - x.sum(dim=1, keepdim=True) / count, 0.0)
        return centred / (centred.square().sum(dim=1, keepdim=True) / count).sqrt().clamp_min(1e-6)

    return whiten


def read_after_the_token(values: Tensor) -> Tensor:
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


def score_in_the_last_column(original: Any) -> Any:
    def token_rewards(scores: Tensor, *args: Any, **rest: Any) -> Tensor:
        rewards = original(torch.zeros_like(scores), *args, **rest)
        rewards[:, -1] += scores
        return rewards

    return token_rewards


def without_next_values(original: Any) -> Any:
    def gae(values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
        deltas, advantages = rewards - values, torch.zeros_like(rewards)
        advantage = torch.zeros_like(deltas[:, 0])
        for t in reversed(range(deltas.shape[1])):
            advantage = deltas[:, t] + gamma * lam * advantage
            advantages[:, t] = advantage
        advantages = torch.where(mask, advantages, 0.0)
        return advantages, advantages + values

    return gae


def last_microbatch_only(original: Any) -> Any:
    def train(models: Any, *args: Any, **rest: Any) -> None:
        for parameter in models.parameters():
            parameter.grad = None
        original(models, *args, **rest)

    return train


def optimistic(original: Any) -> Any:
    def policy_loss(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
    ) -> tuple[Tensor, Tensor]:
        _, clipped = original(logprobs, old_logprobs, advantages, mask, clip_range=clip_range)
        ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
        advantages = torch.where(mask, advantages, 0.0)
        sides = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
        return torch.minimum(*sides), clipped

    return policy_loss


def measured_only(original: Any) -> Any:
    return lambda parameters, max_norm, *args, **rest: original(list(parameters), float("inf"), *args, **rest)


def reference_is_policy(planes: Tensor) -> Tensor:
    logprobs, _, entropy, full_kl = planes
    return torch.stack([logprobs, logprobs, entropy, torch.zeros_like(full_kl)])


def rewarded_for_running_on(original: Any) -> Any:
    def apply(penalties: Any, *args: Any, **rest: Any) -> Tensor:
        return original(dataclasses.replace(penalties, missing_eos=-penalties.missing_eos), *args, **rest)

    return apply


def with_prompt(original: Any) -> Any:
    def texts(tokenizer: Any, sequences: Any) -> list[str]:
        prompts = zip(sequences.prompts, sequences.prompt_mask, strict=True)
        heads = [tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True).strip() for ids, mask in prompts]
        return [f"{head} {text}" for head, text in zip(heads, original(tokenizer, sequences), strict=True)]

    return texts


def in_bf16(original: Any) -> Any:
    def log_distribution(logits: Tensor, *, temperature: float) -> Tensor:
        return (logits.bfloat16() / temperature).log_softmax(-1).float()

    return log_distribution


def rolled(result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return result[0].roll(1), result[1]


def all_labelled(result: Any) -> Any:
    rows, dropped = result
    return rows.map(lambda row: {"labels": row["input_ids"]}), dropped


def labels_shifted(result: Any) -> Any:
    rows, dropped = result
    return rows.map(lambda row: {"labels": [*row["labels"][1:], -100]}), dropped


def summed(original: Any) -> Any:
    def compute_loss(trainer: Any, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        result = original(trainer, model, inputs, return_outputs, **rest)
        if not model.training:
            return result
        return (32 * result[0], result[1]) if return_outputs else 32 * result

    return compute_loss


def read_one_token_early(original: Any) -> Any:
    def score_rows(model: Any, input_ids: Tensor, attention_mask: Tensor, batches: Any) -> Tensor:
        rows, last = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(dim=1) - 1
        input_ids, attention_mask = input_ids.clone(), attention_mask.clone()
        input_ids[rows, last], attention_mask[rows, last] = 0, 0
        return original(model, input_ids, attention_mask, batches)

    return score_rows


def swapped(pairs: Any) -> Any:
    return dataclasses.replace(pairs, better=pairs.worse, worse=pairs.better)


def unit_too_small(figures: tuple[float, float]) -> tuple[float, float]:
    return figures[0], figures[1] / 50


# ---- spoilt data -----------------------------------------------------------------------------------------------------


def text(row: Row, key: str, text: str) -> Row:
    return {**row, key: [{**row[key][0], "content": text}]}


def half_empty(key: str) -> Any:
    return lambda rows: [text(row, key, "") if i % 2 else row for i, row in enumerate(rows)]


def few_again(rows: list[Row]) -> list[Row]:
    return [rows[i % 8] for i in range(len(rows))]


def of_other_prompts(rows: list[Row]) -> list[Row]:
    return [{**row, "completion": rows[i - 7]["completion"]} for i, row in enumerate(rows)]


def alike(rows: list[Row]) -> list[Row]:
    return [
        {**row, "responses": [row["responses"][0]] * len(row["responses"])} if i % 2 else row
        for i, row in enumerate(rows)
    ]


def contradicting(rows: list[Row]) -> list[Row]:
    return [each for row in rows for each in (row, {**row, "ratings": [-rating for rating in row["ratings"]]})]


def rated_by_length(rows: list[Row]) -> list[Row]:
    return [{**row, "ratings": [float(len(r[0]["content"].split())) for r in row["responses"]]} for row in rows]


def validation_from_training(folder: Path) -> None:
    comparisons = folder / "comparisons"
    lines = (comparisons / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (comparisons / "validation.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
