"""Preflight of pretraining, on one batch of its own blocks, model and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.models import check_gradients, check_optimizer, check_trainable, preserve_state
from rlhf.doctor.preflight.room import ActivationMeter, check_disk, check_memory
from rlhf.models.compute import Compute
from rlhf.run.optim import MIN_8BIT_SIZE


def pretrain(trainer: Any, compute: Compute, folder: Path, registry: Path) -> list[Check]:
    """Every check of a pretraining run.

    Args:
        trainer: with the fresh model and the packed text.
        folder: of the run.
        registry: its root.
    """
    model, config, blocks = trainer.model, trainer.config, trainer.train_dataset
    parameters = dict(model.named_parameters())
    with preserve_state(model, compute.device):
        batch = trainer.data_collator([blocks[0]])["input_ids"].to(compute.device)
        causal = check_causal(model.eval(), batch)
        trained = check_trainable(model, parameters)
        model.train()
        kept = ActivationMeter(model)
        with kept.counted(), compute.autocast():
            loss = trainer.compute_loss(model, {"input_ids": batch})
        loss.backward()
        gradients = check_gradients(model, parameters)
        model.zero_grad()
        kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        states = check_optimizer(
            parameters.values(),
            lambda some: kind(some, **settings),
            smallest=MIN_8BIT_SIZE if config.optim == "adamw_8bit" else None,
        )
    weights, tokens = list(parameters.values()), batch.shape[1] - 1
    return [
        causal,
        trained,
        gradients,
        states,
        check_disk(weights, config, folder, registry),
        check_memory(
            weights,
            config,
            compute.device,
            activations=kept.peak / tokens,
            tokens=tokens * config.per_device_train_batch_size,
        ),
    ]


@torch.no_grad()
def check_causal(model: Any, ids: torch.Tensor) -> Check:
    """That no token sees the ones after it: with other ones in the second half, logits of the first half stay as they are.

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
        passed=difference < 1e-3,
        measured=f"logits differ by {difference:.2g} at most when later tokens change (limit 0.001)",
        cause="the attention mask is not causal, so the loss would measure copying",
        fix="use attn_implementation sdpa or eager",
    )
