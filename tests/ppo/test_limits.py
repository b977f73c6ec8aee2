"""Every limit of the PPO loop: just inside it nothing happens, just outside it acts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo.conftest import Make
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig
from rlhf.ppo import functional as F
from rlhf.ppo.credit import Credit
from rlhf.ppo.state import MAX_ROLL_BACKS, Order
from rlhf.ppo.trainer import KLLimitPassed, PPOTrainer
from rlhf.ppo.types import Rollout

#: Two optimiser steps a rollout, of four responses each.
TWO_STEPS: dict[str, Any] = {"rollout_batch_size": 8, "minibatch_size": 4, "total_episodes": 24}
FAST: dict[str, Any] = {"learning_rate": 2e-2, "lr_scheduler_type": "constant_with_warmup"}


@pytest.mark.parametrize("on_max_kl", ["stop", "roll_back"])
def test_max_kl_is_the_exact_kl_of_a_rollout(on_max_kl: str, make: Make) -> None:
    """Catches: max_kl acting at a multiple of its value, at a mean over tokens, or at the estimate from sampled tokens."""
    trainer = make("llama", on_max_kl=on_max_kl)
    trainer.state.save()
    rollout, _ = trainer.collect()
    kl = float(rollout.full_kl[rollout.mask].sum()) / len(rollout)
    estimate = float((rollout.logprobs - rollout.ref_logprobs)[rollout.mask].sum()) / len(rollout)
    assert kl > 0.1 and abs(estimate / kl - 1) > 0.01, "the toy must tell them apart"
    trainer.config.max_kl = 0.999 * kl
    error = UserError if on_max_kl == "stop" else KLLimitPassed
    with pytest.raises(error, match=f"{kl:.3g} nats a response after update 0, above max_kl"):
        trainer.step()
    assert trainer.state.updates_done == 0 and not trainer.state.optimizer.state, "nothing may be trained on it"
    trainer.config.max_kl = 1.001 * kl
    trainer.step()
    assert trainer.state.updates_done == 1


def test_max_approx_kl_is_that_of_a_minibatch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a limit acting at a multiple of its value, on a sum over tokens, or on the mean of the whole rollout so far."""
    losses: list[tuple[Tensor, Tensor]] = []
    policy_loss = F.policy_loss

    def spy(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **kwargs: float) -> tuple[Tensor, Tensor]:
        losses.append(((old - new.detach())[mask], mask))
        return policy_loss(new, old, advantages, mask, **kwargs)

    monkeypatch.setattr("rlhf.ppo.gradients.F.policy_loss", spy)
    options = {**TWO_STEPS, **FAST, "microbatch_size": 2}
    make(folder="unlimited", **options).step()
    assert [len(mask) for _, mask in losses] == [2] * 4, "two microbatches in each of two minibatches"
    x = torch.cat([log_ratio for log_ratio, _ in losses[2:]])
    approx_kl = float((torch.exp(-x) - 1 + x).mean())
    assert approx_kl > 1e-4
    for share, steps in ((0.999, 1), (1.001, 2)):
        trainer = make(folder=str(share), max_approx_kl=share * approx_kl, **options)
        count: list[int] = []
        trainer.state.optimizer.register_step_post_hook(lambda *_, count=count: count.append(1))
        assert trainer.step()["ppo/early_stop"] == 2 - steps
        assert len(count) == steps


def test_kl_error_of_the_controller_is_clipped_at_a_fifth() -> None:
    """Catches: another clip of the error, on either side."""
    settings = {"target": 5.0, "horizon": 100, "episodes": 10}
    errors = {error: F.adapted_kl_coef(1.0, 5.0 * (1 + error), **settings) - 1 for error in (-0.21, -0.19, 0.19, 0.21)}
    assert errors == {
        -0.21: pytest.approx(-0.02),
        -0.19: pytest.approx(-0.019),
        0.19: pytest.approx(0.019),
        0.21: pytest.approx(0.02),
    }


def test_kl_target_is_held_against_the_kl_of_sampled_tokens(make: Make) -> None:
    """Catches: a controller that acts at a multiple of its target, or on the exact KL, which the reward does not hold."""
    coefs = []
    for share in (None, 0.9, 1.1):
        trainer = make("llama", folder=str(share), kl_coef=0.2, kl_horizon=100)
        rollout, _ = trainer.collect()
        kl = float((rollout.logprobs - rollout.ref_logprobs)[rollout.mask].sum()) / len(rollout)
        trainer.config.kl_target = None if share is None else share * kl
        trainer.step()
        coefs.append(trainer.state.kl_coef)
    step = len(rollout) / 100
    assert coefs == [
        0.2,
        pytest.approx(0.2 * (1 + (1 / 0.9 - 1) * step)),
        pytest.approx(0.2 * (1 + (1 / 1.1 - 1) * step)),
    ]


def test_a_run_goes_back_three_times(make: Make) -> None:
    """Catches: one time more or less than the option's help says."""
    text = {field.name: field.metadata["help"] for field in dataclasses.fields(PPOConfig)}["on_max_kl"]
    assert MAX_ROLL_BACKS == 3 and "three times at most" in text
    trainer = make(fresh=True)
    order = Order(action="roll_back", reason="the toy is sick")
    trainer.state.save()
    for _ in range(3):
        trainer.state.updates_done = 1
        assert trainer.follow(order) == -1
    trainer.state.updates_done = 1
    with pytest.raises(UserError, match=r"the toy is sick; the last good checkpoint is .*checkpoint-0"):
        trainer.follow(order)


def shifted(trainer: PPOTrainer, rollout: Rollout, error: float) -> tuple[Rollout, Credit]:
    """The rollout with old log-probabilities that put all first ratios off 1 by `error`."""
    zeros = torch.zeros_like(rollout.values)
    old = (rollout.logprobs - math.log1p(error)) * rollout.mask
    credit = Credit(advantages=zeros, returns=zeros, metrics={})
    return dataclasses.replace(rollout, logprobs=old), credit


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("side", [1, -1])
def test_first_ratios_may_be_off_by_rounding_only(dtype: str, tolerance: float, side: int, make: Make) -> None:
    """Catches: a tolerance that lets stale log-probabilities pass, or stops a run for rounding."""
    trainer = make("llama", dtype=dtype, learning_rate=0.0)
    rollout, _ = trainer.collect()
    trainer.optimise(*shifted(trainer, rollout, side * 0.9 * tolerance))
    with pytest.raises(RuntimeError, match="the first probability ratio of a rollout is off 1 by"):
        trainer.optimise(*shifted(trainer, rollout, side * 1.1 * tolerance))


@pytest.mark.parametrize("side", [1, -1])
def test_clip_ranges_are_those_of_the_config(side: int, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a clip range that is halved, doubled or swapped with the other between the config and the losses."""
    options = {"clip_range": 0.3, "clip_range_value": 0.07, "vf_coef": 1.0, "learning_rate": 0.0}
    trainer = make("gpt2", **options)
    rollout, _ = trainer.collect()
    monkeypatch.setattr("rlhf.ppo.trainer.RATIO_TOLERANCE", {torch.float64: 1.0})
    ones = rollout.mask.to(rollout.values.dtype)
    for share, clipped in ((0.99, 0.0), (1.01, 1.0)):
        old, _ = shifted(trainer, rollout, side * share * 0.3)
        old = dataclasses.replace(old, values=(rollout.values - side * share * 0.07) * rollout.mask)
        far = (rollout.values + side * 5) * rollout.mask  # the values move towards their targets, out of the range
        metrics = trainer.optimise(old, Credit(advantages=side * ones, returns=far, metrics={}))
        assert metrics["ppo/clipfrac"] == metrics["ppo/value_clipfrac"] == clipped


def test_snapshots_and_checkpoints_are_due_at_their_steps(make: Make) -> None:
    """Catches: a step too early or too late; the last update always has both."""
    trainer = make(rollout_batch_size=4, minibatch_size=4, total_episodes=28, save_steps=3, snapshot_steps=3)
    states: list[list[str]] = []

    def observe(update: int, metrics: object) -> None:
        states.append(names(trainer.outputs.folder))

    trainer.observe = observe
    trainer.train()
    both = ["checkpoint-3", "snapshot-3"]
    assert states == [[], [], [], both, both, both, sorted([*both, "checkpoint-6", "snapshot-6"])]
    assert names(trainer.outputs.folder) == ["checkpoint-6", "checkpoint-7", "snapshot-3", "snapshot-6", "snapshot-7"]


def names(folder: Path) -> list[str]:
    """Names in the folder of checkpoints, by update."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
