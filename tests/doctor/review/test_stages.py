"""The review in a stage: statements in its folder, a line for each finding, and a stop before the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from rlhf.base.errors import UserError
from rlhf.base.reading import FolderReader
from rlhf.config import PPOConfig, SFTConfig
from rlhf.doctor import statements
from rlhf.doctor.live import LiveDoctor
from rlhf.doctor.review import answer_limits, inputs
from rlhf.doctor.review.command import main
from rlhf.run.tracker import Tracker
from rlhf.stages import sft

#: Nearly 400 times the step size that suits a width of 32.
ABSURD = 5.0


@pytest.fixture
def options(toy_config: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a toy SFT stage."""
    values = yaml.safe_load((toy_config / "sft.yaml").read_text())
    places = {"registry": str(tmp_path / "registry"), "output_dir": str(tmp_path / "out")}
    return {**values, **places, "wandb_mode": "disabled", "device": "cpu", "learning_rate": 0.01, "preflight": False}


def reviewed(options: dict[str, Any]) -> dict[str, statements.Statement]:
    folder = Path(options["output_dir"]) / "sft"
    return {s.name: s for s in statements.read(FolderReader(folder)) if s.part == "review"}


def test_statements_are_kept_without_the_preflight_too(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a review that hangs on the preflight, forgets what is right, or prints notes."""
    sft.run(SFTConfig(**options), only_preflight=True)
    own = reviewed(options)
    assert own["learning_rate"].passed and own["empty"].passed
    assert not own["updates"].passed and own["updates"].severity == "note"
    assert "doctor, " not in capsys.readouterr().out


def test_a_finding_is_a_line_and_stops_where_the_doctor_shall(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: an order to stop that only the health checks follow, and one that is followed without being given, or a
    finding without its alert."""
    alerts: list[str] = []
    monkeypatch.setattr(Tracker, "alert", lambda self, title, text, severity: alerts.append(f"{severity} {title}"))
    absurd = {**options, "learning_rate": ABSURD}
    sft.run(SFTConfig(**absurd), only_preflight=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor, ")]
    assert line.startswith("doctor, the start: learning_rate: step size") and "To do: lower learning_rate" in line
    assert alerts == ["critical sft: learning_rate at the start"]
    with pytest.raises(UserError, match=r"learning_rate.*Stopped before the training; --doctor warn goes on"):
        sft.run(SFTConfig(**absurd, doctor=["stop"]), only_preflight=True)


def test_a_false_finding_can_be_silenced_alone(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a finding that its user knows to be false, and that ends the run or takes all others along."""
    absurd = {**options, "learning_rate": ABSURD, "adam_epsilon": 2.0}
    sft.run(SFTConfig(**absurd, doctor=["stop", "learning_rate=off", "adam_epsilon=warn"]), only_preflight=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor, ")]
    assert line.startswith("doctor, the start: adam_epsilon")
    assert not reviewed(options)["learning_rate"].passed
    with pytest.raises(UserError, match="the start: adam_epsilon"):
        sft.run(SFTConfig(**absurd, doctor=["roll_back", "learning_rate=off"]), only_preflight=True)


def test_a_consequence_has_no_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a reward of the wrong size that fills the screen with the options that do not suit it."""
    common: dict[str, Any] = {"part": "review", "passed": False, "measured": "x", "cause": "y", "action": "z"}
    cause = statements.Statement(name="reward_scale", explains=["kl_coef"], **common)
    effect = statements.Statement(name="kl_coef", **common)
    for words in (["warn"], ["warn", "reward_scale=off"]):
        assert LiveDoctor("ppo", words, Mock(run_dir=tmp_path), {}).examine_statements([cause, effect]) is None
    lines = [line.split()[3].rstrip(":") for line in capsys.readouterr().out.splitlines()]
    assert lines == ["reward_scale", "kl_coef"]


def test_without_the_doctor_nothing_is_reviewed(options: dict[str, Any]) -> None:
    """Catches: a review that cannot be left out."""
    sft.run(SFTConfig(**{**options, "learning_rate": ABSURD}, doctor=["off"]), only_preflight=True)
    assert reviewed(options) == {}


def test_data_that_cannot_be_reviewed_stops_no_stage(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a stage that fails in its review, where it could train or say better what is wrong."""
    monkeypatch.setattr(inputs.texts, "of_demonstrations", lambda rows, figures: 1 / 0)
    sft.run(SFTConfig(**options), only_preflight=True)
    assert "the data is not reviewed: division by zero" in capsys.readouterr().err
    assert reviewed(options)["learning_rate"].passed


def test_the_command_shows_what_is_unusual(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a verb that trains, hides its sources, or whose exit code does not tell findings from notes."""
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(options))
    assert main(["--config", str(file)]) == 0
    assert main(["--config", str(file), "--learning_rate", str(ABSURD)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "critical learning_rate: step size" in shown and "source: Schulman et al. 2025" in shown
    assert not Path(options["output_dir"]).exists()


def test_figures_of_answers_by_hand() -> None:
    """Four answers of scores -3, 1, 1, 1: mean 0, spread the root of 3; one of them is beyond a clip of 2."""
    config = PPOConfig(name="x", dataset="x", reward_clip=2.0)
    figures = answer_limits.of_answers(
        torch.tensor([-3.0, 1.0, 1.0, 1.0]), [4, 4, 6, 6], [True, False, True, True], config
    ).values
    assert figures["score_spread"] == pytest.approx(3**0.5)
    assert (figures["clipped"], figures["sampled_tokens"], figures["unfinished"]) == (0.25, 5.0, 0.25)
    assert "length_score" not in figures  # too few


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_are_compared_with_length_and_judge(sign: float) -> None:
    """Catches: a correlation of other columns, or of the wrong sign."""
    scores, config = torch.arange(30.0), PPOConfig(name="x", dataset="x")
    figures = answer_limits.of_answers(scores, (sign * scores).tolist(), [True] * 30, config, -sign * scores).values
    assert figures["length_score"] == pytest.approx(sign) and figures["judge_score"] == pytest.approx(-sign)
