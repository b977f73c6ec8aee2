"""Experiments on a run: each fault is confirmed by the experiment that is there for it, and a sound run confirms nothing."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toys import Call

from rlhf.base.functions import name_of
from rlhf.base.reading import FolderReader
from rlhf.config import PPOConfig
from rlhf.doctor.health.findings import CHECKS
from rlhf.doctor.statements import Statement, read
from rlhf.ppo import functional as F
from rlhf.reward.sources import FunctionReward, Reward
from rlhf.run.optim import build_optimizer
from rlhf.stages import ppo
from rlhf.stages.investigate import examine, policies, rewards, supervised, updates
from rlhf.stages.investigate.experiment import (
    EXPERIMENTS,
    Experiment,
    correlation,
    mean,
    next_one,
)
from rlhf.stages.investigate.subject import PPOSubject

#: Functions that make statements of an experiment; their first argument is its name.
VERDICTS = ("confirmed", "ruled_out", "undecided", "_agreement")


def vowels(responses: Sequence[str]) -> list[float]:
    """A judge: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in responses]


def judged(prompts: Any, responses: Sequence[str]) -> list[float]:
    """A reward that agrees with the judge."""
    return [5 * score for score in vowels(responses)]


def opposite(prompts: Any, responses: Sequence[str]) -> list[float]:
    return [-score for score in judged(prompts, responses)]


def constant(prompts: Any, responses: Sequence[str]) -> list[float]:
    return [1.0 for _ in responses]


def length(prompts: Any, responses: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in responses]


def repeated(prompts: Any, responses: Sequence[str]) -> list[float]:
    """A reward for saying the same twice."""
    halves = [(text[: len(text) // 2].strip(), text[(len(text) + 1) // 2 :].strip()) for text in responses]
    return [float(bool(first) and first == second) + 0.001 * len(first) for first, second in halves]


def random(prompts: Any, responses: Sequence[str]) -> list[float]:
    """A reward that has nothing to do with what it reads."""
    return [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 for text in responses]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, finished: tuple[Path, Path], toy_config: Path) -> Path:
    """Folder of a PPO run with a reward that agrees with the judge."""
    folder = tmp_path_factory.mktemp("investigated")
    shutil.copytree(finished[0], folder / "registry")
    options = yaml.safe_load((toy_config / "ppo.yaml").read_text()) | {
        "reward": [name_of(judged)], "gold": name_of(vowels), "registry": str(folder / "registry"), "name": "judged",
        "output_dir": str(folder / "out"), "device": "cpu", "dtype": "float32", "optim": "adamw_torch", "trackers": ["none"],
        "preflight": False, "total_episodes": 96, "rollout_batch_size": 32, "minibatch_size": 16, "microbatch_size": 16,
        "learning_rate": 0.003, "missing_eos_penalty": 0.0, "save_steps": 1, "num_eval_samples": 20, "kl_coef": 0.01,
        "stop_strings": ["a", "e", "o", "n", "t"],
    }  # fmt: skip
    ppo.run(PPOConfig(**options))
    return folder / "out"


@pytest.fixture(scope="module")
def opened(run_folder: Path) -> PPOSubject:
    return PPOSubject(run_folder / "ppo", None)


@pytest.fixture
def subject(opened: PPOSubject) -> PPOSubject:
    """The run without what earlier experiments left in memory."""
    cached = {name for name in vars(opened) if isinstance(getattr(PPOSubject, name, None), functools.cached_property)}
    fresh = copy.copy(opened)
    for name in cached:
        del vars(fresh)[name]
    fresh._rollouts = {}
    fresh.trainer = copy.copy(opened.trainer)
    fresh.trainer.environment = copy.copy(opened.trainer.environment)
    return fresh


def with_reward(subject: PPOSubject, function: Callable[..., list[float]]) -> PPOSubject:
    """The run as it would be with another reward."""
    subject.reward = Reward({"reward": FunctionReward(name_of(function))})
    subject.trainer.environment.reward = subject.reward
    return subject


def outcomes(experiment: Callable[[Any], Any], subject: Any) -> dict[str, Statement]:
    return {one.name: one for one in experiment(subject)}


def causes(experiment: Callable[[Any], Any], subject: Any) -> dict[str, str]:
    """Causes that an experiment confirms, by the names of its statements."""
    return {name: one.cause for name, one in outcomes(experiment, subject).items() if one.is_finding}


# A sound run


def test_a_sound_run_confirms_nothing_and_stays_as_it_was(run_folder: Path, call: Callable[..., Call]) -> None:
    """Catches: an alarm on a sound run, and experiments that write into checkpoints, logs or the registry."""

    def digests() -> dict[str, str]:
        files = [
            file for file in sorted(run_folder.parent.rglob("*")) if file.is_file() and file.name != "doctor.jsonl"
        ]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = digests()
    done = call("rlhf.doctor", "investigate", run_folder / "ppo")
    assert done.code == 0, done.out
    assert "could not run" not in done.out and "left out" not in done.out
    for experiment in EXPERIMENTS:
        assert (experiment.name in done.out) == (experiment.stage == "ppo")
    assert digests() == before
    statements = [one for one in read(FolderReader(run_folder / "ppo")) if one.part == "investigation"]
    assert {one.step for one in statements} == {3}
    passed = {one.name for one in statements if one.is_confirmed}
    assert {
        "reference",
        "reward_spread",
        "reward_judge",
        "credit_follows_score",
        "reward_steers",
        "step_size",
    } <= passed


def test_weights_are_put_back_after_an_update(subject: PPOSubject) -> None:
    """Catches: an experiment whose update stays, so that the next one starts elsewhere."""
    weights = {name: p.clone() for name, p in subject.trainer.state.weights().items()}
    first = subject.ordinary
    assert float(first.change.abs().max()) > 1e-4
    assert all(torch.equal(weights[name], p) for name, p in subject.trainer.state.weights().items())
    assert torch.equal(subject.attempt(subject.first, subject.credit).change, first.change)
    assert subject.updates == 3


# Rewards


def test_a_constant_reward_is_confirmed(subject: PPOSubject) -> None:
    assert "constant" in causes(rewards.reward_judge, with_reward(subject, constant))["reward_spread"]


def test_a_flipped_reward_is_told_from_a_random_and_a_right_one(subject: PPOSubject) -> None:
    """Catches: a verdict on the wrong side of 0."""
    assert outcomes(rewards.reward_judge, subject)["reward_judge"].is_confirmed
    flipped = outcomes(rewards.reward_judge, with_reward(copied(subject), opposite))["reward_judge"]
    assert flipped.severity == "critical" and "flipped" in flipped.cause
    noise = outcomes(rewards.reward_judge, with_reward(copied(subject), random))["reward_judge"]
    assert not noise.is_confirmed and "flipped" not in noise.cause


def copied(subject: PPOSubject) -> PPOSubject:
    other = copy.copy(subject)
    vars(other).pop("sft", None)
    other.trainer = copy.copy(subject.trainer)
    other.trainer.environment = copy.copy(subject.trainer.environment)
    return other


def test_labelled_pairs_show_a_flipped_reward(subject: PPOSubject) -> None:
    """The data rates answers by the words in them; the reward reads the same words, once with the wrong sign."""

    def by_words(sign: float) -> Callable[..., list[float]]:
        words = {"great": 2.0, "good": 1.0, "bad": -1.0, "awful": -2.0}
        return lambda prompts, responses: [sign * words[text.split()[-1]] for text in responses]

    assert outcomes(rewards.reward_pairs, with_reward(copied(subject), by_words(1.0)))["reward_pairs"].is_confirmed
    assert "flipped" in causes(rewards.reward_pairs, with_reward(subject, by_words(-1.0)))["reward_pairs"]


@pytest.mark.parametrize(
    ("function", "paid", "not_paid"),
    [(length, "reward_length", "reward_repetition"), (repeated, "reward_repetition", "reward_length")],
)
def test_what_a_reward_pays_for(
    subject: PPOSubject, function: Callable[..., list[float]], paid: str, not_paid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: repetition blamed on length or length on repetition, and an alarm before the policy makes use of it."""
    with_reward(subject, function)
    found = outcomes(rewards.reward_tricks, subject)
    assert found[paid].severity == "note" and found[paid].action and not found[paid].passed
    assert found[not_paid].is_confirmed
    monkeypatch.setattr(rewards, "_uses", lambda sft, tuned: dict.fromkeys(found, True))
    assert set(causes(rewards.reward_tricks, subject)) == {paid}


# Updates


def test_advantages_of_the_wrong_sign_are_confirmed(subject: PPOSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.whiten
    monkeypatch.setattr(F, "whiten", lambda x, mask: -right(x, mask))
    assert "wrong sign" in causes(updates.update_direction, subject)["credit_follows_score"]


def test_a_discount_that_keeps_the_score_from_tokens_is_confirmed(subject: PPOSubject) -> None:
    credit = dataclasses.replace(subject.trainer.estimator, gamma=0.3)  # type: ignore[type-var]
    subject.trainer.estimator = credit
    assert "gamma 0.3" in causes(updates.update_direction, subject)["credit_discount"]


def test_a_loss_of_the_wrong_sign_is_told_from_wrong_advantages(
    subject: PPOSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = F.policy_loss

    def wrong(*args: Any, **kwargs: Any) -> Any:
        losses, clipped = right(*args, **kwargs)
        return -losses, clipped

    monkeypatch.setattr(F, "policy_loss", wrong)
    assert set(causes(updates.update_direction, subject)) == {"update_follows_credit"}


def test_a_kl_penalty_of_the_wrong_sign_is_confirmed(subject: PPOSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(updates.kl_term, subject)["kl_term"].is_confirmed
    right = F.token_rewards
    monkeypatch.setattr(F, "token_rewards", lambda *args, kl_coef: right(*args, kl_coef=-kl_coef))
    assert "pushes the policy away" in causes(updates.kl_term, subject)["kl_term"]


@pytest.mark.parametrize(
    ("options", "cause"), [({"value_learning_rate": 0.0}, "step size is 0"), ({"vf_coef": 0.0}, "vf_coef is 0")]
)
def test_values_that_do_not_learn(subject: PPOSubject, options: dict[str, float], cause: str) -> None:
    change_options(subject, **options)
    assert cause in causes(updates.value_learns, subject)["value_learns"]


def change_options(subject: PPOSubject, **options: Any) -> None:
    """Give the run other options, as if it had been started with them."""
    subject.config = dataclasses.replace(subject.config, **options)
    trainer, state = subject.trainer, copy.copy(subject.trainer.state)
    trainer.config = dataclasses.replace(trainer.config, **options)
    rates = [trainer.config.learning_rate, trainer.config.learning_rate]
    if trainer.config.value_learning_rate is not None:
        rates[1] = trainer.config.value_learning_rate
    state.configured_rates, trainer.state = rates, state


def test_a_policy_that_does_not_move(subject: PPOSubject) -> None:
    """Catches: a frozen policy passed off as one with the wrong direction, and its causes mixed up."""
    other = copied(subject)
    change_options(other, learning_rate=0.0, value_learning_rate=0.001)
    assert causes(updates.update_direction, other) == {"update_moves_policy": "the step size is 0"}
    state = copy.copy(subject.trainer.state)
    groups = [
        {"params": [torch.nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in state.optimizer.param_groups
    ]
    state.optimizer, subject.trainer.state = build_optimizer(groups, subject.config), state
    assert (
        "copies" in causes(updates.update_direction, subject)["update_moves_policy"]
        or "reaches weights" in causes(updates.update_direction, subject)["update_moves_policy"]
    )


@pytest.mark.parametrize(("factor", "cause"), [(300.0, "too large"), (1e-5, "too small")])
def test_step_sizes_out_of_range(subject: PPOSubject, factor: float, cause: str) -> None:
    assert outcomes(updates.step_size, subject)["step_size"].is_confirmed
    other = copied(subject)
    for name in ("first", "credit", "ordinary"):
        vars(other).pop(name, None)
    change_options(other, learning_rate=factor * subject.config.learning_rate)
    assert cause in causes(updates.step_size, other)["step_size"]


def test_updates_that_the_reward_does_not_steer(subject: PPOSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean left in the advantages raises the probability of all that was sampled."""
    assert outcomes(updates.reward_steers, subject)["reward_steers"].is_confirmed
    right = F.whiten
    monkeypatch.setattr(F, "whiten", lambda x, mask: right(x, mask) + 5 * mask)
    assert "whatever the reward says" in causes(updates.reward_steers, subject)["reward_steers"]


# Policies


def test_over_optimisation_needs_a_score_that_rose_and_a_judge_that_fell() -> None:
    """Limits: the judge falls, cannot be told, or rises."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=96)
    verdicts = [over_optimised(scores, shift) for shift in (-2.0, 0.0, 2.0)]
    assert [one.is_finding for one in verdicts] == [True, False, False]
    assert [one.is_confirmed for one in verdicts] == [False, False, True]
    unclear = over_optimised(scores, -2.0, rose=False)
    assert not unclear.is_finding and not unclear.is_confirmed


def over_optimised(scores: Any, shift: float, *, rose: bool = True) -> Statement:
    answered: Any = SimpleNamespace(scores=scores, groups=np.repeat(np.arange(24), 4))
    noise = np.random.default_rng(1).normal(size=96)
    return policies._over_optimised(answered, scores + noise, answered, scores + noise[::-1] + shift, rose)


def test_answers_that_never_end_are_told_from_a_limit_that_is_too_low(
    subject: PPOSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "ENDING", 0.95)
    assert 0.6 < float(subject.sft.stopped.mean()) < 0.95
    monkeypatch.setattr(policies, "_stop_probability", lambda subject: 0.0)
    monkeypatch.setattr(policies, "_with_twice_the_room", lambda subject, reference: 0.1)
    assert "never learned to stop" in causes(policies.endings, subject)["endings"]
    monkeypatch.setattr(policies, "_with_twice_the_room", lambda subject, reference: 0.99)
    assert "cuts off" in causes(policies.endings, subject)["endings"]


def test_another_reference_is_confirmed(subject: PPOSubject) -> None:
    subject.start_gap = 0.5
    assert "not the model that PPO starts from" in causes(policies.reference, subject)["reference"]


# SFT and reward models


def test_supervised_runs_are_examined(finished: tuple[Path, Path], tmp_path: Path, call: Callable[..., Call]) -> None:
    shutil.copytree(finished[1], tmp_path / "out")
    done = call("rlhf.doctor", "investigate", tmp_path / "out" / "sft")
    assert "demonstrations_learned" in done.out and "could not run" not in done.out, done.out
    done = call("rlhf.doctor", "investigate", tmp_path / "out" / "reward", "--only", "prompt_read")
    assert "prompt_read" in done.out and "pairs_learned" not in done.out and done.code == 0


@pytest.mark.parametrize(
    ("inside", "outside", "cause"),
    [
        (0.9, 0.9, None),
        (0.9, 0.1, "say the opposite"),
        (0.1, 0.1, "sign is flipped"),
        (0.9, 0.5, "by heart"),
        (0.5, 0.5, "nothing was learned"),
    ],
)
def test_verdicts_on_pairs(inside: float, outside: float, cause: str | None) -> None:
    """Catches: swapped labels, a flipped sign, noise and learning by heart taken for each other."""

    def accuracy(split: str, scores: Any) -> Any:
        right = np.arange(200) < 200 * (inside if split == "train" else outside)
        return mean(right.astype(float), np.arange(200))

    lengths = SimpleNamespace(lengths=np.zeros(3))
    run: Any = SimpleNamespace(
        accuracy=accuracy, scores={"train": None, "validation": None}, rankings={"validation": (0, lengths)}
    )
    found = causes(supervised.pairs_learned, run)
    assert (cause is None and not found) or cause in found["pairs_learned"]


# The command


def test_findings_choose_the_order_and_time_is_bounded(run_folder: Path, call: Callable[..., Call]) -> None:
    """Catches: dear experiments before cheap ones, and shared measurements counted twice."""

    def one(name: str, passes: float, *needs: str, settles: tuple[str, ...] = ()) -> Experiment:
        return Experiment(
            name=name, stage="ppo", run=lambda subject: iter(()), needs=needs, passes=passes, settles=settles
        )

    cheap, dear, called = one("cheap", 1), one("dear", 0.1, "sft"), one("called", 9, settles=("kl_high",))
    both, nothing, measured = [cheap, dear], SimpleNamespace(), SimpleNamespace(sft=None)
    assert next_one([*both, called], {"kl_high"}, nothing) is called
    assert next_one(both, set(), nothing) is cheap and next_one(both, set(), measured) is dear
    done = call("rlhf.doctor", "investigate", run_folder / "ppo", "--minutes", "0")
    assert "left out for want of time" in done.out and done.code == 0, done.out


def test_wrong_words(tmp_path: Path, run_folder: Path, call: Callable[..., Call]) -> None:
    assert "no experiment 'kl_trem' (did you mean 'kl_term'?)" in call(
        "rlhf.doctor", "investigate", run_folder, "--only", "kl_trem"
    ).complaint  # fmt: skip
    assert "give the output_dir of a run" in call("rlhf.doctor", "investigate", tmp_path).complaint


def test_a_stage_that_cannot_be_opened_leaves_the_others(
    finished: tuple[Path, Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """The SFT stage ended before it registered a model."""
    shutil.copytree(finished[1], tmp_path / "out")
    (tmp_path / "out" / "sft" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "out" / "ppo")
    done = call("rlhf.doctor", "investigate", tmp_path / "out", "--only", "prompt_read", "stop_learned")
    assert "prompt_read" in done.out and "sft: not examined: the run in" in done.out and done.code == 0
    assert "registered no model" in call("rlhf.doctor", "investigate", tmp_path / "out" / "sft").complaint


def test_findings_and_consequences_are_names_of_checks_and_statements() -> None:
    """Catches: a check that was renamed, whose finding calls for no experiment any more and is explained by none."""
    names, statements = {check.name for check in CHECKS}, set()
    consequences = {symptom for trick in rewards.TRICKS for symptom in trick.symptoms + trick.statements}
    for module in examine.MODULES:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in VERDICTS
                and node.args
            ):
                statements |= {text.value for text in node.args[:1] if isinstance(text, ast.Constant)}
            if isinstance(node, ast.keyword) and node.arg == "explains":
                consequences |= {text.value for text in ast.walk(node) if isinstance(text, ast.Constant)}
    statements |= {trick.name for trick in rewards.TRICKS}
    assert len(statements) > 20 and len(consequences) > 30
    assert consequences - names - statements == set()
    assert {name for one in EXPERIMENTS for name in one.settles} - names - statements == set()


# Figures


def test_intervals_hold_the_right_value() -> None:
    """Catches: an interval that is too narrow, so that noise becomes a verdict."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        x = generator.normal(size=64)
        figure = correlation(x, generator.normal(size=64), np.arange(64))
        hits += figure.low < 0 < figure.high
    assert hits >= 34
    x = generator.normal(size=64)
    assert correlation(x, 2 * x + 1, np.arange(64)).low > 0.999
    assert correlation(x, x * 0, np.arange(64)).low == -1.0
    assert mean(np.array([1.0, 3.0]), np.zeros(2)).high == np.inf
