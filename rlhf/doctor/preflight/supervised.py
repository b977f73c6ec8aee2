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
from rlhf.doctor.preflight.context import Ground, check_data, check_policy, few, likelihoods
from rlhf.doctor.preflight.models import (
    check_gradients,
    check_merged,
    check_optimizer,
    check_reload,
    check_trainable,
    emptied,
    of_adapter,
    stirred,
    uncovered,
    untouched,
)
from rlhf.doctor.preflight.room import Kept, check_disk, check_memory
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


def sft(ground: Ground, trainer: Any) -> list[Check]:
    """Every check of an SFT run.

    Args:
        trainer: TRL's, with the adapted model and the tokenised rows.
    """
    config, model, rows = cast(SFTConfig, ground.config), trainer.model, trainer.train_dataset
    causal, (demonstrations,) = model.get_base_model(), ground.training.values()
    lengths = [len(ids) for ids in rows["input_ids"]]
    with untouched(model, ground.compute.device):
        longest = min(config.max_length, context_length(causal))  # as the stage leaves rows out
        pairs = fitting_pairs(ground.tokenizer, demonstrations.rows, longest, LABELLED)
        labels = check_labels(ground.tokenizer, pairs, trainer.data_collator([rows[i] for i in range(len(pairs))]))
        chosen = [rows[i] for i in few(lengths, ROWS)]
        ids, prompts = [row["input_ids"] for row in chosen], [row["labels"].count(-100) for row in chosen]
        intended = of_adapter(model, _ADAPTER)
        trained = check_trainable(
            model, intended, uncovered(model, config.lora_target_modules, [causal.get_output_embeddings()])
        )
        with stirred(intended):
            gradients, activations = _gradients(ground, trainer, intended, chosen)
            said = partial(likelihoods, ground, causal, ids, prompts)
            saved = _saved(ground, model, intended, said, "log-likelihoods, nats a token,")
        states = _states(ground, trainer, intended)
    largest = sum(sorted(lengths)[-config.per_device_train_batch_size :])
    return [
        *check_data(ground, causal, by="row"),
        labels,
        trained,
        gradients,
        *saved,
        states,
        *_room(ground, intended, activations / sum(map(len, ids)), largest),
    ]


def reward(ground: Ground, trainer: Any, policy: PreTrainedModel) -> list[Check]:
    """Every check of a reward model's run.

    Args:
        trainer: on rankings, with the fresh reward model.
        policy: the SFT policy around the same backbone; the fresh adapter changes nothing in it yet.
    """
    config, model, rows = cast(RewardConfig, ground.config), trainer.model, trainer.train_dataset
    lengths = [sum(map(len, responses)) for responses in rows["input_ids"]]
    lora = config.finetuning == "lora"
    classifier = model.get_base_model() if lora else model
    with untouched(model, ground.compute.device):
        loaded = check_policy(ground, policy)
        chosen = [rows[i] for i in few(lengths, PROMPTS)]
        ids = [tokens for row in chosen for tokens in row["input_ids"]]
        batch = trainer.data_collator(chosen)
        pairs = ordered_pairs(batch["ratings"], batch["prompt"], min_difference=config.min_rating_difference)
        intended = of_adapter(model, f"{_ADAPTER}|{_HEAD}" if lora else ".")
        problems = uncovered(model, config.lora_target_modules, [classifier.score]) if lora else []
        trained = check_trainable(model, intended, problems)
        with stirred(intended):
            gradients, activations = _gradients(ground, trainer, intended, chosen)
            scorer = Scorer(model, ground.tokenizer, ground.compute, SCORED)
            saved = [check_company(scorer, ids[:SCORED])]
            if lora:
                saved += _saved(ground, model, intended, partial(scorer.raw, ids[:SCORED]), "scores")
        states = _states(ground, trainer, intended)
    largest = sum(sorted(lengths)[-config.per_device_train_batch_size :])
    return [
        *check_data(ground, classifier, by="row"),
        *loaded,
        check_rankings(ground.tokenizer, batch, len(pairs.better)),
        trained,
        gradients,
        *saved,
        states,
        *_room(ground, intended, activations / sum(map(len, ids)), largest),
    ]


def check_company(scorer: Scorer, rows: Sequence[Sequence[int]]) -> Check:
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
    return of_company(worst, told, limit)


def of_company(worst: float, how: str, limit: float) -> Check:
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
    ground: Ground, trainer: Any, intended: Mapping[str, nn.Parameter], rows: list[dict[str, Any]]
) -> tuple[Check, float]:
    """Where the run's own loss of a few rows sends gradients, and the bytes that it keeps for its backward pass."""
    model, rehearsal = trainer.model, copy.copy(trainer)
    rehearsal._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}  # the run's own start empty
    model.train()
    if ground.config.gradient_checkpointing:  # as the trainer does when it starts
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    batch = rehearsal._prepare_inputs(trainer.data_collator(rows))
    kept = Kept(model)
    with direct_casting(model, ground.compute), kept.counted():
        with trainer.accelerator.autocast():
            loss = rehearsal.compute_loss(model, batch)
        loss.backward()
    check = check_gradients(model, intended)
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    return check, float(kept.peak)


def _saved(
    ground: Ground, model: Any, intended: Mapping[str, nn.Parameter], said: Callable[[], Tensor], what: str
) -> list[Check]:
    """What saving, loading and merging the adapter change in what is said."""

    def save(folder: Path) -> None:
        save_adapter(model, folder, adapter="default", base_model="preflight")

    def load(folder: Path) -> None:
        read_adapter(model, folder, adapter="default")

    with direct_casting(model, ground.compute):
        checks = [check_reload(intended, save, load, said, ground.folder)]
        if ground.config.quantization == "none" and not ground.config.use_dora:  # else it is merged in another way
            unmerged = said()
            with emptied({name: p for name, p in intended.items() if ".lora_" in name}):
                without = said()
            with merged_adapter(model, "default"):
                checks.append(check_merged(unmerged, said(), without, ground.compute, what))
    return checks


def _states(ground: Ground, trainer: Any, intended: Mapping[str, nn.Parameter]) -> Check:
    """What the optimiser of transformers' Trainer keeps."""
    forget_overrides()  # as the stage does when it starts to train
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return check_optimizer(
        intended.values(),
        lambda parameters: kind(parameters, **settings),
        smallest=MIN_8BIT_SIZE if ground.config.optim == "adamw_8bit" else None,
    )


def _room(ground: Ground, intended: Mapping[str, nn.Parameter], bytes_per_token: float, tokens: int) -> list[Check]:
    parameters = list(intended.values())
    return [
        check_disk(parameters, ground.config, ground.folder, ground.registry),
        check_memory(parameters, ground.config, ground.compute.device, activations=bytes_per_token, tokens=tokens),
    ]
