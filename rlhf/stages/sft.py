"""Stage 1: supervised fine-tuning on demonstrations. `python -m rlhf.stages.sft --config FILE`

Loss on the answers only, an adapter on every linear layer, 8-bit AdamW, evaluation before and after, the best checkpoint
kept; registers the adapter as sft/NAME.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig as TrlSFTConfig
from trl import SFTTrainer

from rlhf.config import SFTConfig, parse_config, require
from rlhf.data_prep.assets import resolve_model
from rlhf.data_prep.loading import Loaded, load_rows
from rlhf.errors import run_command
from rlhf.models import backbone, direct_casting, load_base, lora_config, save_adapter, with_adapter
from rlhf.ppo.functional import sequence_logprobs
from rlhf.registry import Artifact
from rlhf.stages.common import (
    SortedStepSampler,
    describe_data,
    finished_already,
    open_run,
    require_one_process,
    stage_recipe,
    train,
    trainer_arguments,
)
from rlhf.tokenization import check_rows, encode_prompt, encode_response, load_tokenizer


def run(config: SFTConfig, *, reuse: bool = False) -> Artifact:
    """Trains and registers; with `reuse`, an artefact of the same recipe is returned instead of trained again."""
    demonstrations = load_rows(config.dataset, "train", kind="demonstrations")
    held_out = load_rows(config.dataset, "validation", kind="demonstrations")
    data = describe_data({"train": demonstrations, "validation": held_out})
    recipe = stage_recipe(config, [], data)
    if reuse and (artifact := finished_already("sft", config, recipe)):
        return artifact

    require_one_process("sft")
    with open_run("sft", config, [], data, recipe) as run:
        tokenizer = load_tokenizer(
            resolve_model(config.model_name_or_path),
            chat_template=config.chat_template,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        base = load_base(
            config.model_name_or_path,
            config,
            run.compute,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        model = with_adapter(base, lora_config(config, "CAUSAL_LM"))
        trainer = _Trainer(
            model=model,
            args=TrlSFTConfig(
                **trainer_arguments(run, config),
                dataset_kwargs={"skip_prepare_dataset": True},
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=False,
            ),
            train_dataset=tokenize(demonstrations, tokenizer, config.max_length),
            eval_dataset=tokenize(held_out, tokenizer, config.max_length, limit=config.max_eval_samples),
            processing_class=tokenizer,
        )
        with direct_casting(model, run.compute):
            train(trainer, run)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

        def write(folder: Path) -> None:
            save_adapter(model, folder, adapter="default", base_model=config.model_name_or_path)

        return run.publish(
            write,
            base_model=config.model_name_or_path,
            base_model_revision=config.model_revision,
            tokenizer=tokenizer,
            metrics={"eval_loss_before": losses[0], "eval_loss_after": min(losses), "steps": trainer.state.global_step},
        )


def tokenize(data: Loaded, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None = None) -> Dataset:
    """Demonstrations as `input_ids` and `labels` (-100 on the prompt). Longer ones than `max_length` tokens are left out."""
    check_rows(tokenizer, ((row["prompt"], row["completion"]) for row in data.rows))
    rows: list[dict[str, Any]] = []
    for row in data.rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        answer = encode_response(tokenizer, row["prompt"], row["completion"])
        if len(prompt) + len(answer) <= max_length:
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        if len(rows) == limit:
            break
    if limit is not None:
        rows.sort(key=lambda row: len(row["input_ids"]))  # held-out rows: their order is free, and padding costs time
    require(bool(rows), f"no demonstration fits into max_length={max_length} tokens; raise it")
    return Dataset.from_list(rows)


class _Trainer(SFTTrainer):
    """`trl.SFTTrainer` whose microbatches hold answers of similar length, and which wastes no work on prompts on a CPU."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SortedStepSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SortedStepSampler([len(ids) for ids in dataset["input_ids"]], step, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the answer tokens, nats.

        TRL's own loss is kept wherever its kernel leaves out the prompt. On a CPU that kernel computes logits for every
        position, and again in the backward pass, which is half of the step; there the loss is taken here.
        """
        if self.args.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        causal = self.accelerator.unwrap_model(model).get_base_model()
        answer = inputs["labels"][:, 1:] != -100
        with self.accelerator.autocast():  # accelerate wraps only the outermost forward, which is not called here
            hidden = backbone(causal)(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]
            logits, tokens = causal.get_output_embeddings()(hidden[answer]), inputs["labels"][:, 1:][answer]
        total = -sequence_logprobs(logits, tokens, temperature=1.0).sum()
        accuracy = (logits.detach().argmax(dim=-1) == tokens).float().mean()
        self._metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(float(accuracy))
        loss = total / (answer.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


def main() -> None:
    """Command line."""
    run(parse_config(SFTConfig))


if __name__ == "__main__":
    run_command(main)
