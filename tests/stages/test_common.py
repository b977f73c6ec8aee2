"""What the runners share: the surroundings of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from test_models import ppo_config
from transformers import Trainer, TrainingArguments

from rlhf.base import distributed
from rlhf.stages.run import open_run
from rlhf.stages.trainer import on_one_device


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_leaves_logs(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a temporary folder that each further process leaves behind, and lines of two processes in one file."""
    passing = tmp_path / "tmp"
    passing.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(passing))
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    config = ppo_config(output_dir=str(tmp_path / "out"), registry=str(tmp_path / "registry"))
    with open_run("ppo", config, [], {"fingerprint": "", "rows": {}}, "recipe", {}) as run:
        run.tracker.log({"objective/score": 1.0}, 1)
        assert (run.tracker.run_dir / "metrics.jsonl").is_file()
        assert (run.tracker.run_dir.parent == passing) == (rank > 0)
    assert list(passing.iterdir()) == []
    assert (tmp_path / "out" / "ppo" / "metrics.jsonl").exists() == (rank == 0)


def test_one_device_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a stage on a machine with two devices that wraps its model and takes steps of twice the size."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def trainer(hold: bool) -> Trainer:
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, report_to=[])
        return Trainer(torch.nn.Linear(2, 1), on_one_device(arguments) if hold else arguments)

    if not torch.cuda.is_available():  # a machine with devices would compute on them
        assert (trainer(False).args.n_gpu, trainer(False)._train_batch_size) == (2, 6), "the test shows nothing"
    held = trainer(True)
    assert (held.args.n_gpu, held._train_batch_size, held.args.eval_batch_size) == (1, 3, 8)
    assert isinstance(held._wrap_model(held.model), torch.nn.Linear)
