"""The SFT stage's own loss, which a CPU takes in place of TRL's."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from toys import BENT, build_bent, build_model

from rlhf.models.adapters import with_adapter
from rlhf.stages import sft


@pytest.mark.parametrize("family", ["llama", *BENT])
def test_the_loss_on_a_cpu_is_that_of_the_models_logits(family: str) -> None:
    """Catches: a loss of the bare head's product where the model scales or caps its logits: it would learn those instead."""
    base = build_bent(family, 60) if family in BENT else build_model(family, 60, dtype=torch.float64)
    model: Any = with_adapter(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    logprobs = model(input_ids=ids).logits.detach().log_softmax(dim=-1)
    picked = [logprobs[b, t - 1, ids[b, t]] for b in range(2) for t in range(4, 9)]
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m: m, autocast=contextlib.nullcontext),
        args=SimpleNamespace(device=torch.device("cpu")),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _nats=0.0,
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loss = sft.AnswerTrainer.compute_loss(trainer, model.eval(), inputs).detach()
    assert float(loss) == pytest.approx(-float(torch.stack(picked).mean()), abs=1e-5)
