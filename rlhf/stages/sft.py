"""Stage 1: supervised fine-tuning on demonstrations. `rlhf sft --config FILE`

Loss on the answers only, an adapter on every linear layer, 8-bit AdamW, evaluation before and after. The checkpoint with
the best held-out loss, or the best score by a reward model, is registered as sft/NAME.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from trl import SFTConfig as TrlSFTConfig
from trl import SFTTrainer

from rlhf.base import storage
from rlhf.base.errors import require, run_command
from rlhf.config import SFTConfig, parse_config, read_new_tokens
from rlhf.data_prep.load import Loaded
from rlhf.doctor.preflight.context import pick_short_rows
from rlhf.doctor.preflight.supervised import sft as check_sft
from rlhf.doctor.probe import ROWS as PROBE_ROWS
from rlhf.doctor.probe import Probe
from rlhf.models.adapters import (
    fast_adapters,
    fitted,
    lora_config,
    merged_adapter,
    save_adapter,
    token_rows,
    with_adapter,
)
from rlhf.models.base import context_length, load_base
from rlhf.models.catalogue import pretrained, recorded_name, resolve_model
from rlhf.models.inputs import model_inputs
from rlhf.models.likelihood import answer_loss, mean_logprobs
from rlhf.models.responses import answer_prompts, answerable
from rlhf.models.tokenization import check_rows, closing_text, encode_prompt, freeze_date, load_tokenizer
from rlhf.models.vocabulary import add_tokens, grow_embeddings, learn_tokens
from rlhf.registry import Artifact, Registry
from rlhf.reward.scorer import open_scorer
from rlhf.reward.sources import scores_of_texts
from rlhf.run.resumable import ResumableTrainer
from rlhf.stages.callbacks import Callback
from rlhf.stages.data import add_dropped, describe_data, encode_demonstrations, load_splits, overlap, writable_sets
from rlhf.stages.next_steps import print_next
from rlhf.stages.review import review
from rlhf.stages.run import Run, announce, find_finished, open_run, preflight, require_one_process, stage_recipe
from rlhf.stages.trainer import SortedStepSampler, on_one_device, train, trainer_arguments

#: Name of the reward model's score among the figures of an evaluation.
SELECTION_METRIC = "eval_score"
#: Holds the date that the chat template writes.
DATE_FILE = "template_date"
#: Held-out loss in nats a character, stop tokens included: it compares models of different vocabularies.
PER_CHARACTER = "eval_loss_per_character"


def run(
    config: SFTConfig, *, reuse: bool = False, only_preflight: bool = False, callbacks: Sequence[Callback] = ()
) -> Artifact | None:
    """Train and register; `reuse` returns an artefact of the same recipe, `only_preflight` ends before the training."""
    sets = data_sets(config)
    data = describe_data(sets)
    registry = Registry(config.registry)
    rewards = [registry.get(config.selection_reward, expect_stage="reward")] if config.selection_reward else []
    parents = list(rewards)
    if base_artifact := pretrained(config.model_name_or_path, config.registry):
        config = dataclasses.replace(config, model_name_or_path=base_artifact.reference)  # this version, from here on
        parents = [base_artifact, *rewards]
    recipe = stage_recipe(config, parents, data)
    inputs = model_inputs(
        config.model_name_or_path, config.registry, revision=config.model_revision, chat_template=config.chat_template
    )
    if reuse and (artifact := find_finished("sft", config, recipe, inputs)):
        return artifact

    require_one_process("sft")
    data["overlap"] = overlap(sets, parents, registry)
    with open_run("sft", config, parents, data, recipe, inputs, callbacks) as run:
        source: dict[str, Any] = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
        tokenizer = load_tokenizer(
            resolve_model(config.model_name_or_path, config.registry),
            chat_template=config.chat_template,
            untrained=True,
            **source,
        )
        freeze_template_date(run, tokenizer)
        sets = writable_sets(sets, tokenizer, run.data)
        announce(run, config.model_name_or_path, sets, tokenizer)
        review(run, config.model_name_or_path, sets, tokenizer)
        if mark := closing_text(tokenizer):
            print(
                f"sft: the template ends answers with {mark!r}, which is no token of this model but text: sampled answers will "
                "show it; --chat_template plain writes none",
                flush=True,
            )
        base = load_base(config.model_name_or_path, config, run.compute, **source)
        new_rows = extend_vocabulary(config, tokenizer, base, sets["train"])
        model = with_adapter(base, fitted(base, lora_config(config, "CAUSAL_LM", new_tokens=new_rows)))
        trainer = make_trainer(run, model, tokenizer, sets, rewards)
        preflight(run, partial(check_sft, trainer=trainer), tokenizer, sets)
        if only_preflight:
            return None
        with fast_adapters(model, run.compute):
            train(trainer, run)
            probe = make_probe(trainer, run, int(tokenizer.pad_token_id))

        base_model = recorded_name(config.model_name_or_path)

        def write(folder: Path) -> None:
            save_adapter(model, folder, adapter="default", base_model=base_model)
            if probe is not None:
                probe.save(folder)

        return run.publish(
            write,
            base_model=base_model,
            base_model_revision=config.model_revision,
            tokenizer=tokenizer,
            metrics={
                **_figures(trainer.state),
                "steps": trainer.state.global_step,
                "tokens_per_character": trainer.answer_tokens / trainer.answer_characters,
                "new_tokens": max(map(len, new_rows.values())) if new_rows else 0,
            },
        )


def data_sets(config: SFTConfig) -> dict[str, Loaded]:
    """Return everything that the stage reads, by split."""
    return load_splits(config.dataset, "demonstrations")


def freeze_template_date(run: Run[SFTConfig], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a template that writes today's date write that of the training, and record it in the run's options.

    A resumed run takes the date at which it began, from a file beside its checkpoints.
    """
    config, file = run.config, run.folder / "checkpoints" / DATE_FILE
    earlier = file.read_text(encoding="utf-8") if config.resume and file.is_file() else None
    day = config.template_date or earlier or date.today().isoformat()
    if freeze_date(tokenizer, date.fromisoformat(day)):
        storage.write_text(file, day)
        run.config = dataclasses.replace(config, template_date=day)
        print(f"sft: the chat template writes the date, which is {day} from here on", flush=True)


def extend_vocabulary(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, data: Loaded
) -> dict[str, list[int]] | None:
    """Add new tokens to tokenizer and model if the config asks for some; return their rows by embedding layer."""
    if config.new_tokens:
        tokens = read_new_tokens(config.new_tokens)
    elif config.learn_tokens:
        answers = [message["content"] for row in data.rows["completion"] for message in row]
        tokens = learn_tokens(answers, tokenizer, config.learn_tokens)
    else:
        return None
    pieces = add_tokens(tokenizer, tokens)
    grow_embeddings(base, pieces)
    first = ", ".join(tokens[:8])
    print(f"sft: {len(tokens)} new tokens ({first}{', ...' if len(tokens) > 8 else ''})", flush=True)
    return token_rows(base, list(pieces))


def make_trainer(
    run: Run[SFTConfig],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Loaded],
    rewards: list[Artifact],
) -> AnswerTrainer:
    """Return TRL's SFT trainer on the tokenised demonstrations; a reward model, if given, selects the checkpoint."""
    config, held_out = run.config, sets["validation"]
    context = context_length(model.get_base_model())
    longest = min(config.max_length, context)
    training, dropped = tokenize(sets["train"], tokenizer, longest)
    evaluated, held_out_dropped = tokenize(held_out, tokenizer, longest, limit=config.max_eval_samples)
    add_dropped(run.data, "train", dropped, "max_length")
    add_dropped(run.data, "validation", held_out_dropped, "max_length")
    arguments = TrlSFTConfig(
        **trainer_arguments(run),
        dataset_kwargs={"skip_prepare_dataset": True},
        load_best_model_at_end=True,
        metric_for_best_model=SELECTION_METRIC if rewards else "eval_loss",
        greater_is_better=bool(rewards),
    )
    trainer = AnswerTrainer(
        model=model,
        args=on_one_device(arguments),
        train_dataset=training,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        selection=Selection(run, tokenizer, held_out, rewards[0], context) if rewards else None,
    )
    trainer.data_rows = sets["train"].rows
    return trainer


def tokenize(
    data: Loaded, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None = None
) -> tuple[Dataset, dict[str, list[int]]]:
    """Return demonstrations as `input_ids` and `labels` (-100 on the prompt), and those left out.

    Args:
        max_length: longer demonstrations are left out, tokens.
        limit: nothing is read beyond this many that are short enough.

    Returns:
        The rows, and reason -> line or row numbers of what was left out.

    Raises:
        UserError: the chat template spoils an answer, or no demonstration is short enough.
    """
    check_rows(tokenizer, ((row["prompt"], row["completion"]) for row in data.rows))
    pairs, dropped = encode_demonstrations(data, tokenizer, max_length, limit)
    require(bool(pairs), f"no demonstration fits into max_length={max_length} tokens; raise it")
    if limit is not None:
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # held-out rows: their order is free, padding is not
    rows = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in pairs]
    return Dataset.from_list(rows), dropped


class Selection:
    """Mean reward of answers sampled to held-out prompts, by which InstructGPT chose its SFT checkpoint (section 3.5).

    Each evaluation draws the same random numbers. The reward model reads the answers as texts, through its own tokenizer.
    """

    def __init__(
        self, run: Run[SFTConfig], tokenizer: PreTrainedTokenizerBase, held_out: Loaded, reward: Artifact, context: int
    ) -> None:
        """Leave out prompts after which an answer has no room in the policy's `context`, or in the reward model's."""
        self.config, self.compute, self.tokenizer = run.config, run.compute, tokenizer
        self.scorer = open_scorer(reward, run.registry, run.config, run.compute, run.config.per_device_eval_batch_size)
        prompts = held_out.rows.select(range(min(run.config.selection_samples, len(held_out.rows))))["prompt"]
        readers = ((tokenizer, context), (self.scorer.tokenizer, context_length(cast(Any, self.scorer.model))))
        for reader, room in readers:
            prompts = answerable(prompts, reader, room, run.config.response_length)
        self.prompts = prompts

    def __call__(self, policy: PreTrainedModel) -> float:
        with self.compute.autocast():
            answers = answer_prompts(
                policy,
                self.tokenizer,
                [encode_prompt(self.tokenizer, prompt) for prompt in self.prompts],
                response_length=self.config.response_length,
                seed=self.config.seed,
            )
        return float(scores_of_texts(self.scorer, self.prompts, answers.texts).mean())


class AnswerTrainer(ResumableTrainer, SFTTrainer):
    """`trl.SFTTrainer` with microbatches of similar lengths, and without logits of prompt tokens on a CPU.

    Evaluations also have the loss by characters and, with a selection, its score.
    """

    def __init__(self, *args: Any, selection: Selection | None = None, **kwargs: Any) -> None:
        self.selection = selection
        super().__init__(*args, **kwargs)
        self.answer_tokens, self.answer_characters = answer_size(
            cast(Any, self.eval_dataset)["labels"], self.processing_class
        )
        self._nats = 0.0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Add the loss by characters and the score of the selection to TRL's evaluation."""
        self._nats = 0.0
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        metrics[PER_CHARACTER] = self._nats / self.answer_characters
        self.log({PER_CHARACTER: metrics[PER_CHARACTER]})
        if self.selection is not None:
            metrics[SELECTION_METRIC] = self.selection(self.accelerator.unwrap_model(self.model).get_base_model())
            self.log({SELECTION_METRIC: metrics[SELECTION_METRIC]})
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> SortedStepSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SortedStepSampler([len(ids) for ids in dataset["input_ids"]], step, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of the answer tokens, nats.

        TRL's own loss stays wherever its kernel leaves out the prompt. On a CPU that kernel computes logits for every
        position, and again in the backward pass, which is half of the step, so the loss is computed here.
        """
        causal = self.accelerator.unwrap_model(model).get_base_model()
        fused = isinstance(causal.get_output_embeddings(), nn.Linear)  # TRL's kernel cannot read rows that are trained
        if fused and self.args.device.type != "cpu":
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not model.training:
                loss = result[0] if return_outputs else result
                counted = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
                self._nats += float(loss) * int(counted)
            return result
        likeliest: list[Tensor] = []

        def count(logits: Tensor, tokens: Tensor) -> None:
            """Count the tokens that are the likeliest of all."""
            # On a CPU amax is much faster than argmax, which then sees only the rows where it can matter.
            top = logits.gather(1, tokens[:, None]).squeeze(1) == logits.amax(dim=-1)
            likeliest.append((logits[top].argmax(dim=-1) == tokens[top]).sum())

        batch = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        with self.accelerator.autocast():  # accelerate wraps only the outermost forward, which is not called here
            total, tokens = answer_loss(causal, *batch, count)
        accuracy = float(torch.stack(likeliest).sum() / tokens)
        self._metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(accuracy)
        if not model.training:
            self._nats += float(total)
        loss = total / (tokens if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


def answer_size(labels: Iterable[list[int]], tokenizer: Any) -> tuple[int, int]:
    """Return the tokens and the characters of labelled answers; a stop token counts as one of each."""
    rows = [[token for token in row if token != -100] for row in labels]
    texts = tokenizer.batch_decode([row[:-1] for row in rows])
    return sum(map(len, rows)), sum(len(text) + 1 for text in texts)


def make_probe(trainer: AnswerTrainer, run: Run[SFTConfig], pad_token_id: int) -> Probe | None:
    """Return log-likelihoods of a few held-out answers, by which a loaded policy can be checked.

    They come from the policy with its adapter merged, as it will be loaded. Returns None for DoRA and quantised bases,
    where merging is more than an addition to the weights that were trained on.
    """
    if run.config.use_dora or run.config.quantization != "none":
        return None
    rows, policy = cast(Any, trainer.eval_dataset), cast(Any, trainer.model).eval()
    chosen = [rows[i] for i in pick_short_rows([len(ids) for ids in rows["input_ids"]], PROBE_ROWS)]
    ids, prompts = [row["input_ids"] for row in chosen], [row["labels"].count(-100) for row in chosen]
    with merged_adapter(policy, "default"):
        logprobs = mean_logprobs(
            policy.get_base_model(),
            ids,
            prompts,
            torch.arange(len(ids)),
            pad_token_id=pad_token_id,
            compute=run.compute,
            batch_size=len(ids),
        )
    return Probe.of(ids, logprobs, run.compute.dtype, prompts)


def _figures(state: TrainerState) -> dict[str, float]:
    """Return held-out figures before training and of the selected checkpoint."""
    figures: dict[str, float] = {}
    for name in ("eval_loss", PER_CHARACTER, SELECTION_METRIC):
        by_step = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
        if by_step:
            selected = state.best_global_step if state.best_global_step in by_step else max(by_step)
            figures |= {f"{name}_before": by_step[min(by_step)], f"{name}_after": by_step[selected]}
    return figures


def main() -> None:
    """Run the stage by its command line."""
    config = parse_config(SFTConfig)
    print_next(run(config), config)


if __name__ == "__main__":
    run_command(main)
