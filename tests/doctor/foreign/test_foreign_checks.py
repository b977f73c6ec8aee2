"""Health checks on other projects' logs: those that have their data run, the others say what the log lacks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from foreign_logs import grpo_rows, verl_line, verl_row, write_lines, write_state, write_wandb

from rlhf.doctor.foreign.checks import Examination, examine
from rlhf.doctor.foreign.command import main
from rlhf.doctor.foreign.reading import read_runs
from rlhf.doctor.health.findings import CHECKS


def examined(file: Path, stage: str | None = None) -> Examination:
    """The examination of the one run of a file."""
    (run,) = read_runs(file, stage)
    return examine(run)


def names(examination: Examination) -> list[str]:
    """The checks that found something."""
    return [finding.name for finding in examination.findings]


def grpo(tmp_path: Path, steps: int = 12, **changes: list[float]) -> Examination:
    """The examination of a GRPO run with these columns."""
    return examined(write_state(tmp_path / "trainer_state.json", grpo_rows(steps, **changes)))


def test_a_healthy_run_has_no_finding_and_each_check_of_its_stage_ran_or_says_why_not(tmp_path: Path) -> None:
    examination = grpo(tmp_path)
    assert names(examination) == []
    ran = {check.name for check in examination.ran}
    assert {"not_finite", "entropy_collapse", "cut_off", "kl_high", "length_up", "gradient_spike"} <= ran
    assert not ran & examination.left_out.keys()
    assert len(ran) + len(examination.left_out) == sum("ppo" in check.stages for check in CHECKS)
    assert examination.left_out["steps_too_large"] == "no figure of TRL is ppo/approx_kl"
    assert examination.left_out["sampler_mismatch"] == "the log has no `sampling/sampling_logp_difference/mean`"
    assert "within the groups of one prompt" in examination.left_out["reward_falling"]


def test_entropy_collapse_is_found(tmp_path: Path) -> None:
    examination = grpo(tmp_path, entropy=[1.0] * 6 + [0.19] * 6)
    assert names(examination) == ["entropy_collapse"]
    assert names(grpo(tmp_path, entropy=[1.0] * 6 + [0.21] * 6)) == []


@pytest.mark.parametrize(("kl", "found"), [(0.199, []), (0.201, ["wrong_reference"])])
def test_the_reference_has_a_wider_limit_on_a_rough_kl(tmp_path: Path, kl: float, found: list[str]) -> None:
    """Catches: our limit of 0.01 nats on a k3 that was measured in the course of an update; it is 20 there."""
    assert names(grpo(tmp_path, kl=[kl] * 12)) == found


@pytest.mark.parametrize(("kl", "found"), [(-0.49, []), (-0.51, ["negative_kl"])])
def test_a_negative_kl_of_trls_ppo_is_found_without_the_exact_one(tmp_path: Path, kl: float, found: list[str]) -> None:
    rows = [
        {"step": step, "objective/kl": 0.0 if step == 1 else kl, "policy/approxkl_avg": 0.001, "lr": 1e-6}
        for step in range(1, 7)
    ]
    assert names(examined(write_state(tmp_path / "trainer_state.json", rows))) == found


@pytest.mark.parametrize(("entropy", "found"), [(0.041, []), (0.039, ["entropy_collapse"])])
def test_an_entropy_over_padding_has_a_stricter_limit(tmp_path: Path, entropy: float, found: list[str]) -> None:
    """Catches: our limit of 20% on a mean in which longer answers are a fall."""
    rows = [
        {"step": step, "objective/kl": 0.0, "policy/entropy_avg": 2.0 if step < 4 else entropy, "loss/policy_avg": 0.0}
        for step in range(1, 7)
    ]
    assert names(examined(write_state(tmp_path / "trainer_state.json", rows))) == found


def test_a_negative_kl_within_its_noise_is_none(tmp_path: Path) -> None:
    rows = [
        {"step": step, "objective/kl": -0.6 + 2 * (-1) ** step, "policy/approxkl_avg": 0.001, "lr": 1e-6}
        for step in range(1, 7)
    ]
    assert names(examined(write_state(tmp_path / "trainer_state.json", rows))) == []


def test_the_first_update_is_not_guessed_where_lines_are_counted(tmp_path: Path) -> None:
    """Catches: a line that is the mean of ten updates taken for the first of them."""
    file = tmp_path / "console"
    file.write_text("\n".join(str({**row, "step": None, "kl": 0.5}) for row in grpo_rows()))
    examination = examined(file)
    assert names(examination) == []
    assert examination.run.log.notes == ["no steps are in the log, so its lines are counted"]
    assert examination.left_out["wrong_reference"] == "which line is of the first update is not in the log"


def test_rewards_that_are_rare_at_first_are_not_constant(tmp_path: Path) -> None:
    assert names(grpo(tmp_path, reward_std=[0.0] * 12)) == ["reward_constant"]
    examination = grpo(tmp_path, reward_std=[0.0] * 11 + [0.1])
    assert names(examination) == []
    assert "reward_constant" in examination.left_out


def test_one_gradient_that_is_not_finite_is_a_step_that_fp16_skipped_and_two_are_a_fault(tmp_path: Path) -> None:
    norms = [0.4] * 12
    norms[3] = math.inf
    examination = grpo(tmp_path, grad_norm=norms)
    assert names(examination) == []
    assert "fp16" in examination.run.log.notes[0]
    norms[4] = math.nan
    assert names(grpo(tmp_path, grad_norm=norms)) == ["not_finite"]


def test_lines_of_verl_are_checked(tmp_path: Path) -> None:
    """Catches: a check that is run without its data, and one that is not run with it."""
    file = tmp_path / "train.log"
    file.write_text("\n".join(verl_line(verl_row(step, critic__vf_explained_var=-0.5)) for step in range(1, 21)))
    examination = examined(file)
    assert names(examination) == ["value_useless"]
    assert {"slowing_down", "steps_too_large", "advantages_not_centred"} <= {check.name for check in examination.ran}
    assert "no spread" in examination.left_out["reward_falling"]


@pytest.mark.parametrize(("clipped", "found"), [(0.5, []), (0.501, ["steps_too_large"])])
def test_large_steps_are_found_without_the_largest_ratio(tmp_path: Path, clipped: float, found: list[str]) -> None:
    rows = [verl_row(step, actor__pg_clipfrac=clipped if step == 2 else 0.01) for step in (1, 2, 3)]
    examination = examined(write_lines(tmp_path / "a.jsonl", rows))
    assert names(examination) == found
    assert all("largest ratio" not in finding.evidence for finding in examination.findings)


def test_accuracy_of_a_classifier_is_not_that_of_a_reward_model_unless_it_is_said(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 0.69, "learning_rate": 1e-5, "eval_accuracy": 0.5} for step in range(1, 5)]
    file = write_state(tmp_path / "trainer_state.json", rows)
    assert names(examined(file)) == []
    examination = examined(file, "reward")
    assert names(examination) == ["accuracy_at_chance"]
    margins = write_state(tmp_path / "b.json", [{**row, "margin": 0.1} for row in rows])
    assert names(examined(margins)) == ["accuracy_at_chance"]


def test_accuracy_of_dpo_is_not_held_against_a_reward_models_limit(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 0.69, "rewards/margins": 0.0, "eval_rewards/accuracies": 0.5, "rewards/chosen": 0.0}
        for step in range(1, 5)
    ]
    examination = examined(write_state(tmp_path / "trainer_state.json", rows))
    assert names(examination) == []
    assert "implicit reward" in examination.left_out["accuracy_at_chance"]


def test_the_kl_target_of_a_config_is_used(tmp_path: Path) -> None:
    rows = [
        {"objective/kl": 20.0, "objective/kl_coef": 0.1, "ppo/mean_scores": 1.0, "tokens/responses_len_mean": 30.0}
        for _ in range(12)
    ]
    examination = examined(write_wandb(tmp_path / "a.wandb", rows, {"target": 6, "batch_size": 128}))
    assert examination.run.kind.title == "TRL to 0.11, PPO"
    assert "controller_saturated" in names(examination)
    examination = examined(write_wandb(tmp_path / "a.wandb", rows, {}))
    assert examination.left_out["controller_saturated"] == "the run's KL target is not known"


def test_the_command_prints_findings_and_what_could_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: another exit code than 1 for findings and 0 for none, and a check that is left out without a word."""
    good = write_state(tmp_path / "checkpoint-9" / "trainer_state.json", grpo_rows(), max_steps=12)
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "TRL, GRPO, RLOO" in text and "12 logged steps, steps 1 to 12" in text
    assert "max_steps 12, step size in the log 1e-06 throughout" in text
    assert "13 checks on 12 logged updates, nothing found" in text
    assert "sampled texts are not in such a log" in text
    write_state(good, grpo_rows(entropy=[1.0] * 6 + [0.1] * 6))
    assert main([str(good)]) == 1
    assert "entropy_collapse" in capsys.readouterr().out


def test_each_run_of_a_file_is_examined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "a.jsonl", [*grpo_rows(12, entropy=[1.0] * 6 + [0.1] * 6), *grpo_rows(12)])
    assert main([str(file)]) == 1
    text = capsys.readouterr().out
    assert "run 1 of 2" in text and "run 2 of 2" in text
