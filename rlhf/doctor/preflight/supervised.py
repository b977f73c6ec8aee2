"""Preflight of SFT and reward modelling, on a few rows of their own data, collator, model and loss."""

from __future__ import annotations

import copy
import dataclasses
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
    check_reload,
    check_trainable,
    check_trainer_optimizer,
    layers_without_adapter,
    noise_in_zeros,
    parameters_matching,
    preserve_state,
    zero_weights,
)
from rlhf.doctor.preflight.room import ActivationMeter, check_disk, check_memory
from rlhf.doctor.preflight.text import check_labels, check_rankings, fitting_pairs
from rlhf.models.adapters import fast_adapters, merged_adapter, read_adapter, save_adapter
from rlhf.models.anatomy import anatomy
from rlhf.models.base import context_length
from rlhf.models.heads import ScalarHead
from rlhf.reward.parity import deviation, scores_in_other_batches
from rlhf.reward.ranking import RankingTrainer, ordered_pairs
from rlhf.reward.scorer import Scorer

#: Rows whose labels are checked.
LABELLED = 8
#: Rows that go through the model, and prompts of rankings.
ROWS, PROMPTS = 4, 2
#: Responses that are scored.
SCORED = 6
_ADAPTER = r"\.lora_\w+\.default(\.|$)|\.trainable_tokens_delta\.default$"
_HEAD = r"\.score\.modules_to_save\.default\."


def sft(context: PreflightContext, trainer: Any) -> list[Check]:
    """Return every check of an SFT run.

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
        short = [rows[i] for i in pick_short_rows(lengths, ROWS)]
        ids, prompts = [row["input_ids"] for row in short], [row["labels"].count(-100) for row in short]
        intended = parameters_matching(model, _ADAPTER)
        trainable = check_trainable(
            model, intended, layers_without_adapter(model, config.lora_target_modules, [causal.get_output_embeddings()])
        )
        with noise_in_zeros(intended):
            gradients, activations = _check_gradients(context, trainer, intended, short)
            outputs = partial(likelihoods, context, causal, ids, prompts)
            adapter_checks = _check_saved(context, model, intended, outputs, "log-likelihoods, nats a token,")
        states = check_trainer_optimizer(trainer, intended.values(), config)
    largest = sum(sorted(lengths)[-config.per_device_train_batch_size :])
    return [
        *check_data(context, causal, by="row"),
        labels,
        trainable,
        gradients,
        *adapter_checks,
        states,
        *_check_room(context, intended, activations / sum(map(len, ids)), largest),
    ]


def reward(context: PreflightContext, trainer: Any, policy: PreTrainedModel) -> list[Check]:
    """Return every check of a reward model's run.

    Args:
        trainer: on rankings, with the fresh reward model.
        policy: the SFT policy around the same backbone; the fresh adapter changes nothing in it yet.
    """
    config, model, rows = cast(RewardConfig, context.config), trainer.model, trainer.train_dataset
    lengths = [sum(map(len, responses)) for responses in rows["input_ids"]]
    lora = config.finetuning == "lora"
    classifier = model.get_base_model() if lora else model
    with preserve_state(model, context.compute.device):
        policy_probe = check_policy(context, policy)
        short = [rows[i] for i in pick_short_rows(lengths, PROMPTS)]
        ids = [tokens for row in short for tokens in row["input_ids"]]
        batch = trainer.data_collator(short)
        pairs = ordered_pairs(batch["ratings"], batch["prompt"], min_difference=config.min_rating_difference)
        intended = parameters_matching(model, f"{_ADAPTER}|{_HEAD}" if lora else ".", without=anatomy(policy).cut_off)
        problems = layers_without_adapter(model, config.lora_target_modules, [classifier.score]) if lora else []
        trainable = check_trainable(model, intended, problems)
        with noise_in_zeros(intended):
            gradients, activations = _check_gradients(context, trainer, intended, short)
            scorer = Scorer(model, context.tokenizer, context.compute, SCORED)
            adapter_checks = [check_batch_independence(scorer, ids[:SCORED])]
            if lora:
                adapter_checks += _check_saved(context, model, intended, partial(scorer.raw, ids[:SCORED]), "scores")
        states = check_trainer_optimizer(trainer, intended.values(), config)
    largest = sum(sorted(lengths)[-config.per_device_train_batch_size :])
    return [
        *check_data(context, classifier, by="row"),
        *policy_probe,
        check_rankings(context.tokenizer, batch, len(pairs.better)),
        trainable,
        gradients,
        *adapter_checks,
        states,
        *_check_room(context, intended, activations / sum(map(len, ids)), largest),
    ]


def check_batch_independence(scorer: Scorer, rows: Sequence[Sequence[int]]) -> Check:
    """Check that a score does not depend on other rows of its batch, nor on padding.

    A fresh head may by chance give all rows scores near 0, of which rounding is a large share. So differences are also
    measured against the scores that weights of this size give to states of this size in any other direction.
    """
    usual: list[float] = []

    def record_scale(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states, weight = inputs[0].double(), cast(ScalarHead, head).weight.detach().double()
        usual.append(float(states.square().mean().sqrt() * weight.norm()))

    hooks = [m.register_forward_pre_hook(record_scale) for m in scorer.model.modules() if isinstance(m, ScalarHead)]
    together = scorer.raw(rows)
    for hook in hooks:
        hook.remove()
    scale = max(float(together.double().square().mean().sqrt()), *usual, 1e-12)
    deviations = {
        batch: (deviation(scores, together, scale), limit)
        for batch, limit, scores in scores_in_other_batches(scorer, rows)
    }
    batch = max(deviations, key=lambda name: deviations[name][0])
    worst, limit = deviations[batch]
    return batch_independence_check(worst, batch, limit)


def batch_independence_check(worst: float, batch: str, limit: float) -> Check:
    """Return the check of scores in other batches and among padding.

    Args:
        worst: largest `deviation`, as a share of the scores' root mean square.
        batch: description of the batch with that deviation.
    """
    return Check(
        name="score independent of batch and padding",
        passed=worst <= limit,
        measured=f"off by {worst:.2g} of the scores' size, {batch} (limit {limit:g})",
        cause="the score is read at a padding token, positions count padding, or rows see their neighbours",
        fix="use attn_implementation sdpa or eager, and a pad token that is no stop token",
    )


def _check_gradients(
    context: PreflightContext, trainer: Any, intended: Mapping[str, nn.Parameter], rows: list[dict[str, Any]]
) -> tuple[Check, int]:
    """Check the gradients of the run's own loss on a few rows; returns also the bytes kept for its backward pass."""
    model, rehearsal = trainer.model, copy.copy(trainer)
    rehearsal._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}  # the run's own start empty
    if isinstance(rehearsal, RankingTrainer) and not rehearsal.objective.center_rewards_coefficient:
        # Differences of scores leave no gradient at what shifts all of them, as the bias of a last norm does.
        rehearsal.objective = dataclasses.replace(rehearsal.objective, center_rewards_coefficient=0.01)
    model.train()
    if context.config.gradient_checkpointing:  # as the trainer does when it starts
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    batch = rehearsal._prepare_inputs(trainer.data_collator(rows))
    meter = ActivationMeter(model)
    with fast_adapters(model, context.compute), meter.counted():
        with trainer.accelerator.autocast():
            loss = rehearsal.compute_loss(model, batch)
        loss.backward()
    check = check_gradients(model, intended)
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    return check, meter.peak


def _check_saved(
    context: PreflightContext,
    model: Any,
    intended: Mapping[str, nn.Parameter],
    outputs: Callable[[], Tensor],
    name: str,
) -> list[Check]:
    """Check that saving, loading and merging the adapter leave the outputs as they are."""

    def save(folder: Path) -> None:
        save_adapter(model, folder, adapter="default", base_model="preflight")

    def load(folder: Path) -> None:
        read_adapter(model, folder, adapter="default")

    with fast_adapters(model, context.compute):
        checks = [check_reload(intended, save, load, outputs, context.folder)]
        if context.config.quantization == "none" and not context.config.use_dora:  # else it is merged in another way
            unmerged = outputs()
            with zero_weights({name: p for name, p in intended.items() if ".lora_" in name}):
                without = outputs()
            with merged_adapter(model, "default"):
                checks.append(check_merged(unmerged, outputs(), without, context.compute, name))
    return checks


def _check_room(
    context: PreflightContext, intended: Mapping[str, nn.Parameter], bytes_per_token: float, tokens: int
) -> list[Check]:
    parameters, config = list(intended.values()), context.config
    return [
        check_disk(parameters, config, context.folder, context.registry),
        check_memory(parameters, config, context.compute.device, activations=bytes_per_token, tokens=tokens),
    ]
