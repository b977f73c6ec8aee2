"""The preflight of pretraining on models with and without a fault."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import build_model

from rlhf.doctor.preflight.pretrain import check_causal

IDS = torch.randint(3, 60, (1, 33), generator=torch.Generator().manual_seed(0))


class SeesAhead:
    """A model each of whose logits depends on the whole row."""

    config = SimpleNamespace(vocab_size=60)

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        mean = input_ids.float().mean() * torch.ones(*input_ids.shape, 60)
        return SimpleNamespace(logits=mean)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_model_passes(family: str) -> None:
    """A check that fails on healthy models is switched off by everybody."""
    assert check_causal(build_model(family, 60), IDS).passed


def test_a_model_that_sees_ahead_is_found() -> None:
    """Its loss falls to almost nothing, and what it has learned is to copy."""
    assert not check_causal(SeesAhead(), IDS).passed
