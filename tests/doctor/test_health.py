"""Each check on hand-made histories: what it must find, and a healthy run in which it must find nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf.base.errors import UserError
from rlhf.doctor.audit import quantities, training_quantities
from rlhf.doctor.audit.compare import Quantity
from rlhf.doctor.health import supervised
from rlhf.doctor.health.check import HealthCheck, Remedy, Severity, Stage, registered
from rlhf.doctor.health.findings import CHECKS, MODULES, actions, find, reaction, replay
from rlhf.doctor.health.history import History
from rlhf.doctor.health.ppo_reward import reward_scale
from rlhf.doctor.review.tables import TABLES
from rlhf.doctor.statements import NAMES, Statement

UPDATES = 24
#: One figure of an update: (update, from 1; share of the run that is done; a draw with mean 0 and spread 1) -> value.
Course = Callable[[int, float, float], float | None]
SETTINGS: dict[str, Any] = {"reward": ["reward/demo"], "kl_target": 6.0, "max_grad_norm": 1.0, "rollout_batch_size": 64}

HEALTHY: dict[str, Course] = {
    "episodes": lambda n, t, e: 64 * n,
    "objective/score": lambda n, t, e: -0.1 + 1.5 * t + 0.05 * e,
    "objective/raw_score": lambda n, t, e: -0.1 + 1.5 * t + 0.05 * e,
    "objective/score_std": lambda n, t, e: 0.8 - 0.3 * t + 0.05 * e,
    "objective/length_correlation": lambda n, t, e: -0.3 + 0.1 * e,
    "objective/kl": lambda n, t, e: 7 * t + (0.3 * e if n > 1 else 0),
    "objective/kl_k3": lambda n, t, e: 7 * t + (abs(0.3 * e) if n > 1 else 0),
    "objective/kl_full": lambda n, t, e: 7 * t,
    "objective/kl_coef": lambda n, t, e: 0.1,
    "objective/entropy": lambda n, t, e: 4 - 1.2 * t + 0.05 * e,
    "objective/gold": lambda n, t, e: 0.1 + 0.5 * t + 0.05 * e,
    "objective/gold_correlation": lambda n, t, e: 0.5 + 0.1 * e,
    "eval/score": lambda n, t, e: -0.1 + 1.5 * t,
    "ppo/policy_loss": lambda n, t, e: 0.003 * e,
    "ppo/approx_kl": lambda n, t, e: 0.003 + 0.001 * e,
    "ppo/clipfrac": lambda n, t, e: 0.02 + 0.005 * e,
    "ppo/ratio_max": lambda n, t, e: 2 + 0.5 * e,
    "ppo/first_ratio_error": lambda n, t, e: 0.0,
    "ppo/explained_variance": lambda n, t, e: -0.3 + 1.5 * min(t * 2, 0.6) + 0.05 * e,
    "ppo/value_std": lambda n, t, e: 0.3 + 0.02 * e,
    "ppo/advantage_std": lambda n, t, e: 0.5 - 0.2 * t,
    "ppo/advantage_mean": lambda n, t, e: 1e-8 * e,
    "ppo/grad_norm": lambda n, t, e: 0.4 + 0.05 * e,
    "ppo/value_grad_norm": lambda n, t, e: 2 + 0.5 * e,
    "ppo/lr": lambda n, t, e: 1e-3 * (1 - t),
    "ppo/value_lr": lambda n, t, e: 1e-3 * (1 - t),
    "response/length": lambda n, t, e: 25 - 6 * t + e,
    "response/stop_rate": lambda n, t, e: min(1.0, 0.88 + 0.1 * t + 0.01 * e),
    "response/distinct_2": lambda n, t, e: 0.96 - 0.04 * t,
    "response/repetition": lambda n, t, e: 0.01,
    "rollout/logprob_gap": lambda n, t, e: 0.02 if n == 1 else 0.04,
    "rollout/surprise_gap": lambda n, t, e: 0.05 * e,
    "rollout/surprise_error": lambda n, t, e: 0.05,
    "rollout/pad_tokens": lambda n, t, e: 0.0,
    "time/rollout": lambda n, t, e: 5.0,
    "time/score": lambda n, t, e: 10.0,
    "time/optimise": lambda n, t, e: 10.0,
}
SUPERVISED: dict[str, Course] = {
    "loss": lambda n, t, e: 4.4 - 0.7 * min(1.0, 2 * t) + 0.05 * e,
    "grad_norm": lambda n, t, e: 0.4 + 0.05 * e,
    "lr": lambda n, t, e: 0.0 if n == 1 else 1e-3 * (1 - 0.9 * t),
    "accuracy": lambda n, t, e: 0.5 + 0.35 * min(1.0, 2 * t) + 0.03 * e,
}
EVALUATIONS = {
    "sft": {"sft/eval_loss": [4.5, 3.8, 3.7]},
    "reward": {"reward/eval_loss": [0.69, 0.5, 0.45], "reward/eval_accuracy": [0.5, 0.7, 0.75]},
}
SAMPLES = [
    {"step": 1, "prompt": f"user\nWhat is {word}?\nassistant\n", "response": f"{word} is good"} for word in "abcdefgh"
]
COMPARISON = [{"sft_response": f"{word} is bad", "ppo_response": f"{word} is good"} for word in "abcdefgh"]


def run(stage: str, changed: Mapping[str, Course] | None = None, **options: Any) -> History:
    """A run of a stage, healthy but for what is changed; `evaluations` replaces the held-out figures."""
    noise = random.Random(0)
    courses = HEALTHY if stage == "ppo" else {f"{stage}/{name}": course for name, course in SUPERVISED.items()}
    assert set(changed or {}) <= set(courses)
    rows: list[dict[str, Any]] = []
    evaluations = options.pop("evaluations", EVALUATIONS.get(stage, {}))
    for n in range(1, UPDATES + 1):
        t = (n - 1) / (UPDATES - 1)
        draws = {name: noise.gauss(0, 1) for name in courses}
        rows.append({"step": n, **{k: {**courses, **(changed or {})}[k](n, t, draws[k]) for k in courses}})
        if (n - 1) % 11 == 0:
            rows.append({"step": n, **{name: values[(n - 1) // 11] for name, values in evaluations.items()}})
    texts = {"samples": SAMPLES, "comparison": COMPARISON} if stage == "ppo" else {}
    return History(stage, rows, **{"settings": SETTINGS, **texts, **options})


def late(value: float) -> Course:
    """A figure that goes from 1 to this value."""
    return lambda n, t, e: 1 + (value - 1) * t


#: check -> (stage, what is changed in a healthy run, options of `run`)
SICK: dict[str, tuple[str, dict[str, Course], dict[str, Any]]] = {
    "not_finite": ("ppo", {"ppo/policy_loss": lambda n, t, e: None if n > 9 else 0.0}, {}),
    "learning_rate_zero": ("ppo", {"ppo/lr": lambda n, t, e: 0.0}, {}),
    "schedule_ended": ("ppo", {"ppo/lr": lambda n, t, e: max(1e-3 * (1 - 2 * t), 0.0)}, {}),
    "no_gradient": ("sft", {"sft/grad_norm": lambda n, t, e: 0.0}, {}),
    "loss_rising": ("sft", {"sft/loss": lambda n, t, e: 4.4 + 4 * t}, {}),
    "accuracy_below_chance": ("reward", {}, {"evaluations": {"reward/eval_accuracy": [0.5, 0.4, 0.3]}}),
    "accuracy_at_chance": ("reward", {}, {"evaluations": {"reward/eval_accuracy": [0.48, 0.52, 0.5]}}),
    "overfitted": (
        "reward",
        {"reward/loss": lambda n, t, e: 0.7 - 0.6 * t},
        {"evaluations": {"reward/eval_loss": [0.5, 0.6, 0.7]}},
    ),
    "loss_flat": ("sft", {"sft/loss": lambda n, t, e: 4.4}, {"evaluations": {"sft/eval_loss": [4.5, 4.5, 4.499]}}),
    "batch_spike": ("reward", {"reward/grad_norm": lambda n, t, e: 20.0 if n == 15 else 0.5}, {}),
    "wrong_reference": ("ppo", {"objective/kl_k3": lambda n, t, e: 3.0}, {}),
    "template_twice": (
        "ppo",
        {},
        {"samples": [{"step": 1, "prompt": f"user\nuser\n{w}\nassistant\n\nassistant\n"} for w in "abcd"]},
    ),
    "pad_is_stop": (
        "ppo",
        {"rollout/pad_tokens": lambda n, t, e: 0.9, "response/stop_rate": lambda n, t, e: 0.9},
        {},
    ),
    "padding_counted": ("ppo", {"rollout/pad_tokens": lambda n, t, e: 6 + e}, {}),
    "sampler_mismatch": ("ppo", {"rollout/surprise_gap": lambda n, t, e: -0.4 + 0.05 * e}, {}),
    "sampler_drift": ("ppo", {"rollout/logprob_gap": lambda n, t, e: 0.02 + 0.5 * t}, {}),
    "stale_logprobs": ("ppo", {"ppo/first_ratio_error": lambda n, t, e: 0.14 if n % 4 == 0 else 0.0}, {}),
    "advantages_not_centred": ("ppo", {"ppo/advantage_mean": lambda n, t, e: 0.4}, {}),
    "gradient_zero": ("ppo", {"ppo/grad_norm": lambda n, t, e: 0.0}, {}),
    "policy_unmoved": ("ppo", {"objective/kl_k3": lambda n, t, e: 0.0}, {}),
    "same_as_sft": ("ppo", {}, {"comparison": [{"sft_response": w, "ppo_response": w} for w in "abcdefgh"]}),
    "value_untrained": ("ppo", {"ppo/value_lr": lambda n, t, e: 0.0}, {}),
    "reward_constant": ("ppo", {"objective/score_std": lambda n, t, e: 0.0}, {}),
    "reward_scale": ("ppo", {"objective/raw_score": lambda n, t, e: 40.0}, {}),
    "start_differs": ("ppo", {"eval/score": lambda n, t, e: 60.0}, {}),
    "reward_opposes_judge": ("ppo", {"objective/gold_correlation": lambda n, t, e: -0.6 + 0.1 * e}, {}),
    "answers_empty": ("ppo", {}, {"samples": [{**row, "response": " "} for row in SAMPLES]}),
    "answers_alike": ("ppo", {}, {"samples": [{**row, "response": "Yes."} for row in SAMPLES]}),
    "cut_off": ("ppo", {"response/stop_rate": lambda n, t, e: 0.05}, {}),
    "steps_too_large": ("ppo", {"ppo/approx_kl": lambda n, t, e: 0.5 if n == 7 else 0.003}, {}),
    "kl_jump": ("ppo", {"objective/kl_full": lambda n, t, e: 0.1 if n < 5 else 5.0}, {}),
    "negative_kl": ("ppo", {"objective/kl": lambda n, t, e: -2 + 0.3 * e}, {}),
    "no_kl_penalty": ("ppo", {"objective/kl_coef": lambda n, t, e: 0.0}, {}),
    "controller_saturated": ("ppo", {"objective/kl": lambda n, t, e: 14 + 3 * t}, {}),
    "over_optimised": (
        "ppo",
        {"objective/gold": lambda n, t, e: 0.2 + 2 * t * (1 - t) - 0.8 * t + 0.03 * e},
        {},
    ),
    "length_rewarded": (
        "ppo",
        {"objective/length_correlation": lambda n, t, e: 0.8, "response/length": lambda n, t, e: 20 + 12 * t},
        {},
    ),
    "reward_ignores_judge": ("ppo", {"objective/gold_correlation": lambda n, t, e: 0.05 * e}, {}),
    "stop_rate_falling": ("ppo", {"response/stop_rate": lambda n, t, e: 0.95 - 0.8 * t}, {}),
    "entropy_collapse": ("ppo", {"objective/entropy": late(0.05)}, {}),
    "responses_alike": ("ppo", {"response/distinct_2": late(0.3)}, {}),
    "repeated_text": ("ppo", {"response/repetition": lambda n, t, e: 0.6 * t}, {}),
    "length_up": ("ppo", {"response/length": lambda n, t, e: 20 + 30 * t}, {}),
    "length_down": ("ppo", {"response/length": lambda n, t, e: 25 - 20 * t}, {}),
    "kl_high": ("ppo", {"objective/kl_full": lambda n, t, e: 40 * t}, {}),
    "reward_saturated": ("ppo", {"objective/score_std": lambda n, t, e: 0.8 - 0.78 * t}, {}),
    "advantages_vanished": ("ppo", {"ppo/advantage_std": lambda n, t, e: 0.5 - 0.49 * t}, {}),
    "value_dead": ("ppo", {"ppo/value_std": lambda n, t, e: 1e-4}, {}),
    "value_useless": ("ppo", {"ppo/explained_variance": lambda n, t, e: -0.5 + 0.05 * e}, {}),
    "reward_falling": ("ppo", {"objective/score": lambda n, t, e: -1.5 * t}, {}),
    "gradient_spike": ("ppo", {"ppo/grad_norm": lambda n, t, e: 30.0 if n == 20 else 0.4}, {}),
    "slowing_down": ("ppo", {"time/rollout": lambda n, t, e: 5.0 if t < 0.5 else 90.0}, {}),
}
#: Findings that the change of a run cannot do without.
ALSO = {
    "reward_scale": {"start_differs"},  # evaluated in its own unit
    "length_down": {"kl_high"},  # the same nats in fewer tokens
}


def names(history: History) -> list[str]:
    return [finding.name for finding in replay(history)]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_healthy_run_has_no_findings(stage: str) -> None:
    """Catches: a threshold inside the noise of ordinary runs."""
    assert names(run(stage)) == []


#: Checks in the order of a diagnosis; others may come between them.
ORDER = [
    "not_finite", "learning_rate_zero", "schedule_ended", "no_gradient", "loss_rising", "overfitted", "accuracy_below_chance",
    "accuracy_at_chance", "loss_flat", "batch_spike", "wrong_reference", "template_twice", "pad_is_stop",
    "padding_counted", "sampler_mismatch", "sampler_drift", "stale_logprobs", "advantages_not_centred",
    "gradient_zero", "policy_unmoved", "same_as_sft", "value_untrained", "reward_constant", "reward_scale",
    "start_differs", "reward_opposes_judge", "answers_empty", "answers_alike", "cut_off", "length_rewarded",
    "no_kl_penalty", "steps_too_large", "kl_jump",
    "negative_kl", "controller_saturated", "over_optimised", "reward_ignores_judge", "stop_rate_falling",
    "entropy_collapse", "responses_alike", "repeated_text", "length_up", "length_down", "kl_high",
    "reward_saturated", "advantages_vanished", "value_dead", "value_useless", "reward_falling",
    "gradient_spike", "slowing_down",
]  # fmt: skip


def test_checks_are_in_order_of_causation_however_they_are_imported() -> None:
    """Catches: a registry in the order of imports, by which a run's diagnosis would change with who imports what first."""
    names = [check.name for check in CHECKS]
    assert [name for name in names if name in ORDER] == ORDER
    imports = "; ".join(f"import rlhf.doctor.health.{module.__name__.split('.')[-1]}" for module in reversed(MODULES))
    code = f"{imports}; from rlhf.doctor.health.findings import CHECKS; print(*(check.name for check in CHECKS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == names


def test_every_module_of_checks_is_listed() -> None:
    """Catches: a check in a new file that nobody imports, and so never looks."""
    files = {
        file.stem for file in Path(str(supervised.__file__)).parent.glob("*.py") if "\n@check(" in file.read_text()
    }
    assert files == {module.__name__.split(".")[-1] for module in MODULES}
    for module in MODULES:
        assert registered(module.__name__) == tuple(
            item
            for item in vars(module).values()
            if isinstance(item, HealthCheck) and item.look.__module__ == module.__name__
        )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_fields_of_checks_are_known_words(check: HealthCheck) -> None:
    """Catches: a slip in a decorator, whose fields mypy does not see."""
    assert check.severity in get_args(Severity) and check.remedy in get_args(Remedy)
    assert check.stages and set(check.stages) <= set(get_args(Stage))
    assert isinstance(check.needs, tuple) and check.shows and check.action and (check.data or check.needs)


def test_every_check_has_a_sick_run() -> None:
    """Catches: a check that nothing shows to find anything."""
    assert SICK.keys() == {check.name for check in CHECKS}
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_found_and_nothing_else(name: str) -> None:
    """Catches: a check that never fires, one that fires for another cause, and evidence without figures."""
    stage, changed, options = SICK[name]
    found = {finding.name: finding for finding in replay(run(stage, changed, **options))}
    assert name in found
    assert set(found) - {name} <= ALSO.get(name, set())
    assert found[name].evidence and 1 <= found[name].first <= found[name].last <= UPDATES
    if name not in ("template_twice",):
        assert any(letter.isdigit() for letter in found[name].evidence)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_checks_say_nothing_where_figures_are_missing(check: HealthCheck) -> None:
    """Catches: an error on the log of an older version, of a run that was killed early, or with a figure that was NaN."""
    stage, changed, options = SICK[check.name]
    sick = run(stage, changed, **options)
    for updates in range(UPDATES):
        sick.until(updates)
        check(sick.until(updates))
    assert check(History(stage)) is None
    courses = HEALTHY if stage == "ppo" else {f"{stage}/{name}": None for name in SUPERVISED}
    for missing in courses:
        rows = [{"step": n, **{name: 1.0 for name in courses if name != missing}} for n in range(1, UPDATES + 1)]
        check(History(stage, rows))
    other = next(s for s in ("sft", "reward", "ppo", "none") if s not in check.stages)
    assert check(History(other, [{"step": 1, "objective/score": None}])) is None


def test_a_finding_that_passed_is_still_told() -> None:
    """Catches: a diagnosis made from the last rows only, in which a burst that ruined the policy cannot be seen."""
    found = replay(run("ppo", {"ppo/clipfrac": lambda n, t, e: 0.7 if n in (6, 7) else 0.02}))
    assert [(f.name, f.first, f.last) for f in found] == [("steps_too_large", 6, 8)]
    assert "70% of tokens clipped" in found[0].evidence


def test_history_of_many_updates_is_replayed_in_strides() -> None:
    """Catches: a diagnosis that takes the square of the run's length, and one whose stride leaves out the end."""
    rows = [{"step": n, "ppo/lr": 1e-3, "ppo/grad_norm": 0.0 if n >= 4998 else 1.0} for n in range(1, 5001)]
    assert [(f.name, f.last) for f in replay(History("ppo", rows))] == [("gradient_zero", 5000)]


@pytest.mark.parametrize("own_unit", [False, True])
def test_only_scores_that_were_normalised_have_a_scale(own_unit: bool) -> None:
    """Catches: a reward model that was trained elsewhere, and keeps its unit, taken for one that was loaded wrongly."""
    settings = {"reward": ["reward/a"], "own_unit": own_unit}
    history = History("ppo", [{"step": 1, "objective/raw_score": 40.0, "objective/score_std": 9.0}], settings=settings)
    assert (reward_scale(history) is None) == own_unit


def test_value_warmup_is_no_fault() -> None:
    """Catches: a warm-up of the value model, in which the policy rests, that is reported as a policy without gradient."""
    resting: dict[str, Course] = {
        "ppo/grad_norm": lambda n, t, e: 0.0 if n <= 8 else 0.4,
        "objective/kl_k3": lambda n, t, e: 0.0 if n <= 9 else 1.0,
        "ppo/explained_variance": lambda n, t, e: -0.5 if n <= 12 else 0.3,
    }
    assert names(run("ppo", resting, settings={**SETTINGS, "value_warmup_updates": 8})) == []
    assert "gradient_zero" in names(run("ppo", resting))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_taste_for_length_that_grows_is_found_before_the_length_follows(sign: int) -> None:
    """Catches: a correlation that is looked at only once the length has changed, or with one sign only."""
    growing: dict[str, Course] = {"objective/length_correlation": lambda n, t, e: sign * 0.8 * t}
    constant: dict[str, Course] = {"objective/length_correlation": lambda n, t, e: sign * 0.8}
    steady: dict[str, Course] = {"response/length": lambda n, t, e: 25.0}
    assert names(run("ppo", {**growing, **steady})) == ["length_rewarded"]
    assert names(run("ppo", {**constant, **steady})) == [], "the task itself may ask for length"


def test_faults_of_the_start_are_looked_for_at_the_start() -> None:
    """Catches: a policy that forgets to stop and samples a pad token by chance, told as pad = stop token; a reward that all
    answers have come to please, told as a constant one."""
    chance: dict[str, Course] = {
        "rollout/pad_tokens": lambda n, t, e: 0.03 if n > 15 else 0.0,
        "response/stop_rate": lambda n, t, e: 0.03 if n > 15 else 0.95,
    }
    assert "pad_is_stop" not in names(run("ppo", chance))
    pleased: dict[str, Course] = {"objective/score_std": lambda n, t, e: 0.8 if n <= 5 else 0.0}
    assert "reward_constant" not in names(run("ppo", pleased)) and "reward_saturated" in names(run("ppo", pleased))


@pytest.mark.parametrize(("lows", "found"), [(1, True), (2, False)])
def test_a_controller_that_holds_its_target_once_by_chance(lows: int, found: bool) -> None:
    """Catches: one rollout below the target that hides nine beyond twice of it, and two that do not count."""
    target, beyond = SETTINGS["kl_target"], range(UPDATES - 9, UPDATES + 1 - lows)
    course: dict[str, Course] = {"objective/kl": lambda n, t, e: (2.5 if n in beyond else 0.5) * target}
    assert ("controller_saturated" in names(run("ppo", course))) == found


def test_a_sampled_kl_that_is_negative_by_chance_is_no_fault() -> None:
    """Catches: the KL of single rollouts, which is below 0 in half of them while the policy has hardly moved."""
    chance: dict[str, Course] = {
        "objective/kl": lambda n, t, e: 0.05 + 0.04 * e,
        "objective/kl_full": lambda n, t, e: 0.05,
        "objective/kl_k3": lambda n, t, e: 0.05 if n > 1 else 0.0,
    }
    assert names(run("ppo", chance)) == []


def test_a_judge_that_stands_still_while_the_score_rises() -> None:
    """Catches: over-optimisation that is seen only once the judge falls, and a noisy judge of a flat score taken for it."""
    still: dict[str, Course] = {
        "objective/raw_score": lambda n, t, e: 3 * t,
        "objective/gold": lambda n, t, e: 0.4 - 0.02 * t + 0.001 * e,
    }
    noisy: dict[str, Course] = {
        "objective/raw_score": lambda n, t, e: 0.1 * e,
        "objective/gold": lambda n, t, e: 0.3 * e,
    }
    assert names(run("ppo", still)) == ["over_optimised"]
    assert names(run("ppo", noisy)) == []


def test_a_value_model_on_its_way_up_is_no_fault() -> None:
    """Catches: a value model that started far off, has learned most of it, and is called useless."""
    rising: dict[str, Course] = {"ppo/explained_variance": lambda n, t, e: -8 * 0.7**n}
    stuck: dict[str, Course] = {"ppo/explained_variance": lambda n, t, e: -0.3}
    assert names(run("ppo", rising)) == []
    assert names(run("ppo", stuck)) == ["value_useless"]


def test_a_score_that_falls_slowly_is_told_from_noise() -> None:
    """Catches: a slow decline that ends before it is a fixed number, a score that wanders, and a reward model without one."""
    slow: dict[str, Course] = {"objective/score": lambda n, t, e: -0.3 * t + 0.02 * e}
    noisy: dict[str, Course] = {"objective/score": lambda n, t, e: -0.3 * t + 0.3 * e}
    assert names(run("ppo", slow)) == ["reward_falling"]
    assert names(run("ppo", noisy)) == []


def test_a_reward_model_that_stays_at_its_first_loss_learned_nothing() -> None:
    """Catches: two evaluations, too few for the accuracy's checks, and a noisy loss taken for one that fell."""
    still = {"evaluations": {"reward/eval_loss": [0.694, 0.695, 0.694]}}
    flat: dict[str, Course] = {"reward/loss": lambda n, t, e: 0.7 + 0.05 * e}
    assert names(run("reward", flat, **still)) == ["loss_flat"]
    assert names(run("reward", **still)) == [], "learned from training pairs"


def test_actions_of_checks() -> None:
    """Catches: a warning that stops a run, a check's own action that is lost, and slips that pass."""
    chosen = actions(["stop", "kl_jump=roll_back", "kl_high=stop"])
    assert (chosen["reward_constant"], chosen["kl_jump"], chosen["kl_high"]) == ("stop", "roll_back", "stop")
    assert chosen["length_up"] == "warn"
    assert set(actions(["off"]).values()) == {"off"}
    for orders, complaint in (
        (["stopp"], "did you mean 'stop'"),
        (["warn", "kl_jmp=stop"], "no check 'kl_jmp' .did you mean 'kl_jump'"),
        (["warn", "advantage=stop"], "no check 'advantage' .did you mean 'advantages'"),
        (["warn", "kl_jump=halt"], "'halt' must be one of"),
        (["warn", "stop"], "one action for all"),
        (["kl_jump=stop"], "one action for all"),
    ):
        with pytest.raises(UserError, match=complaint):
            actions(orders)


@pytest.mark.parametrize(
    ("severity", "orders", "action"),
    [
        ("critical", ["stop"], "stop"),
        ("warning", ["stop"], "warn"),
        ("critical", ["stop", "gamma=off"], "off"),
        ("critical", ["stop", "lam=off"], "stop"),
        ("warning", ["warn", "gamma=stop"], "stop"),
        ("critical", ["off", "gamma=warn"], "warn"),
        ("warning", ["off"], "off"),
    ],
)
def test_actions_of_statements(severity: Any, orders: list[str], action: str) -> None:
    """Catches: a false finding of the review or the audit that cannot be silenced without the true ones."""
    failed = Statement(part="review", name="gamma", passed=False, measured="0.1", severity=severity)
    assert reaction(orders, failed) == action
    assert actions(orders).get("gamma", action) == action  # accepted, and in the names that are not all off


def test_every_statement_has_a_name_that_orders_take() -> None:
    """Catches: a quantity of the review or the audit that `doctor: [stop, NAME=off]` refuses."""
    audited = {
        q.name for module in (quantities, training_quantities) for q in vars(module).values() if isinstance(q, Quantity)
    }
    reviewed = {limit.name for limits in TABLES.values() for limit in limits}
    assert set(NAMES) == audited | reviewed


def test_causes_come_before_symptoms() -> None:
    """Catches: a diagnosis that names the collapse first and the lost reward last."""
    both: dict[str, Course] = {**SICK["entropy_collapse"][1], **SICK["sampler_mismatch"][1]}
    assert names(run("ppo", both)) == ["sampler_mismatch", "entropy_collapse"]
    last = find(run("ppo", both))
    assert [f.first for f in last] == [UPDATES, UPDATES]
