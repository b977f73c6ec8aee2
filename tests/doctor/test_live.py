"""The doctor beside a running trainer: what it says, when it stops or sends back, and that it costs the run nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import Call

from rlhf.doctor.live import QUIET_UPDATES, LiveDoctor
from rlhf.doctor.statements import Statement
from rlhf.run.tracker import Tracker


@pytest.fixture
def alerts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the alerts that were sent."""
    sent: list[str] = []
    monkeypatch.setattr(Tracker, "alert", lambda self, title, text, severity: sent.append(f"{severity} {title}"))
    return sent


def doctor(folder: Path, *words: str, **settings: Any) -> LiveDoctor:
    tracker = Tracker(folder, stage="ppo", name="toy", group="toy", config={}, wandb_mode="disabled")
    return LiveDoctor("ppo", words or ["warn"], tracker, settings)


def test_a_finding_is_told_once_while_it_lasts(
    tmp_path: Path, alerts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a line at every update, which nobody reads, and silence when the trouble comes back."""
    watched = doctor(tmp_path)
    within = 7 + QUIET_UPDATES
    again = within + QUIET_UPDATES + 1
    sick = [*range(2, 8), within, again]
    for step in range(1, again + 1):
        bursts = {"ppo/approx_kl": 1.0 if step in sick else 0.001, "ppo/clipfrac": 0.0, "ppo/ratio_max": 1.0}
        watched.examine(step, bursts)
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps_too_large" in line]
    assert [line.split(":")[0] for line in lines] == ["doctor, update 2", f"doctor, update {again}"]
    assert "approx_kl 1 nats" in lines[0] and "Cause: " in lines[0] and "To do: " in lines[0]
    assert alerts == [
        "critical ppo: steps_too_large at update 2",
        f"critical ppo: steps_too_large at update {again}",
    ]


@pytest.mark.parametrize(
    ("words", "action"),
    [
        (["warn"], None),
        (["off"], None),
        (["stop"], "stop"),
        (["roll_back"], "roll_back"),
        (["stop", "reward_constant=off"], None),
        (["off", "reward_constant=stop"], "stop"),
        (["stop", "reward_constant=roll_back"], "roll_back"),
    ],
)
def test_a_finding_gives_the_order_of_its_action(
    words: list[str], action: str | None, tmp_path: Path, alerts: list[str]
) -> None:
    """Catches: a check's own action that loses to the general one, or the other way round."""
    watched = doctor(tmp_path, *words)
    assert watched.observe(1, {"objective/score_std": 0.0}) is None
    order = watched.observe(2, {"objective/score_std": 0.0})
    assert (order and order.action) == action
    assert order is None or "reward_constant: spread of the scores 0" in order.reason
    silent = "off" in words[-1]
    assert bool(alerts) != silent
    assert watched.may_roll_back == any("roll_back" in word for word in words)


@pytest.mark.parametrize(
    ("word", "severity", "stops"),
    [
        ("warn", "critical", False),
        ("stop", "critical", True),
        ("roll_back", "critical", True),
        ("stop", "warning", False),
        ("stop", "note", False),
        ("off", "critical", False),
    ],
)
def test_failed_statements_are_reported_as_findings_are(
    word: str, severity: Any, stops: bool, tmp_path: Path, alerts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: an audit that fails in silence, a step back that cannot mend it, and a stop for a warning."""
    watched = doctor(tmp_path, word)
    failed = Statement(
        part="audit",
        name="returns",
        passed=False,
        measured="off by 2",
        severity=severity,
        cause="c",
        action="a",
        step=3,
    )
    passed = Statement(part="audit", name="values", passed=True, measured="equal", step=3)
    order = watched.examine_statements([passed, failed])
    assert (order is not None) == stops
    assert order is None or (order.action == "stop" and "update 3: returns: off by 2. Cause: c" in order.reason)
    said = capsys.readouterr().out
    if word == "off" or severity == "note":
        assert alerts == [] and said == ""
    else:
        assert alerts == [f"{severity} ppo: returns at update 3"]
        assert said == "doctor, update 3: returns: off by 2. Cause: c. To do: a\n"


def test_live_symptoms_know_what_the_audit_excludes(
    tmp_path: Path, alerts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a line in the log that offers a cause which an audit of the same run has excluded."""
    watched = doctor(tmp_path)
    watched.examine_statements(
        [Statement(part="audit", name="whitened_advantages", passed=True, measured="equal", step=1)]
    )
    watched.examine(2, {"ppo/advantage_mean": 0.5})
    assert "its usual causes are excluded" in capsys.readouterr().out


def test_updates_that_were_undone_are_forgotten(tmp_path: Path) -> None:
    """Catches: a run that went back, at max_kl too, and is judged by updates that it no longer holds, or by one twice."""
    watched = doctor(tmp_path)
    for step in (1, 2, 3):
        watched.tracker.log({"objective/score_std": float(step)}, step)
        watched.observe(step, {"objective/score_std": float(step)})
    (tmp_path / "metrics.jsonl").write_text("")
    for step in (1, 2):  # back after update 3, and update 2 comes again
        watched.tracker.log({"objective/score_std": 10.0 + step}, step)
    watched.observe(2, {"objective/score_std": 12.0})
    assert watched.history.values("objective/score_std") == [11.0, 12.0]


def test_a_resumed_run_knows_what_was_logged(tmp_path: Path, alerts: list[str]) -> None:
    """Catches: checks that start from nothing after each interruption, and updates that were undone."""
    watched = doctor(tmp_path)
    watched.tracker.log({"objective/score_std": 0.0}, 1)
    position = watched.tracker.position()
    for step in (2, 3):
        watched.tracker.log({"objective/score_std": 1.0}, step)
    watched.read_log()
    assert watched.history.values("objective/score_std") == [0.0, 1.0, 1.0] and watched.history.step == 3
    watched.tracker.rewind(position)
    watched.read_log()
    watched.examine(2, {"objective/score_std": 0.0})
    assert alerts == ["critical ppo: reward_constant at update 2"]


@pytest.mark.parametrize("action", ["warn", "stop", "roll_back"])
def test_supervised_stage(action: str, call: Callable[..., Call], toy_config: Path, tmp_path: Path) -> None:
    """Catches: checks that a Hugging Face trainer never feeds, and a stop that loses the checkpoint or registers the result."""
    done = call(
        "rlhf.stages.sft", "--config", toy_config / "sft.yaml", "--registry", tmp_path / "registry", "--output_dir",
        tmp_path / "out", "--learning_rate", "0", "--max_steps", "6", "--save_steps", "6", "--eval_steps", "6",
        "--doctor", "off", f"learning_rate_zero={action}",  # the review would stop it before
    )  # fmt: skip
    told = [line for line in done.out.splitlines() if line.startswith("doctor, update 3: learning_rate_zero")]
    assert len(told) == 1
    registered = list((tmp_path / "registry").glob("sft/*"))
    if action == "warn":
        assert done.code == 0 and registered
        return
    assert "learning rate 0 in all 3 updates" in done.complaint and "--doctor warn" in done.complaint
    assert not registered
    assert [p.name for p in (tmp_path / "out" / "sft" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]


def test_option_is_checked_before_the_run(call: Callable[..., Call], toy_config: Path, tmp_path: Path) -> None:
    """Catches: a slip in the option that shows at the first finding, hours into a run, or after the stages before."""
    output = ["--output_dir", tmp_path / "out", "--registry", tmp_path / "registry"]
    for words in (("rlhf.stages.sft", "--config", toy_config / "sft.yaml"), ("rlhf.pipeline", "--config", toy_config)):
        refused = call(*words, *output, "--doctor", "los_flat=off")
        assert refused.complaint == "error: doctor: no check 'los_flat' (did you mean 'loss_flat'?)"
        assert not (tmp_path / "out").exists()
