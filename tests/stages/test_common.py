"""What the runners share: the surroundings of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from test_models import ppo_config

from rlhf.base import distributed
from rlhf.stages.run import open_run


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
