"""Optimisers and schedules."""

from __future__ import annotations

import math

import bitsandbytes
import pytest
import torch
from test_models import ppo_config

from rlhf.run import optim


def test_heads_keep_32_bits_however_wide() -> None:
    """Catches: 8-bit states for the head of a 7B model, which is as wide as bitsandbytes' limit."""
    head = torch.nn.Parameter(torch.zeros(1, 4096))
    matrix = torch.nn.Parameter(torch.zeros(16, 4096))
    optimizer = optim.build_optimizer([{"params": [head, matrix]}], ppo_config(optim="adamw_8bit"))
    for parameter in (head, matrix):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kinds = [{t.dtype for t in _tensors(optimizer.state[p]) if t.shape == p.shape} for p in (head, matrix)]
    assert kinds == [{torch.float32}, {torch.uint8}]


def test_an_earlier_optimiser_of_the_process_says_nothing_about_this_one() -> None:
    """Catches: an adapter whose states are kept in 32 bits because an embedding stood at its place in an earlier training."""
    embedding = torch.nn.Embedding(16, 4096)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    earlier = bitsandbytes.optim.AdamW8bit(embedding.parameters())
    matrix = torch.nn.Parameter(torch.zeros(16, 4096))
    embedding.weight.grad = torch.ones_like(embedding.weight)
    earlier.step()
    later = optim.build_optimizer([{"params": [matrix]}], ppo_config(optim="adamw_8bit"))
    matrix.grad = torch.ones_like(matrix)
    later.step()
    kinds = [{t.dtype for t in _tensors(o.state) if t.shape == matrix.shape} for o in (earlier, later)]
    assert kinds == [{torch.float32}, {torch.uint8}]


def _tensors(node: object) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    return [t for value in node.values() for t in _tensors(value)] if isinstance(node, dict) else []


@pytest.mark.parametrize(
    ("name", "end"), [("constant_with_warmup", 1.0), ("linear", 0.0), ("cosine", 0.0), ("cosine_with_min_lr", 0.1)]
)
def test_schedules_have_their_shape(name: str, end: float) -> None:
    """Catches: a schedule counted in other units, a warm-up that is left out or starts at 0, so that the first step is lost, a
    floor that is not there, and one group's step size for both."""
    policy, value = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    config = ppo_config(lr_scheduler_type=name, warmup_steps=4, learning_rate=2e-3)
    optimizer = optim.build_optimizer([{"params": [policy]}, {"params": [value], "lr": 3e-3}], config)
    scheduler = optim.build_scheduler(optimizer, config, 24)
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(1.5 * rates[-1])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([2e-4, 6.5e-4, 1.1e-3, 1.55e-3, 2e-3])
    half = {"constant_with_warmup": 1.0, "linear": 0.5, "cosine": 0.5, "cosine_with_min_lr": 0.55}[name]
    assert rates[14] == pytest.approx(2e-3 * half) and rates[24] == pytest.approx(2e-3 * end, abs=1e-9)
    assert all(math.isfinite(rate) for rate in rates)


def test_a_run_without_warmup_starts_at_its_peak() -> None:
    """Catches: a division by the zero steps of no warm-up, and a first step at a tenth that nobody asked for."""
    config = ppo_config(lr_scheduler_type="linear", warmup_steps=0, learning_rate=2e-3)
    optimizer = optim.build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], config)
    optim.build_scheduler(optimizer, config, 24)
    assert optimizer.param_groups[0]["lr"] == 2e-3
