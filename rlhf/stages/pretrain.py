"""Before stage 1: a new tokenizer and model from plain text. `rlhf pretrain --config FILE`

A byte-level BPE tokenizer, then a GPT-2- or Llama-shaped model on the packed text, with held-out perplexity, bits per
character and sampled texts on the way. The checkpoint with the lowest held-out loss is registered with the tokenizer as
pretrain/NAME, which SFT takes as its base.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rlhf.base.errors import require, run_command
from rlhf.config import PretrainConfig, parse_config
from rlhf.data_prep.corpus import Blocks, characters, load_text
from rlhf.data_prep.load import Loaded
from rlhf.doctor.preflight.pretrain import pretrain as check_pretrain
from rlhf.models.vocabulary import train_tokenizer
from rlhf.registry import Artifact
from rlhf.run.resumable import ResumableTrainer
from rlhf.stages.callbacks import Callback
from rlhf.stages.data import describe_data
from rlhf.stages.next_steps import print_next
from rlhf.stages.review import review
from rlhf.stages.run import Run, find_finished, open_run, require_checks, require_one_process, stage_recipe
from rlhf.stages.trainer import on_one_device, train, trainer_arguments


def run(
    config: PretrainConfig, *, reuse: bool = False, only_preflight: bool = False, callbacks: Sequence[Callback] = ()
) -> Artifact | None:
    """Train and register; `reuse` returns an artefact of the same recipe, `only_preflight` ends before the training."""
    sets = data_sets(config)
    data = describe_data(sets)
    recipe = stage_recipe(config, [], data)
    if reuse and (artifact := find_finished("pretrain", config, recipe, {})):
        return artifact

    require_one_process("pretrain")
    with open_run("pretrain", config, [], data, recipe, {}, callbacks) as run:
        with run.timer.phase("tokenizer"):
            texts = sets["train"].rows["text"]
            tokenizer = train_tokenizer(texts, config.vocab_size, chat_template=config.chat_template)
        trainer = make_trainer(run, tokenizer, sets)
        review(run, "", sets, rows=len(trainer.train_dataset))
        require_checks(run, lambda: check_pretrain(trainer, run.compute, run.folder, run.registry.root))
        if only_preflight:
            return None
        train(trainer, run)
        with run.timer.phase("evaluate"):
            final = measure(trainer, *held_out_blocks(run, tokenizer, sets["validation"], limit=None))
        return run.publish(
            trainer.model.save_pretrained,
            base_model=f"{config.model_type} from scratch",
            base_model_revision=None,
            tokenizer=tokenizer,
            metrics={
                **{f"eval_{name}": figure for name, figure in final.items()},
                "parameters": trainer.model.num_parameters(),
                "text_tokens": len(trainer.train_dataset.tokens),
                "characters_per_token": characters(texts) / len(trainer.train_dataset.tokens),
                "steps": trainer.state.global_step,
                "best_step": trainer.state.best_global_step,
            },
            kind="full",
        )


def data_sets(config: PretrainConfig) -> dict[str, Loaded]:
    """Return everything that the stage reads, by split."""
    return load_text(
        config.dataset, config, validation_share=config.validation_share, max_characters=config.max_characters
    )


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """Return a fresh model in fp32: Gaussian weights, embeddings tied to the output layer."""
    width = config.intermediate_size or 4 * config.hidden_size
    if config.model_type == "gpt2":
        # No dropout on GPT-2's attention weights: on a CPU one thread would draw the random numbers for all of them.
        own = {"attn_pdrop": 0.0, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "n_inner": width}
    else:
        own = {"attention_dropout": config.dropout, "intermediate_size": width}
    shape = AutoConfig.for_model(
        config.model_type,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,  # a text begins after the end of another
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    attention = config.attn_implementation
    if attention == "auto":  # a CPU is slower at the fused kernel's gradient than at plain matrix products
        attention = "sdpa" if device.type == "cuda" else "eager"
    set_seed(config.seed)
    return AutoModelForCausalLM.from_config(shape, attn_implementation=attention, dtype=torch.float32)


def make_trainer(
    run: Run[PretrainConfig], tokenizer: PreTrainedTokenizerBase, sets: dict[str, Loaded]
) -> PretrainTrainer:
    """Return transformers' Trainer on the packed text."""
    config = run.config
    text = sets["train"].rows["text"]
    blocks = Blocks.of(text, tokenizer, config.max_length, run.folder)
    require(
        blocks.full() > 0,
        f"the text has {len(blocks.tokens) - 1} tokens, fewer than one block of max_length={config.max_length}; "
        "give more text, or shorter blocks",
    )
    model: Any = build_model(config, tokenizer, run.compute.device)
    arguments = TrainingArguments(
        **trainer_arguments(run),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    return PretrainTrainer(
        run,
        model=model.to(run.compute.device),
        args=on_one_device(arguments),
        data_collator=lambda rows: {"input_ids": torch.tensor(rows)},
        train_dataset=FullBlocks(blocks.tokens, blocks.length),
        eval_dataset=held_out_blocks(run, tokenizer, sets["validation"], limit=config.max_eval_samples),
        processing_class=tokenizer,
        callbacks=[Patience(config.early_stopping_patience)] if config.early_stopping_patience else [],
    )


class FullBlocks(Blocks):
    """The blocks of full length: every block of a batch then has the same weight."""

    def __len__(self) -> int:
        return self.full()


def held_out_blocks(
    run: Run[PretrainConfig], tokenizer: PreTrainedTokenizerBase, data: Loaded, *, limit: int | None
) -> tuple[Blocks, int]:
    """Return the blocks of the first `limit` held-out documents, or of all, and their number of characters."""
    texts = data.rows["text"][:limit]
    return Blocks.of(texts, tokenizer, run.config.max_length, run.folder), characters(texts)


@torch.no_grad()
def measure(trainer: PretrainTrainer, blocks: Blocks, count: int) -> dict[str, float]:
    """Measure how well the model predicts held-out documents.

    Args:
        count: characters of the documents, ends included.

    Returns:
        `loss` (nats a token), `perplexity` (a token), `bits_per_character`.
    """
    model: Any = trainer.model.eval()
    total, size = 0.0, trainer.args.per_device_eval_batch_size
    rows = [list(range(i, min(i + size, blocks.full()))) for i in range(0, blocks.full(), size)]
    for batch in [*rows, *([[len(blocks) - 1]] if len(blocks) > blocks.full() else [])]:
        ids = torch.tensor([blocks[i] for i in batch], device=trainer.args.device)
        with trainer.accelerator.autocast():
            total += float(negative_log_likelihood(model, ids).double().sum())
    tokens = len(blocks.tokens) - 1
    return {
        "loss": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "bits_per_character": total / math.log(2) / count,
    }


def negative_log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    """Return nats (B, T) of the tokens after the first, from ids (B, T + 1)."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:]  # rows of logits stay whole: a softmax over a transposed vocabulary is slower
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


class PretrainTrainer(ResumableTrainer, Trainer):
    """`transformers.Trainer` on blocks of text: all tokens but the first are predicted, and evaluations sample."""

    train_dataset: Any
    eval_dataset: Any

    def __init__(self, run: Run[PretrainConfig], **kwargs: Any) -> None:
        self.run, self.config = run, run.config
        super().__init__(**kwargs)
        self._metrics, self._total_train_tokens = (
            {"train": defaultdict(list)},
            0,
        )  # which TRL's trainers have, and checkpoints save

    def finished(self, state: Any) -> bool:
        """Return True also where patience had run out."""
        patience = self.config.early_stopping_patience
        return super().finished(state) or (patience is not None and out_of_patience(state.log_history, patience))

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood, nats a token. All blocks have one length, so batch means add up."""
        loss = negative_log_likelihood(model, inputs["input_ids"]).mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return held-out figures, averaged over tokens and not over batches as in transformers; log them and samples."""
        self.model.eval()
        figures = {f"eval_{name}": value for name, value in measure(self, *self.eval_dataset).items()}
        self.log(dict(figures))
        if self.config.num_samples:
            self.run.tracker.log_samples([{"text": text} for text in self.sample()], self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def sample(self) -> list[str]:
        """Sample texts at temperature 1, with the same random numbers each time and none of the run's own."""
        tokenizer: Any = self.processing_class
        start = torch.full((self.config.num_samples, 1), int(tokenizer.eos_token_id), device=self.args.device)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.accelerator.autocast():
            torch.manual_seed(self.config.seed)
            texts = self.model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=min(self.config.sample_length, self.config.max_length - 1),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
        return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in texts]


class Patience(TrainerCallback):
    """Ends training after a number of evaluations without a lower loss.

    It counts in the history, which checkpoints keep: transformers' own starts to count anew in a resumed run.
    """

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the training if patience has run out."""
        if out_of_patience(state.log_history, self.evaluations):
            control.should_training_stop = True


def out_of_patience(history: Sequence[Mapping[str, Any]], evaluations: int) -> bool:
    """Return True if the last evaluations of a history have no lower held-out loss than earlier ones."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= evaluations


def main() -> None:
    """Run the stage by its command line."""
    config = parse_config(PretrainConfig)
    print_next(run(config), config)


if __name__ == "__main__":
    run_command(main)
