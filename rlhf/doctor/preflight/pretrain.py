"""Preflight of pretraining, on one batch of its own blocks, model and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.models import (
    EQUAL_WITHIN,
    check_gradients,
    check_trainable,
    check_trainer_optimizer,
    preserve_state,
)
from rlhf.doctor.preflight.room import ActivationMeter, check_disk, check_memory
from rlhf.models.compute import Compute


def pretrain(trainer: Any, compute: Compute, folder: Path, registry: Path) -> list[Check]:
    """Return every check of a pretraining run.

    Args:
        trainer: with the fresh model and the packed text.
        folder: of the run.
        registry: its root.
    """
    model, config = trainer.model, trainer.config
    parameters = dict(model.named_parameters())
    with preserve_state(model, compute.device):
        batch = trainer.data_collator([trainer.train_dataset[0]])["input_ids"].to(compute.device)
        causal = check_causal(model.eval(), batch)
        trainable = check_trainable(model, parameters)
        model.train()
        meter = ActivationMeter(model)
        with meter.counted(), compute.autocast():
            loss = trainer.compute_loss(model, {"input_ids": batch})
        loss.backward()
        gradients = check_gradients(model, parameters)
        model.zero_grad()
        states = check_trainer_optimizer(trainer, parameters.values(), config)
    weights, tokens = list(parameters.values()), batch.shape[1] - 1
    return [
        causal,
        trainable,
        gradients,
        states,
        check_disk(weights, config, folder, registry),
        check_memory(
            weights,
            config,
            compute.device,
            activations=meter.peak / tokens,
            tokens=tokens * config.per_device_train_batch_size,
        ),
    ]


@torch.no_grad()
def check_causal(model: Any, ids: torch.Tensor) -> Check:
    """Check that logits do not depend on later tokens: those of the first half, while the second half changes.

    Args:
        ids: (1, T).
    """
    half = ids.shape[1] // 2
    other = ids.clone()
    other[:, half:] = (other[:, half:] + 1) % model.config.vocab_size
    first, second = (model(input_ids=row[:, :-1], use_cache=False).logits[:, :half] for row in (ids, other))
    difference = float((first - second).abs().max())
    return Check(
        name="no token sees later ones",
        passed=difference < EQUAL_WITHIN,
        measured=f"logits differ by {difference:.2g} at most when later tokens change (limit {EQUAL_WITHIN:g})",
        cause="the attention mask is not causal, so the loss would measure copying",
        fix="use attn_implementation sdpa or eager",
    )
