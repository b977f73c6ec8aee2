"""Figures of other projects in our names and units: the right value is the test."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf.doctor.foreign import llama_factory, openrlhf, own, swift, trl, verl
from rlhf.doctor.foreign.figure import Kind
from rlhf.doctor.foreign.page import tables as page_tables
from rlhf.doctor.foreign.reading import KINDS
from rlhf.doctor.health.check import HealthCheck
from rlhf.doctor.health.findings import CHECKS
from rlhf.run.metrics import METRICS

CASES: tuple[tuple[Kind, Mapping[str, float], Mapping[str, float]], ...] = (
    (
        trl.GRPO,
        {
            "kl": 0.02,
            "completions/mean_length": 150.0,
            "completions/clipped_ratio": 0.25,
            "reward": 0.5,
            "reward_std": 0.2,
        },
        {
            "objective/kl_k3": 3.0,
            "response/length": 150.0,
            "response/stop_rate": 0.75,
            "objective/score": 0.5,
            "objective/raw_score": 0.5,
            "objective/score_std": 0.2,
        },
    ),
    (trl.GRPO, {"kl": 0.02, "completion_length": 50.0}, {"objective/kl_k3": 1.0, "response/length": 50.0}),
    (trl.GRPO, {"kl": 0.02}, {}),  # nats a token without a length are no nats a response
    (
        trl.PPO,
        {"objective/kl": 7.0, "objective/scores": 1.5, "policy/approxkl_avg": 0.01, "lr": 3e-6, "episode": 640.0},
        {
            "objective/kl": 7.0,
            "objective/kl_k3": 7.0,
            "objective/score": 1.5,
            "ppo/approx_kl": 0.01,
            "ppo/lr": 3e-6,
            "episodes": 640.0,
        },
    ),
    (
        trl.OLD_PPO,
        {"ppo/mean_scores": 1.0, "env/reward_mean": 2.0, "ppo/std_scores": 0.5, "tokens/responses_len_mean": 30.0},
        {
            "objective/score": 1.0,
            "objective/raw_score": 1.0,
            "objective/score_std": 0.5,
            "response/length": 30.0,
        },
    ),
    (
        trl.REWARD,
        {"loss": 0.6, "eval_accuracy": 0.7, "accuracy": 0.8, "margin": 0.4, "learning_rate": 1e-5, "grad_norm": 2.0},
        {
            "reward/loss": 0.6,
            "reward/eval_accuracy": 0.7,
            "reward/accuracy": 0.8,
            "reward/margin": 0.4,
            "reward/lr": 1e-5,
            "reward/grad_norm": 2.0,
        },
    ),
    (
        verl.PPO,
        {
            "critic/kl": -0.01,
            "response_length/mean": 300.0,
            "response_length/clip_ratio": 0.1,
            "actor/lr(1e-4)": 0.01,
            "critic/advantages/mean": 0.002,
            "timing_s/old_log_prob": 5.0,
            "timing_s/ref": 4.0,
            "timing_s/update_actor": 7.0,
        },
        {
            "objective/kl": -3.0,
            "objective/kl_k3": -3.0,
            "response/length": 300.0,
            "response/stop_rate": 0.9,
            "ppo/lr": 1e-6,
            "ppo/advantage_mean": 0.002,
            "time/score": 9.0,
            "time/optimise": 7.0,
        },
    ),
    (verl.GRPO, {"critic/advantages/mean": 0.2}, {}),
    (verl.SFT, {"loss": 1.5, "lr(1e-3)": 0.02}, {"sft/loss": 1.5, "sft/lr": 2e-5}),
    (
        openrlhf.PPO,
        {"kl": 0.01, "response_length": 200.0, "rollout/truncated_rate": 0.2, "actor_lr": 5e-7, "return": 0.3},
        {
            "objective/kl": 2.0,
            "objective/kl_k3": 2.0,
            "response/length": 200.0,
            "response/stop_rate": 0.8,
            "ppo/lr": 5e-7,
            "objective/rlhf_reward": 0.3,
        },
    ),
    (
        openrlhf.REWARD,
        {
            "loss_mean": 0.6,
            "loss": 0.1,
            "acc_mean": 0.7,
            "chosen_reward": 1.0,
            "reject_reward": 0.25,
            "eval_acc_mean": 0.65,
        },
        {"reward/loss": 0.6, "reward/accuracy": 0.7, "reward/margin": 0.75, "reward/eval_accuracy": 0.65},
    ),
    (openrlhf.SFT, {"gpt_loss": 2.0, "eval_eval gpt_loss": 1.9}, {"sft/loss": 2.0, "sft/eval_loss": 1.9}),
    (swift.SFT, {"loss": 1.0, "token_acc": 0.8}, {"sft/loss": 1.0, "sft/token_accuracy": 0.8}),
    (swift.REWARD, {"eval_rewards/accuracies": 0.6}, {"reward/eval_accuracy": 0.6}),
    (
        llama_factory.PPO,
        {"loss": 0.3, "reward": 1.2, "lr": 1e-5},
        {"ppo/policy_loss": 0.3, "objective/score": 1.2, "objective/raw_score": 1.2, "ppo/lr": 1e-5},
    ),
)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"), CASES, ids=[f"{case[0].title} {place}" for place, case in enumerate(CASES)]
)
def test_figures_have_our_names_and_units(kind: Kind, theirs: Mapping[str, float], ours: Mapping[str, float]) -> None:
    """Catches: nats a token read as nats a response, a share read as its complement, a step size a thousand times too large."""
    assert kind.convert(theirs) == pytest.approx(ours, rel=1e-12, abs=0)


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    """Catches: a figure or a conversion that was changed without the page; `python -m rlhf.doctor.foreign.page` prints them."""
    page = (Path(__file__).parents[3] / "docs" / "foreign.md").read_text(encoding="utf-8")
    assert page[page.index("### TRL") :] == page_tables()


def test_all_names_of_ours_exist() -> None:
    """Catches: a figure of a health check that was renamed, and that foreign logs feed no more."""
    ours = {name for kind in KINDS for figure in kind.figures for name in (*figure.ours, *figure.near)}
    assert ours - METRICS.keys() - {"episodes", "reward/lr", "reward/grad_norm"} == set()


def test_all_checks_that_are_named_exist_with_their_limits() -> None:
    """Catches: a check or a limit that was renamed, so that a figure is held against a limit that is not for it."""
    checks: dict[str, HealthCheck] = {check.name: check for check in CHECKS}
    for kind in KINDS:
        for figure in kind.figures:
            assert {*figure.unfit, *kind.apart} <= checks.keys()
            for name, limits in figure.limits.items():
                assert limits.keys() <= checks[name].limits.keys()


def test_a_figure_that_is_none_of_ours_says_what_it_is() -> None:
    """Catches: "the log has X, which is" without an end."""
    for kind in KINDS:
        for figure in kind.figures:
            assert figure.ours or (figure.near and figure.meaning), (kind.title, figure.theirs)
            assert figure.meaning or not figure.unfit, (kind.title, figure.theirs)
            assert figure.source or kind in own.KINDS, (kind.title, figure.theirs)


@pytest.mark.parametrize(
    ("kind", "file"),
    [(trl.GRPO, "grpo"), (trl.SFT, "sft"), (trl.REWARD, "reward"), (trl.PREFERENCE, "dpo")],
    ids=["grpo", "sft", "reward", "dpo"],
)
def test_names_are_those_of_the_installed_trl(kind: Kind, file: str) -> None:
    """Catches: a metric that TRL renames: of each figure that its trainer makes, one name stands in the source."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "trainer" / f"{file}_trainer.py").read_text(encoding="utf-8")
    for figure in kind.figures:
        if f"{file}_trainer.py" in figure.source:
            assert any(f'"{name.removeprefix("eval_")}"' in source for name in figure.theirs), figure.theirs
