"""The SFT checkpoint that a reward model likes best is the one that is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import Call

from rlhf.models.adapters import ADAPTER_FILE
from rlhf.registry import Registry
from rlhf.run.checkpoint import load_tensors
from rlhf.stages import sft


@pytest.fixture
def stage(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> Callable[..., Call]:
    """Runs the SFT stage beside a finished reward model."""
    shutil.copytree(finished[0], tmp_path / "registry")
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    words = ["--name", "chosen", "--selection_reward", "reward/toy", "--selection_samples", 6, "--response_length", 6]
    return lambda *more: call("rlhf.stages.sft", "--config", toy_config / "sft.yaml", *places, *words, *more)


def test_the_checkpoint_of_the_highest_score_is_kept(
    stage: Callable[..., Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest score, the last checkpoint, or still the one of the lowest loss. The scores here are made up: the second
    of three checkpoints gets the highest, while the loss falls to the last."""
    scores = iter([0.0, 1.0, 3.0, 2.0])  # before the training, and at updates 2, 4 and 6
    seen: list[Any] = []

    def score(self: sft.Selection, policy: Any) -> float:
        seen.append(policy)
        return next(scores)

    monkeypatch.setattr(sft.Selection, "__call__", score)
    done = stage("--max_steps", 6)
    assert done.code == 0, done.err[-3000:]
    artifact = Registry(tmp_path / "registry").get("sft/chosen")
    metrics = artifact.manifest.metrics
    assert (metrics["eval_score_before"], metrics["eval_score_after"]) == (0.0, 3.0) and len(seen) == 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["sft/eval_loss"] for row in rows if "sft/eval_loss" in row}
    assert losses[6] < losses[4] == metrics["eval_loss_after"], "by its loss the last one would have been kept"
    saved = load_tensors(tmp_path / "out" / "sft" / "checkpoints" / "checkpoint-4", "weights")
    checkpoint = {name.replace(".default.", "."): weight for name, weight in saved.items()}
    kept = load_file(artifact.path / ADAPTER_FILE)
    assert kept.keys() == checkpoint.keys() and all(torch.equal(kept[name], checkpoint[name]) for name in kept)
    assert [p.stage for p in artifact.manifest.parents] == ["reward"]


def test_scores_are_those_of_the_reward_model(stage: Callable[..., Call], tmp_path: Path) -> None:
    """A selection that scores the policy's answers with the policy itself, or the same answers at every evaluation."""
    done = stage()
    assert done.code == 0, done.err[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["sft/eval_score"] for row in rows if "sft/eval_score" in row}
    assert set(scores) == {0, 2, 4} and len(set(scores.values())) == 3
    metrics = Registry(tmp_path / "registry").get("sft/chosen").manifest.metrics
    assert metrics["eval_score_after"] == pytest.approx(max(scores[2], scores[4]))


def test_without_a_reward_model_the_loss_chooses(finished: tuple[Path, Path]) -> None:
    """The default that changed for everybody."""
    metrics = Registry(finished[0]).get("sft/toy").manifest.metrics
    assert "eval_score_after" not in metrics and metrics["eval_loss_after"] < metrics["eval_loss_before"]


def test_a_missing_reward_model_is_told_before_the_training(stage: Callable[..., Call]) -> None:
    """Found at the first evaluation, after the model was loaded."""
    assert "reward/tox" in stage("--selection_reward", "reward/tox").complaint


def test_answers_without_room_are_told_before_the_training(stage: Callable[..., Call], tmp_path: Path) -> None:
    """A traceback at the first evaluation, or scores of texts beyond the context."""
    assert "response_length=300" in stage("--response_length", 300).complaint
    assert not (tmp_path / "out" / "sft" / "metrics.jsonl").exists()
