"""The doctor in the PPO loop: stops with a checkpoint, goes back with a remedy, and changes nothing by looking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ppo.conftest import Make
from ppo.test_trainer import weights

from rlhf.base.errors import UserError
from rlhf.doctor.health.check import Remedy
from rlhf.doctor.health.findings import find
from rlhf.doctor.health.history import History
from rlhf.doctor.live import LiveDoctor
from rlhf.ppo.state import MAX_ROLL_BACKS, Order
from rlhf.ppo.trainer import PPOTrainer
from rlhf.run import checkpoint
from rlhf.run.tracker import Tracker

FAST: dict[str, Any] = {
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant_with_warmup",
    "save_steps": 1,
    "total_episodes": 48,
}


def doctor_of(trainer: PPOTrainer) -> LiveDoctor:
    """The doctor that observes the trainer."""
    doctor = trainer.observe.__self__  # type: ignore[attr-defined]
    assert isinstance(doctor, LiveDoctor)
    return doctor


def test_a_run_stops_with_a_checkpoint_and_goes_on_when_told(make: Make) -> None:
    """Catches: an update that is lost, a stop without a checkpoint, and a run that can never be resumed."""
    trainer = make(fresh=True, doctor=["stop", "reward_scale=warn"], **{**FAST, "save_steps": 100})
    trainer.environment.reward = lambda responses: (torch.ones(len(responses.texts)), {})  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"doctor, update 2: reward_constant: .*--resume true --doctor warn"):
        trainer.train()
    folder = trainer.outputs.folder
    assert trainer.state.updates_done == 2 and checkpoint.latest(folder) == folder / "checkpoint-2"
    again = make(fresh=True, doctor=["warn"], resume=True, **FAST)
    assert again.state.resume() == 2
    again.train()
    assert again.state.updates_done == 6


@pytest.mark.parametrize("remedy", ["learning_rate", "kl_coef"])
def test_a_run_goes_back_with_the_remedy(remedy: Remedy, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: going on from the weights that were found sick, a remedy that is not applied, or lost by a resumed run, a
    history that still holds the updates that were undone, and an endless loop."""
    trainer = make(fresh=True, doctor=["roll_back"], kl_coef=0.2, **FAST)
    start, doctor, state = weights(trainer.models), doctor_of(trainer), trainer.state
    histories: list[list[int]] = []

    def sick(step: int, metrics: Mapping[str, float]) -> Order | None:
        doctor.observe(step, metrics)
        histories.append(doctor.history.steps)
        return Order(action="roll_back", reason="the toy is sick", remedy=remedy) if step == 2 else None

    trainer.observe = sick
    moves: list[int] = []
    states: list[dict[str, float]] = []
    follow = trainer.follow

    def spy(order: Order) -> int:
        moves.append(follow(order))
        lr = state.optimizer.param_groups[0]["lr"]
        states.append({"lr": lr, "kl_coef": state.kl_coef, "at": state.updates_done})
        return moves[-1]

    monkeypatch.setattr(trainer, "follow", spy)
    with pytest.raises(UserError, match="the toy is sick; the last good checkpoint is"):
        trainer.train()
    assert moves == [-1] * MAX_ROLL_BACKS and histories == [[1]] + [[1, 2]] * (MAX_ROLL_BACKS + 1)
    lr, kl = (2e-2 / 2, 0.2) if remedy == "learning_rate" else (2e-2, 0.4)
    assert states[0] == {"lr": pytest.approx(lr), "kl_coef": pytest.approx(kl), "at": 1}
    assert states[2]["lr"] == pytest.approx(2e-2 / 8 if remedy == "learning_rate" else 2e-2)
    assert states[2]["kl_coef"] == pytest.approx(0.2 if remedy == "learning_rate" else 1.6)
    again = make(fresh=True, doctor=["roll_back"], kl_coef=0.2, **FAST)
    again.state.resume()
    assert again.state.kl_coef == states[2]["kl_coef"]
    assert again.state.learning_rate_scale == pytest.approx(states[2]["lr"] / 2e-2)
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights(again.models).items())


def test_watching_changes_nothing(make: Make) -> None:
    """Catches: a check that draws a random number or touches a tensor of the run."""
    ends = []
    for orders in (["off"], ["warn"]):
        trainer = make(fresh=True, folder=orders[0], doctor=orders, **FAST)
        trainer.train()
        ends.append(weights(trainer.models))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_live_findings_are_those_of_the_log(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: figures that the checks read under another name than they are logged."""
    alerts: list[str] = []
    monkeypatch.setattr(Tracker, "alert", lambda self, title, text, severity: alerts.append(f"{severity} {title}"))
    trainer = make(fresh=True, **{**FAST, "learning_rate": 0.0})
    trainer.train()
    assert alerts[0] == "critical ppo: learning_rate_zero at update 3"
    rows = [json.loads(line) for line in (trainer.outputs.folder.parent / "metrics.jsonl").read_text().splitlines()]
    found = [finding.name for finding in find(History("ppo", rows))]
    assert found == [finding.name for finding in find(doctor_of(trainer).history)] and "learning_rate_zero" in found
