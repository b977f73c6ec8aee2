"""Limits of the review: each edge just inside and just outside, and each quantity of options by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import STAGE_CONFIGS
from rlhf.doctor.health.findings import CHECKS
from rlhf.doctor.review import tables
from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.limits import Limit, judge
from rlhf.doctor.review.tables import ANSWER_TABLE, INPUT_LIMITS, TABLES

LIMITS = [limit for limits in TABLES.values() for limit in limits]
ROOT = Path(__file__).parents[3]


def facts(stage: str, figures: dict[str, float] | None = None, rows: int | None = 2000, **options: Any) -> Facts:
    """Facts of a stage at the demo's width."""
    base: dict[str, Any] = {"name": "x", "dataset": "x"}
    if stage == "sft":
        base["model_name_or_path"] = "x"
    if stage == "ppo":
        base |= {"total_episodes": 1920, "rollout_batch_size": 64, "minibatch_size": 32, "response_length": 40}
    config = STAGE_CONFIGS[stage](**{**base, "learning_rate": 1e-3, "warmup_steps": 4, **options})
    return Facts(stage=stage, config=config, width=576, rows=rows, figures=figures or {})


def severity(statement: Any) -> str:
    return "ordinary" if statement.passed else statement.severity


def edges() -> list[Any]:
    rows = []
    for limit in LIMITS:
        for sign, side in ((-1, limit.low), (1, limit.high)):
            if side is None:
                continue
            levels = [
                (name, edge) for name in ("note", "warning", "critical") if (edge := getattr(side, name)) is not None
            ]
            inside = "ordinary"
            for name, edge in levels:
                rows.append(
                    pytest.param(limit, edge, sign, inside, name, id=f"{limit.name}-{limit.stages[0]}-{sign}-{name}")
                )
                inside = name
    return rows


@pytest.mark.parametrize(("limit", "edge", "sign", "inside", "outside"), edges())
def test_each_edge_has_its_severity(limit: Limit, edge: float, sign: int, inside: str, outside: str) -> None:
    """Catches: an edge of the wrong side or order, and a comparison that includes the edge."""
    stage = limit.stages[0]
    step = sign * max(abs(edge), 1e-12) * 1e-6
    for value, expected in ((edge - step, inside), (edge, inside), (edge + step, outside)):
        statement = dataclasses.replace(limit, measure=lambda f, value=value: value, extra=None).judge(facts(stage))
        assert statement is not None and severity(statement) == expected
        assert statement.passed == (not statement.cause)


#: Stage, name, options of an ordinary run, and of runs just inside and just outside an edge with their severities.
CASES: list[tuple[str, str, list[tuple[dict[str, Any], str]]]] = [
    # The step size that suits a width of 576 with alpha 32 is 5e-4 x (2000 / 576) ^ 0.781 = 1.322e-3.
    ("sft", "learning_rate", [({"learning_rate": 3.96e-3}, "ordinary"), ({"learning_rate": 3.98e-3}, "note"),
                              ({"learning_rate": 7.9e-3}, "note"), ({"learning_rate": 7.97e-3}, "warning"),
                              ({"learning_rate": 1.98e-2}, "warning"), ({"learning_rate": 1.99e-2}, "critical")]),
    # Twice the alpha is twice the step; with rsLoRA alpha counts times the root of the rank.
    ("sft", "learning_rate", [({"learning_rate": 1.98e-3, "lora_alpha": 64}, "ordinary"),
                              ({"learning_rate": 1.99e-3, "lora_alpha": 64}, "note"),
                              ({"learning_rate": 0.99e-3, "lora_alpha": 32, "lora_r": 16, "use_rslora": True}, "ordinary"),
                              ({"learning_rate": 0.995e-3, "lora_alpha": 32, "lora_r": 16, "use_rslora": True}, "note")]),
    ("reward", "learning_rate", [({"learning_rate": 7.9e-4, "finetuning": "full"}, "note"),
                                 ({"learning_rate": 8e-4, "finetuning": "full"}, "warning")]),
    # 60 updates of a thousandth of the usual step size reach 0.06.
    ("ppo", "reach", [({"learning_rate": 1.2e-5}, "note"), ({"learning_rate": 1.1e-5}, "warning"),
                      ({"learning_rate": 1.2e-6}, "warning"), ({"learning_rate": 1.1e-6}, "critical"),
                      ({"learning_rate": 0.0}, "critical")]),
    ("sft", "warmup", [({"max_steps": 100, "warmup_steps": 40}, "ordinary"), ({"max_steps": 100, "warmup_steps": 41}, "note"),
                       ({"max_steps": 100, "warmup_steps": 100}, "warning"),
                       ({"max_steps": 100, "warmup_steps": 201}, "critical")]),
    ("ppo", "warmup", [({"warmup_steps": 24}, "ordinary"), ({"warmup_steps": 25}, "note"),  # of 60 updates
                       ({"warmup_steps": 60}, "warning"), ({"warmup_steps": 121}, "critical")]),
    ("ppo", "schedule", [({"lr_scheduler_type": "constant_with_warmup", "learning_rate": 1.3e-3}, "ordinary"),
                         ({"lr_scheduler_type": "constant_with_warmup", "learning_rate": 1.4e-3}, "note")]),
    ("ppo", "adam_epsilon", [({"adam_epsilon": 1e-5}, "ordinary"), ({"adam_epsilon": 2e-4}, "note"),
                             ({"adam_epsilon": 0.02}, "warning"), ({"adam_epsilon": 1e4}, "critical")]),
    # A beta1 of .99 remembers 100 updates, of 60.
    ("ppo", "adam_beta1", [({"adam_beta1": 0.98}, "ordinary"), ({"adam_beta1": 0.99}, "note"),
                           ({"adam_beta1": 0.995}, "warning")]),
    ("sft", "max_grad_norm", [({"max_grad_norm": 0.05}, "ordinary"), ({"max_grad_norm": 0.04}, "note"),
                              ({"max_grad_norm": 9e-5}, "warning")]),
    ("sft", "weight_decay", [({"max_steps": 100, "weight_decay": 0.1}, "ordinary"),
                             ({"max_steps": 100, "weight_decay": 6}, "note"),
                             ({"max_steps": 100, "weight_decay": 31}, "warning")]),
    ("reward", "epochs", [({"num_train_epochs": 3}, "ordinary"), ({"num_train_epochs": 4}, "note")]),
    # 2,000 rows in batches of 64: 94 updates are 3.008 passes.
    ("reward", "epochs", [({"max_steps": 93}, "ordinary"), ({"max_steps": 94}, "note")]),
    ("reward", "label_smoothing", [({"label_smoothing": 0.3}, "ordinary"), ({"label_smoothing": 0.46}, "warning")]),
    # .8 ^ 20 = 1.2%, .79 ^ 20 = 0.9%: half of response_length, where nothing better is known.
    ("ppo", "gamma", [({"gamma": 1.0}, "ordinary"), ({"gamma": 0.983}, "ordinary"), ({"gamma": 0.98}, "note"),
                      ({"gamma": 0.9}, "note"), ({"gamma": 0.89}, "warning"), ({"gamma": 0.8}, "warning"),
                      ({"gamma": 0.79}, "critical"), ({"gamma": 0.5}, "critical")]),
    ("ppo", "lam", [({"lam": 0.9}, "ordinary"), ({"lam": 0.89}, "note"), ({"lam": 0.49}, "warning"), ({"lam": 0.0}, "critical")]),
    ("ppo", "clip_range", [({"clip_range": 0.05}, "ordinary"), ({"clip_range": 0.04}, "note"), ({"clip_range": 0.004}, "warning"),
                           ({"clip_range": 1e-4}, "critical"), ({"clip_range": 0.5}, "note"), ({"clip_range": 1.1}, "warning")]),
    ("ppo", "reuse", [({"num_ppo_epochs": 4, "clip_range": 0.3}, "ordinary"), ({"num_ppo_epochs": 10, "clip_range": 0.2}, "note"),
                      ({"num_ppo_epochs": 10, "clip_range": 0.5}, "warning")]),
    # Values may move by clip_range_value x 30 rollouts, beside a spread of 1.
    ("ppo", "value_clip", [({"clip_range_value": 0.034}, "ordinary"), ({"clip_range_value": 0.033}, "note"),
                           ({"clip_range_value": 0.0099}, "warning"), ({"clip_range_value": 1e-4}, "critical")]),
    ("ppo", "kl_coef", [({"kl_coef": 0.05}, "ordinary"), ({"kl_coef": 0.33}, "ordinary"), ({"kl_coef": 0.34}, "note"),
                        ({"kl_coef": 2.2}, "note"), ({"kl_coef": 2.3}, "warning"), ({"kl_coef": 11.0}, "critical"),
                        ({"kl_coef": 0.0084}, "ordinary"), ({"kl_coef": 0.0083}, "note"), ({"kl_coef": 4.9e-4}, "warning")]),
    ("ppo", "no_penalty", [({"kl_coef": 0.005}, "ordinary"), ({"kl_coef": 0.004}, "note"), ({"kl_coef": 0.0}, "warning")]),
    ("ppo", "kl_target", [({"kl_target": 1.0}, "ordinary"), ({"kl_target": 0.9}, "note"), ({"kl_target": 0.1}, "warning")]),
    # exp(.2 x 1920 / horizon) - 1
    ("ppo", "kl_horizon", [({"kl_target": 6.0, "kl_horizon": 1460}, "ordinary"),
                           ({"kl_target": 6.0, "kl_horizon": 10_000}, "note"),
                           ({"kl_target": 6.0, "kl_horizon": 400_000}, "warning")]),
    ("ppo", "temperature", [({"temperature": 0.7}, "ordinary"), ({"temperature": 0.6}, "note"),
                            ({"temperature": 0.39}, "warning"),
                            ({"temperature": 1.4}, "note"), ({"temperature": 1.9}, "warning")]),
    ("ppo", "reward_clip", [({"reward_clip": 0.5}, "ordinary"), ({"reward_clip": 0.4}, "note"),
                            ({"reward_clip": 0.09}, "warning"),
                            ({"reward_clip": 0.005}, "critical")]),
    ("ppo", "missing_eos_penalty", [({"missing_eos_penalty": 5.0}, "ordinary"), ({"missing_eos_penalty": 6.0}, "note"),
                                    ({"missing_eos_penalty": 51.0}, "warning"), ({"missing_eos_penalty": -0.3}, "warning")]),
    ("ppo", "value_loss", [({"vf_coef": 0.1}, "ordinary"), ({"vf_coef": 0.009}, "note"), ({"vf_coef": 0.0}, "critical")]),
    ("ppo", "trunk_share", [({"vf_coef": 1.0, "value_model": "shared_trunk"}, "ordinary"),
                            ({"vf_coef": 1.1, "value_model": "shared_trunk"}, "note"),
                            ({"vf_coef": 11.0, "value_model": "shared_trunk"}, "warning")]),
    ("ppo", "value_warmup", [({"value_warmup_updates": 12}, "ordinary"), ({"value_warmup_updates": 13}, "note"),
                             ({"value_warmup_updates": 30}, "critical")]),
    ("ppo", "value_learning_rate", [({"value_learning_rate": 1e-3}, "ordinary"), ({"value_learning_rate": 0.0}, "critical"),
                                    ({"value_learning_rate": 0.014}, "warning")]),
    ("ppo", "min_response_length", [({"min_response_length": 24, "short_response_penalty": 0.1}, "ordinary"),
                                    ({"min_response_length": 25, "short_response_penalty": 0.1}, "note"),
                                    ({"min_response_length": 40, "short_response_penalty": 0.1}, "warning")]),
    ("ppo", "ema_decay", [({"ema_decay": 0.98}, "ordinary"), ({"ema_decay": 0.99}, "note"), ({"ema_decay": 0.9992}, "warning")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "name", "options", "expected"),
    [(stage, name, options, level) for stage, name, rows in CASES for options, level in rows],
)
def test_options_inside_and_outside(stage: str, name: str, options: dict[str, Any], expected: str) -> None:
    """Catches: a quantity computed wrongly, in another unit, or from another option."""
    (statement,) = [s for s in judge(INPUT_LIMITS, facts(stage, **options)) if s.name == name]
    assert severity(statement) == expected, statement.measured


def test_quantities_that_do_not_apply_are_left_out() -> None:
    """Catches: an alarm about a limit that has no meaning in the run."""
    names = {
        s.name
        for s in judge(
            INPUT_LIMITS, facts("ppo", reward=["x:y"], learning_rate=1e-3, num_ppo_epochs=1, minibatch_size=64)
        )
    }
    # A function's spread is unknown before it scored; one update a rollout sees no other policy; no target, no horizon.
    assert not names & {
        "kl_coef",
        "value_clip",
        "reward_clip",
        "clip_range",
        "kl_target",
        "kl_horizon",
        "reach",
        "no_penalty",
    }
    unknown = dataclasses.replace(facts("sft", rows=None), width=None)
    assert not {s.name for s in judge(INPUT_LIMITS, unknown)} & {"learning_rate", "reach", "warmup", "updates"}


def test_what_does_not_apply_to_trials_and_constant_scores() -> None:
    """Catches: a trial of a few updates that is called wrong, and scores all alike that are called too small."""
    (warmup,) = [s for s in judge(INPUT_LIMITS, facts("sft", max_steps=9, warmup_steps=100)) if s.name == "warmup"]
    assert warmup.severity == "note"
    constant = judge(ANSWER_TABLE, facts("ppo", {"score_spread": 0.0, "score_size": 1.0}, reward=["x:y"]))
    assert [s.name for s in constant if not s.passed] == ["reward_constant"]


def test_a_schedule_that_never_peaks_shortens_the_reach() -> None:
    """A warm-up of ten times the run ends at 0.1 + 0.9 / 10 of the peak in PPO, and at 1 / 10 elsewhere."""
    assert facts("ppo", warmup_steps=600).peak == pytest.approx(0.19)
    assert facts("sft", max_steps=60, warmup_steps=600).peak == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("figures", "options", "name", "expected"),
    [
        ({"score_spread": 1000.0, "score_size": 3000.0}, {}, "reward_scale", "critical"),
        ({"score_spread": 29.0, "score_size": 90.0}, {}, "reward_scale", "warning"),
        ({"score_spread": 2.9, "score_size": 9.0}, {}, "reward_scale", "ordinary"),
        ({"score_spread": 0.009, "score_size": 9.0}, {}, "reward_scale", "critical"),
        # A function's scores, where the options are made for a spread of 1: 0.05 and 0.2.
        ({"score_spread": 4.9, "score_size": 9.0}, {"reward": ["x:y"], "kl_coef": 0.05}, "reward_scale", "ordinary"),
        ({"score_spread": 49.0, "score_size": 99.0}, {"reward": ["x:y"], "kl_coef": 0.05}, "reward_scale", "note"),
        ({"score_spread": 51.0, "score_size": 99.0}, {"reward": ["x:y"], "kl_coef": 0.05}, "reward_scale", "warning"),
        ({"score_spread": 301.0, "score_size": 999.0}, {"reward": ["x:y"], "kl_coef": 0.05}, "reward_scale", "critical"),
        # A thousand times larger with options that are: nothing is wrong.
        ({"score_spread": 1000.0, "score_size": 3e3}, {"reward": ["x:y"], "kl_coef": 50, "clip_range_value": 200.0},
         "reward_scale",
         "ordinary"),
        ({"score_spread": 0.0, "score_size": 1.0}, {"reward": ["x:y"]}, "reward_constant", "critical"),
        # 2 x 1.1e-3 below 0.05 / 0.1: the options' own unit is what is measured.
        ({"score_spread": 2.0, "score_size": 9.0}, {"reward": ["x:y"], "kl_coef": 4.0}, "kl_coef", "note"),
        ({"score_spread": 2.0, "score_size": 9.0}, {"reward": ["x:y"], "kl_coef": 4.5}, "kl_coef", "warning"),
        ({"sampled_tokens": 4.0}, {"gamma": 0.5}, "gamma", "warning"),  # .5 ^ 4 = 6.25%
        ({"clipped": 0.96}, {"reward_clip": 1.0}, "clipped", "warning"),
        ({"unfinished": 0.96}, {}, "unfinished", "critical"),
        ({"length_score": 0.99}, {}, "length_score", "warning"),
        ({"length_score": -0.92}, {}, "length_score", "note"),
    ],
)  # fmt: skip
def test_answers_inside_and_outside(
    figures: dict[str, float], options: dict[str, Any], name: str, expected: str
) -> None:
    """Catches: a reward of another scale that is let pass, and one whose options fit it that is not."""
    (statement,) = [s for s in judge(ANSWER_TABLE, facts("ppo", figures, **options)) if s.name == name]
    assert severity(statement) == expected, statement.measured


def test_what_is_explained_exists() -> None:
    """Catches: a symptom or statement that was renamed."""
    names = {check.name for check in CHECKS} | {limit.name for limit in LIMITS}
    for limit in LIMITS:
        for side in filter(None, (limit.low, limit.high)):
            assert set(side.explains) <= names, limit.name


def test_findings_name_what_they_explain() -> None:
    """Catches: a finding beside which its symptoms would stand as causes of their own."""
    for limit in LIMITS:
        for side in filter(None, (limit.low, limit.high)):
            assert side.explains or side.warning is side.critical is None or limit.name in ("adam_beta2", "margin"), (
                limit.name
            )


def test_the_tables_of_the_docs_are_those_of_the_code() -> None:
    """Catches: a limit that was changed without the page. `python -m rlhf.doctor.review.tables` prints the tables."""
    assert tables.markdown() in (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
