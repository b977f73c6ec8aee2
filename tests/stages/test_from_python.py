"""Stages called from Python: callables as rewards and judges, and callbacks."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlhf.base.errors import UserError
from rlhf.base.functions import load_function, name_of
from rlhf.config import EvaluationConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.models.inputs import UNKNOWN, function_inputs
from rlhf.ppo.state import Order
from rlhf.registry import Artifact
from rlhf.run import checkpoint
from rlhf.stages import ppo, sft
from rlhf.stages.callbacks import Update


def length(prompts: Any, responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


@pytest.fixture
def run_ppo(finished: tuple[Path, Path], toy_data: Path, tmp_path: Path) -> Callable[..., Artifact | None]:
    """Runs a PPO of two updates on a copy of the toy registry."""
    shutil.copytree(finished[0], tmp_path / "registry")

    def run(*, reuse: bool = False, callbacks: Any = (), **options: Any) -> Artifact | None:
        values: dict[str, Any] = {"reward": length, "save_steps": 100, **options}
        config = PPOConfig(
            name="own", policy="sft/toy", dataset=str(toy_data), registry=str(tmp_path / "registry"), lora_r=4,
            output_dir=str(tmp_path / "out"), total_episodes=16, rollout_batch_size=8, minibatch_size=8, microbatch_size=8,
            response_length=6, num_eval_samples=2, preflight=False, wandb_mode="disabled", **values,
        )  # fmt: skip
        return ppo.run(config, reuse=reuse, callbacks=callbacks)

    return run


# ---- callables ------------------------------------------------------------------------------------------------------


class Judge:
    """A judge with a state of its own."""

    def score(self, texts: Any) -> Any:
        return self


def test_a_callable_has_a_name_that_leads_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: two lambdas under one name, a name that leads to another object, and a second name for the same one."""
    module = ModuleType("own_scorers")
    module.score = score = lambda texts: [1.0]  # type: ignore[attr-defined]
    score.__name__, score.__module__ = "score", "own_scorers"
    monkeypatch.setitem(sys.modules, "own_scorers", module)
    assert name_of(score) == "own_scorers:score"
    one, two = (lambda texts: [1.0]), (lambda texts: [2.0])
    names = [name_of(one), name_of(two), name_of(one)]
    assert names[0] == names[2] != names[1] and all(name.startswith("python:lambda") for name in names)
    assert [load_function(name) for name in names] == [one, two, one]
    module.score = one  # type: ignore[attr-defined]
    assert name_of(score) == "python:score"  # what is called so now is another
    judges = [Judge(), Judge()]
    names = [name_of(judge.score) for judge in [*judges, *judges]]  # each access makes another object
    assert names[:2] == names[2:] == ["python:score_2", "python:score_3"]
    assert load_function(names[1])([]) is judges[1]
    with pytest.raises(UserError, match="'python:gone' was an object of another Python program"):
        load_function("python:gone")


def test_configs_take_callables_and_single_values() -> None:
    """Catches: a function in a manifest, and a name that is read letter by letter."""
    own = name_of(length)
    config = PPOConfig(name="x", dataset="d", reward=length, gold=length, doctor="stop")  # type: ignore[arg-type]
    assert (config.reward, config.gold, config.doctor) == ([own], own, ["stop"])
    assert PPOConfig(name="x", dataset="d", reward="reward/x").reward == ["reward/x"]  # type: ignore[arg-type]
    assert PPOConfig(name="x", dataset="d", reward=("reward/x", length)).reward == ["reward/x", own]  # type: ignore[arg-type]
    assert RewardConfig(name="x", dataset="d", gold=length).gold == own  # type: ignore[arg-type]
    assert EvaluationConfig(models="ppo/x", dataset="d", gold=[length]).gold == [own]  # type: ignore[list-item,arg-type]


def test_only_a_source_file_can_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a lambda or a notebook's function recorded as if its source were known, and a script's as if it were not."""
    judge = name_of(lambda texts: [1.0])
    assert function_inputs("gold", [judge]) == {f"gold {judge}": UNKNOWN}
    script = tmp_path / "script.py"
    script.write_text("def score(prompts, responses): ...\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script))
    (before,) = function_inputs("reward", ["__main__:score"]).values()
    script.write_text("def score(prompts, responses): return 1\n")
    (after,) = function_inputs("reward", ["__main__:score"]).values()
    assert len(before) == len(after) == 64 and before != after
    monkeypatch.delattr(sys.modules["__main__"], "__file__")  # as in a notebook
    assert function_inputs("reward", ["__main__:score"]) == {"reward __main__:score": UNKNOWN}


def test_a_reward_without_a_source_is_not_taken_for_the_same(
    run_ppo: Callable[..., Artifact | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches: an artefact that is reused although its reward is another function of the same name."""
    scores = {"value": 1.0}

    def closure(prompts: Any, responses: list[str]) -> list[float]:
        return [scores["value"]] * len(responses)

    first = run_ppo(reward=closure)
    assert first is not None and first.manifest.metrics["score_after"] == 1.0
    scores["value"] = 2.0
    again = run_ppo(reward=closure, reuse=True)
    assert again is not None and again.reference == "ppo/own@2" and again.manifest.metrics["score_after"] == 2.0
    assert "but reward python:closure has no source file; it is made again" in capsys.readouterr().out
    (tmp_path / "own_known_scorer.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    score = importlib.import_module("own_known_scorer").score
    known = run_ppo(reward=score)
    assert known is not None and known.manifest.config["reward"] == ["own_known_scorer:score"]
    assert run_ppo(reward=score, reuse=True) == known


def test_a_callable_that_fails_is_one_line_with_a_checkpoint(
    run_ppo: Callable[..., Artifact | None], tmp_path: Path
) -> None:
    """Catches: a traceback through the trainer, or updates lost to a mistake in the second."""
    calls = []

    def broken(prompts: Any, responses: list[str]) -> list[float]:
        calls.append(1)
        return [1.0 / (3 - len(calls))] * len(responses)

    with pytest.raises(UserError, match=r"python:broken failed at .*test_from_python\.py:\d+: ZeroDivisionError"):
        run_ppo(reward=broken)
    latest = checkpoint.latest(tmp_path / "out" / "ppo" / "checkpoints")
    assert latest is not None and latest.name == "checkpoint-1"


# ---- callbacks ------------------------------------------------------------------------------------------------------


def test_a_callback_sees_each_update_and_changes_nothing(
    run_ppo: Callable[..., Artifact | None], tmp_path: Path
) -> None:
    """Catches: an update that is left out, samples of another rollout, and a run that ends in other bytes when watched."""
    updates: list[Update] = []

    def meddle(update: Update) -> None:
        """Change whatever is in reach, after the other callback has looked at it."""
        assert update.rollout is not None
        update.rollout.logprobs.zero_()
        update.rollout.responses.zero_()
        update.metrics.clear()  # type: ignore[attr-defined]
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        os.chdir(tmp_path)

    plain, watched = run_ppo(), run_ppo(callbacks=[lambda update: updates.append(copy.deepcopy(update)), meddle])
    assert plain is not None and watched is not None
    assert watched.manifest.files["adapter_model.safetensors"] == plain.manifest.files["adapter_model.safetensors"]
    assert [update.step for update in updates] == [1, 2]
    for update in updates:
        assert update.rollout is not None and update.stage == "ppo" and len(update.samples) == 8
        assert [sample["score"] for sample in update.samples] == update.rollout.scores.tolist()
        assert update.metrics["objective/score"] == pytest.approx(float(update.rollout.scores.mean()))


def halt(update: Update) -> Order | None:
    return Order(action="stop", reason="far enough") if update.step == 1 else None


def fail(update: Update) -> Order | None:
    raise KeyError("missing")


def answer(update: Update) -> Any:
    return "stop"


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (halt, "^far enough$"),
        (fail, r"^callback [\w.]+:fail failed at .*test_from_python\.py:\d+: KeyError: 'missing'$"),
        (answer, "TypeError: returned 'stop'; a callback returns None or an Order to stop or roll back"),
        (lambda update: Order(action="wait", reason="x"), "a callback returns None or an Order"),  # type: ignore[arg-type]
    ],
)
def test_a_callback_stops_the_run_with_a_checkpoint(
    callback: Any, reason: str, run_ppo: Callable[..., Artifact | None], tmp_path: Path
) -> None:
    """Catches: an order that is not followed, a mistake that passes in silence, and updates that are lost."""
    with pytest.raises(UserError, match=reason):
        run_ppo(callbacks=[lambda update: None, callback])
    latest = checkpoint.latest(tmp_path / "out" / "ppo" / "checkpoints")
    assert latest is not None and latest.name == "checkpoint-1"
    assert not (tmp_path / "registry" / "ppo" / "own").exists()
    resumed = run_ppo(resume=True)
    assert resumed is not None and resumed.manifest.metrics["updates"] == 2


def test_a_callback_rolls_back(run_ppo: Callable[..., Artifact | None], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: no checkpoint to go back to, and a remedy that is not the ordered one."""
    coefficients: list[float] = []

    def back_once(update: Update) -> Order | None:
        coefficients.append(update.metrics["objective/kl_coef"])
        return Order(action="roll_back", reason="once", remedy="kl_coef") if len(coefficients) == 2 else None

    assert run_ppo(callbacks=[back_once], save_steps=1) is not None
    assert coefficients == [0.1, 0.1, 0.2]
    assert "once: back to update 1, kl_coef 0.2" in capsys.readouterr().out


def test_a_callback_of_a_supervised_stage(toy_config: Path, tmp_path: Path) -> None:
    """Catches: a callback that is not called there, and a stop that registers or leaves no checkpoint."""
    from rlhf.config import parse_config

    seen: list[Update] = []

    def stop(update: Update) -> Order | None:
        seen.append(update)
        return Order(action="stop", reason="the loss is known") if update.step == 2 else None

    words = ["--config", str(toy_config / "sft.yaml"), "--registry", str(tmp_path / "registry"), "--preflight", "false"]
    config = parse_config(SFTConfig, [*words, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"^the loss is known$"):
        sft.run(config, callbacks=[stop])
    assert {update.step for update in seen} == {0, 1, 2} and {"sft/loss", "sft/eval_loss"} <= {
        name for update in seen for name in update.metrics
    }
    assert checkpoint.latest(tmp_path / "out" / "sft" / "checkpoints") is not None
    assert not (tmp_path / "registry" / "sft").exists()
