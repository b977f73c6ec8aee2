"""Stage 2: a reward model on the SFT policy. `python -m rlhf.stages.reward --config FILE --policy sft/NAME`

An adapter and a score head on the merged SFT policy, trained on rankings of K responses a prompt; scores are normalised so
that demonstrations (or the policy's own responses) score 0; registers the adapter as reward/NAME.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TrlRewardConfig

from rlhf.config import RewardConfig, parse_config, require
from rlhf.data_prep.loading import Loaded, load_rows
from rlhf.errors import UserError, run_command
from rlhf.models import direct_casting, load_policy, lora_config, save_adapter, sequence_classifier, with_adapter
from rlhf.registry import Artifact, Registry
from rlhf.reward.evaluate import comparison_figures, load_function, prompt_numbers, score_tokens
from rlhf.reward.ranking import RankingCollator, RankingTrainer
from rlhf.sampling import SAMPLED_AT_ONCE, sample
from rlhf.stages.common import (
    describe_data,
    finished_already,
    open_run,
    require_one_process,
    stage_recipe,
    train,
    trainer_arguments,
)
from rlhf.tokenization import check_rows, encode_prompt, encode_response, load_tokenizer, pad, stop_token_ids

#: Responses whose scores set the zero and the unit of the reward.
NORMALIZATION_SAMPLES = 256


def run(config: RewardConfig, *, reuse: bool = False) -> Artifact:
    """Trains and registers; with `reuse`, an artefact of the same recipe is returned instead of trained again."""
    policy = Registry(config.registry).get(config.policy, expect_stage="sft")
    comparisons = load_rows(config.dataset, "train", kind="comparisons")
    held_out = load_rows(config.dataset, "validation", kind="comparisons")
    data = describe_data({"train": comparisons, "validation": held_out})
    recipe = stage_recipe(config, [policy], data)
    if reuse and (artifact := finished_already("reward", config, recipe)):
        return artifact
    gold = load_function(config.gold) if config.gold else None

    require_one_process("reward")
    with open_run("reward", config, [policy], data, recipe) as run:
        tokenizer = load_tokenizer(str(policy.path))
        base = load_policy(policy, config, run.compute)
        classifier = sequence_classifier(base, int(tokenizer.pad_token_id), seed=config.seed)
        model = with_adapter(classifier, lora_config(config, "SEQ_CLS"))
        validation = tokenize(held_out, tokenizer, config.max_length)
        trainer = RankingTrainer(
            model=model,
            args=TrlRewardConfig(**trainer_arguments(run, config), prediction_loss_only=True),
            data_collator=RankingCollator(int(tokenizer.pad_token_id)),
            train_dataset=tokenize(comparisons, tokenizer, config.max_length, min_responses=config.min_responses),
            eval_dataset=validation.select(range(min(len(validation), config.max_eval_samples))),
            processing_class=tokenizer,
            min_difference=config.min_rating_difference,
            forward_batch_size=config.per_device_eval_batch_size,
        )
        with direct_casting(model, run.compute):
            train(trainer, run)
            model.eval()
            with run.timer.phase("evaluate"), run.compute.autocast():
                flat = [ids for row in validation["input_ids"] for ids in row]
                scores = score_tokens(
                    model,
                    flat,
                    int(tokenizer.pad_token_id),
                    config.per_device_eval_batch_size,
                    prompt=prompt_numbers(validation["input_ids"]),
                )
                columns: dict[str, Any] = {name: validation[name] for name in validation.column_names}
                figures = comparison_figures(columns, scores, config.eval_rating_difference, gold)
                mean, std = _normalization(config, model, base, tokenizer, comparisons)

        def write(folder: Path) -> None:
            save_adapter(model, folder, adapter="default", base_model=policy.manifest.base_model)

        return run.publish(
            write,
            base_model=policy.manifest.base_model,
            base_model_revision=policy.manifest.base_model_revision,
            tokenizer=tokenizer,
            metrics={**figures, "steps": trainer.state.global_step},
            reward_mean=mean,
            reward_std=std,
        )


def tokenize(data: Loaded, tokenizer: PreTrainedTokenizerBase, max_length: int, *, min_responses: int = 2) -> Dataset:
    """Rankings with `input_ids`: K token lists (prompt and response) a row; too long or too small ones are left out."""
    check_rows(tokenizer, ((row["prompt"], response) for row in data.rows for response in row["responses"]))
    rows: list[dict[str, Any]] = []
    for row in data.rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        ids = [prompt + encode_response(tokenizer, row["prompt"], response) for response in row["responses"]]
        if max(map(len, ids)) <= max_length and len(ids) >= min_responses:
            rows.append({**row, "input_ids": ids})
    require(bool(rows), f"no comparison has {min_responses} responses that fit into max_length={max_length} tokens")
    return Dataset.from_list(rows)


@torch.no_grad()
def _normalization(
    config: RewardConfig,
    model: Any,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Loaded,
) -> tuple[float, float]:
    """Mean and spread of raw scores on the responses that `normalize_on` names."""
    if config.normalize_on == "policy":
        with model.disable_adapter():
            ids = _own_responses(config, base, tokenizer)
    else:
        ids = _demonstrations(config, tokenizer, comparisons)
    scores = score_tokens(model, ids, int(tokenizer.pad_token_id), config.per_device_eval_batch_size)
    std = float(scores.std()) if config.normalize_std and len(scores) > 1 else 1.0
    require(std > 0, "the reward model gives every response the same score; it has learned nothing")
    return float(scores.mean()), std


def _demonstrations(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, comparisons: Loaded) -> list[list[int]]:
    """Token rows of demonstrations; where there are none, of the best response of each ranking."""
    try:
        rows = load_rows(config.dataset, "train", kind="demonstrations").rows
        pairs = [
            (row["prompt"], row["completion"]) for row in rows.select(range(min(len(rows), NORMALIZATION_SAMPLES)))
        ]
    except UserError:
        rows = comparisons.rows.select(range(min(len(comparisons.rows), NORMALIZATION_SAMPLES)))
        pairs = [(row["prompt"], row["responses"][row["ratings"].index(max(row["ratings"]))]) for row in rows]
    return [encode_prompt(tokenizer, p) + encode_response(tokenizer, p, a) for p, a in pairs]


def _own_responses(config: RewardConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token rows of prompts with responses that the SFT policy samples to them."""
    rows = load_rows(config.dataset, "train", kind="prompts").rows
    prompts = [encode_prompt(tokenizer, rows[i % len(rows)]["prompt"]) for i in range(NORMALIZATION_SAMPLES)]
    generator = torch.Generator().manual_seed(config.seed)
    answered: list[list[int]] = []
    for first in range(0, len(prompts), SAMPLED_AT_ONCE):
        part = prompts[first : first + SAMPLED_AT_ONCE]
        ids, mask = pad(part, int(tokenizer.pad_token_id), side="left")
        sampled = sample(
            base,
            ids.to(base.device),
            mask.to(base.device),
            max_new_tokens=config.response_length,
            temperature=1.0,
            stop_token_ids=stop_token_ids(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            generator=generator,
        )
        answers = [row[m].tolist() for row, m in zip(sampled.responses, sampled.mask, strict=True)]
        answered += [prompt + answer for prompt, answer in zip(part, answers, strict=True)]
    return answered


def main() -> None:
    """Command line."""
    run(parse_config(RewardConfig))


if __name__ == "__main__":
    run_command(main)
