"""Preflight of the two supervised stages, on a few rows of their own data, collator, model and loss."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import RewardConfig, SFTConfig
from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.context import PreflightContext, check_data, check_policy, likelihoods, pick_short_rows
from rlhf.doctor.preflight.models import (
    check_gradients,
    check_merged,
    check_optimizer,
    check_reload,
    check_trainable,
    layers_without_adapter,
    noise_in_zeros,
    parameters_matching,
    preserve_state,
    zero_weights,
)
from rlhf.doctor.preflight.room import ActivationMeter, check_disk, check_memory
from rlhf.doctor.preflight.text import check_labels, check_rankings, fitting_pairs
from rlhf.models.adapters import direct_casting, merged_adapter, read_adapter, save_adapter
from rlhf.models.base import context_length
from rlhf.models.heads import ScalarHead
from rlhf.reward.parity import deviation, other_companies
from rlhf.reward.ranking import ordered_pairs
from rlhf.reward.scorer import Scorer
from rlhf.run.optim import MIN_8BIT_SIZE, forget_overrides

#: Rows whose labels are read.
LABELLED = 8
#: Rows that go through the model, and prompts of rankings.
ROWS, PROMPTS = 4, 2
#: Responses that are scored.
SCORED = 6
_ADAPTER = r"\.lora_\w+\.default(\.|$)|\.trainable_tokens_delta\.default$"
_HEAD = r"\.score\.modules_to_save\.default\."


def sft(context: PreflightContext, trainer: Any) -> list[Check]:
    """Every check of an SFT run.

    Args:
        trainer: TRL's, with the adapted model and the tokenised rows.
    """
    config, model, rows = cast(SFTConfig, context.config), trainer.model, trainer.train_dataset
    causal, (demonstrations,) = model.get_base_model(), context.training.values()
    lengths = [len(ids) for ids in rows["input_ids"]]
    with preserve_state(model, context.compute.device):
        longest = min(config.max_length, context_length(causal))  # as the stage leaves rows out
        pairs = fitting_pairs(context.tokenizer, demonstrations.rows, longest, LABELLED)
        labels = check_labels(context.tokenizer, pairs, trainer.data_collator([rows[i] for i in range(len(pairs))]))
        chosen = [rows[i] for i in pick_short_rows(lengths, ROWS)]
        ids, prompts = [row["input_ids"] for row in chosen], [row["labels"].count(-100) for row in chosen]
        intended = parameters_matching(model, _ADAPTER)
        trained = check_trainable(
            model, intended, layers_without_adapter(model, config.lora_target_modules, [causal.get_output_embeddings()])
        )
        with noise_in_zeros(intended):
            gradients, activations = _gradients(context, trainer, intended, chosen)
            said = partial(likelihoods, context, causal, ids, prompts)
            saved = _saved(context, model, intended, said, "log-likelihoods, nats a token,")
        states = _states(context, trainer, intended)
    largest = sum(sorted(lengths)[-config.per_device_train_batch_size :])
    return [
        *check_data(context, causal, by="row"),
        labels,
        trained,
        gradients,
        *saved,
        states,
        *_room(context, intended, activations / sum(map(len, ids)), largest),
    ]


def reward(context: PreflightContext, trainer: Any, policy: PreTrainedModel) -> list[Check]:
    """Every check of a reward model's run.

    Args:
        trainer: on rankings, with the fresh reward model.
        policy: the SFT policy around the same backbone; the fresh adapter changes nothing in it yet.
    """
    config, model, rows = cast(RewardConfig, context.config), trainer.model, trainer.train_dataset
    lengths = [sum(map(len, responses)) for responses in rows["input_ids"]]
    lora = config.finetuning == "lora"
    classifier = model.get_base_model() if lora else model
    with preserve_state(model, context.compute.device):
        loaded = check_policy(context, policy)
        chosen = [rows[i] for i in pick_short_rows(lengths, PROMPTS)]
        ids = [tokens for row in chosen for tokens in row["input_ids"]]
        batch = trainer.data_collator(chosen)
        pairs = ordered_pairs(batch["ratings"], batch["prompt"], min_difference=config.min_rating_difference)
        intended = parameters_matching(model, f"{_ADAPTER}|{_HEAD}" if lora else ".")
        problems = layers_without_adapter(model, config.lora_target_modules, [classifier.score]) if lora else []
        trained = check_trainable(model, intended, problems)
        with noise_in_zeros(intended):
            gradients, activations = _gradients(context, trainer, intended, chosen)
            scorer = Scorer(model, context.tokenizer, context.compute, SCORED)
            saved = [check_batch_independence(scorer, ids[:SCORED])]
            if lora:
                saved += _saved(context, model, intended, partial(scorer.raw, ids[:SCORED]), "scores")
        states = _states(context, trainer, intended)
    largest = sum(sorted(lengths)[-config.per_device_train_batch_size :])
    return [
        *check_data(context, classifier, by="row"),
        *loaded,
        check_rankings(context.tokenizer, batch, len(pairs.better)),
        trained,
        gradients,
        *saved,
        states,
        *_room(context, intended, activations / sum(map(len, ids)), largest),
    ]


def check_batch_independence(scorer: Scorer, rows: Sequence[Sequence[int]]) -> Check:
    """That a score does not depend on what else is in the batch, nor on padding.

    A fresh head may by chance give all rows scores near 0, of which rounding is a large share. So differences are also
    measured against the scores that weights of this size give to states of this size in any other direction.
    """
    usual: list[float] = []

    def look(head: nn.Module, given: tuple[Tensor, ...]) -> None:
        states, weight = given[0].double(), cast(ScalarHead, head).weight.double()
        usual.append(float(states.square().mean().sqrt() * weight.norm()))

    hooks = [m.register_forward_pre_hook(look) for m in scorer.model.modules() if isinstance(m, ScalarHead)]
    together = scorer.raw(rows)
    for hook in hooks:
        hook.remove()
    scale = max(float(together.double().square().mean().sqrt()), *usual, 1e-12)
    worst, told, limit = 0.0, "", 0.0
    for how, allowed, scores in other_companies(scorer, rows):
        limit = allowed
        if (found := deviation(scores, together, scale)) >= worst:
            worst, told = found, how
    return batch_independence_check(worst, told, limit)


def batch_independence_check(worst: float, how: str, limit: float) -> Check:
    """The check of scores in other batches and among padding.

    Args:
        worst: largest `deviation`, as a share of the scores' root mean square.
        how: where it was found.
    """
    return Check(
        name="score independent of batch and padding",
        passed=worst <= limit,
        measured=f"off by {worst:.2g} of the scores' size, {how} (limit {limit:g})",
        cause="the score is read at a padding token, positions count padding, or rows see their neighbours",
        fix="use attn_implementation sdpa or eager, and a pad token that is no stop token",
    )


def _gradients(
    context: PreflightContext, trainer: Any, intended: Mapping[str, nn.Parameter], rows: list[dict[str, Any]]
) -> tuple[Check, float]:
    """Where the run's own loss of a few rows sends gradients, and the bytes that it keeps for its backward pass."""
    model, rehearsal = trainer.model, copy.copy(trainer)
    rehearsal._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}  # the run's own start empty
    model.train()
    if context.config.gradient_checkpointing:  # as the trainer does when it starts
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    batch = rehearsal._prepare_inputs(trainer.data_collator(rows))
    kept = ActivationMeter(model)
    with direct_casting(model, context.compute), kept.counted():
        with trainer.accelerator.autocast():
            loss = rehearsal.compute_loss(model, batch)
        loss.backward()
    check = check_gradients(model, intended)
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    return check, float(kept.peak)


def _saved(
    context: PreflightContext, model: Any, intended: Mapping[str, nn.Parameter], said: Callable[[], Tensor], what: str
) -> list[Check]:
    """What saving, loading and merging the adapter change in what is said."""

    def save(folder: Path) -> None:
        save_adapter(model, folder, adapter="default", base_model="preflight")

    def load(folder: Path) -> None:
        read_adapter(model, folder, adapter="default")

    with direct_casting(model, context.compute):
        checks = [check_reload(intended, save, load, said, context.folder)]
        if context.config.quantization == "none" and not context.config.use_dora:  # else it is merged in another way
            unmerged = said()
            with zero_weights({name: p for name, p in intended.items() if ".lora_" in name}):
                without = said()
            with merged_adapter(model, "default"):
                checks.append(check_merged(unmerged, said(), without, context.compute, what))
    return checks


def _states(context: PreflightContext, trainer: Any, intended: Mapping[str, nn.Parameter]) -> Check:
    """What the optimiser of transformers' Trainer keeps."""
    forget_overrides()  # as the stage does when it starts to train
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return check_optimizer(
        intended.values(),
        lambda parameters: kind(parameters, **settings),
        smallest=MIN_8BIT_SIZE if context.config.optim == "adamw_8bit" else None,
    )


def _room(
    context: PreflightContext, intended: Mapping[str, nn.Parameter], bytes_per_token: float, tokens: int
) -> list[Check]:
    parameters = list(intended.values())
    return [
        check_disk(parameters, context.config, context.folder, context.registry),
        check_memory(parameters, context.config, context.compute.device, activations=bytes_per_token, tokens=tokens),
    ]
