"""The audit of whole runs: sound ones in all modes, what it leaves behind, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_runs import Start, start, statements, wrong
from safetensors.torch import load_file
from toys import Call

from rlhf.doctor.audit import quantities
from rlhf.doctor.audit.sheet import list_sheets
from rlhf.ppo import functional as F

__all__ = ["start"]

QUANTITIES = {quantity.name for quantity in quantities.PPO}
MODES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "8-bit states": {"optim": "adamw_8bit", "lora_r": 128},
    "4-bit base": {"quantization": "4bit", "dtype": "bfloat16"},
    "8-bit base": {"quantization": "8bit"},
    "full": {"finetuning": "full", "learning_rate": 1e-4, "optim": "adamw_8bit", "dtype": "bfloat16"},
    "shared trunk": {"value_model": "shared_trunk", "num_responses_per_prompt": 2},
    "two epochs, warm-up": {"num_ppo_epochs": 2, "value_warmup_updates": 1, "use_rslora": "true"},
    "DoRA, texts": {"use_dora": "true", "ptx_coef": 1.0, "max_prompt_length": 64},
    "cold": {"temperature": 0.7, "gamma": 0.9, "weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 0},
    "function": {"reward": "audit_runs:brevity"},
    "large scores": {"reward": "audit_runs:large", "whiten_rewards": "false", "lam": 1.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_sound_runs(mode: str, start: Start) -> None:
    """Catches: an accusation without a fault, and quantities that are silently left out."""
    folder = start(total_episodes=16, **MODES[mode])
    rows = statements(folder)
    assert wrong(rows) == []
    first = {one.name for one in rows if one.measured.startswith("not examined") and one.step == 1}
    unseen = {one.name for one in rows if one.measured.startswith("not examined") and one.step == 2}
    assert {one.step for one in rows} == {1, 2} and len(rows) == 2 * len(QUANTITIES)
    assert unseen == set()
    assert first == {"rollouts_differ", "weights_kept"} | ({"policy_loss"} if "warm-up" in mode else set())


def test_a_run_that_diverges(start: Start) -> None:
    """Catches: a step size that is too large called a fault of the computation: bf16 rounds more where weights are large."""
    assert wrong(statements(start(total_episodes=48, learning_rate=0.1, dtype="bfloat16"))) == []


def test_a_reward_that_remembers(start: Start) -> None:
    """Catches: a run that is accused because its reward scores the same texts otherwise the second time."""
    rows = statements(start(total_episodes=16, reward="audit_runs:novelty"))
    assert wrong(rows) == []
    measured = {one.measured for one in rows if one.name == "raw_scores"}
    assert measured == {"not examined: the function audit_runs:novelty does not give the same scores twice"}


def test_a_run_ends_in_the_same_bytes(start: Start) -> None:
    """Catches: a random number that the audit draws, a mode that it leaves behind, a gradient that it touches."""
    folders = [start(audit_steps=steps, dtype="bfloat16", optim="adamw_8bit") for steps in (0, 1)]
    assert not (folders[0] / "audit").exists() and len(list_sheets(folders[1])) == 2
    checkpoints = [load_file(folder / "checkpoints" / "checkpoint-3" / "weights.safetensors") for folder in folders]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(checkpoints[0][name].equal(checkpoints[1][name]) for name in checkpoints[0])


@pytest.mark.parametrize("action", ["warn", "roll_back"])
def test_a_fault_is_reported_at_once(
    action: str, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a finding that waits for the end of the run, and a run that goes on computing it wrongly."""
    gae = F.gae
    monkeypatch.setattr(F, "gae", lambda *a, gamma, lam: gae(*a, gamma=0.5, lam=lam))
    folder = start(may_fail=True, doctor=[action, "unfinished=off"])  # which the toy data are
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor, update 1: advantages")]
    assert len(lines) == 1 and "Cause: " in lines[0] and "To do: " in lines[0]
    assert {one.step for one in statements(folder)} == ({1, 2, 3} if action == "warn" else {1})
    assert ((folder / "checkpoints" / "checkpoint-1").is_dir()) == (action == "roll_back")


def test_the_command(start: Start, call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches: sheets that cannot be read afterwards, and exit codes that scripts cannot use."""
    sound = start()
    done = call("rlhf.doctor", "audit", sound.parent)
    lines = done.out.splitlines()
    assert done.code == 0 and lines[0] == "ppo, update 2" and len(lines) == 2 * (1 + len(QUANTITIES))
    assert sum(line.startswith("  ok    ") for line in lines) == 2 * len(QUANTITIES)
    with monkeypatch.context() as patch:
        whiten = F.whiten
        patch.setattr(F, "whiten", lambda x, mask: -whiten(x, mask))
        faulty = start()
    done = call("rlhf.doctor", "audit", faulty)
    assert (
        done.code == 1
        and [line.split(":")[0] for line in done.out.splitlines() if "WRONG" in line]
        == ["  WRONG whitened_advantages"] * 2
    )
    assert "the wrong sign" in done.out
    assert "no sheet of an audit" in call("rlhf.doctor", "audit", tmp_path).complaint
    for file in list_sheets(sound)[0].iterdir():
        file.write_text("{}")
    assert "is no sheet of an audit" in call("rlhf.doctor", "audit", sound).complaint


def test_sheets_of_undone_updates_are_removed(start: Start) -> None:
    """Catches: a diagnosis of updates that a run no longer holds."""
    folder = start(max_kl=1e-9, on_max_kl="roll_back", learning_rate=0.05, may_fail=True)
    assert wrong(statements(folder)) == []
    assert all(int(path.name.split("-")[1]) <= 2 for path in list_sheets(folder))
