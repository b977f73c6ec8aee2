"""Each benchmark at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_demo_over_seeds(tmp_path: Path, toy_config: Path) -> None:
    """A figure renamed in results.json, or seeds that overwrite each other's runs, would break the README's table."""
    out = tmp_path / "demo.json"
    script = Path(__file__).parents[1] / "benchmarks" / "demo.py"
    words = ["--config", toy_config, "--seeds", 0, 1, "--folder", tmp_path / "runs", "--out", out]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(out.read_text())
    assert [run["seed"] for run in runs] == [0, 1]
    assert runs[0]["artifacts"] != runs[1]["artifacts"]
    assert "| PPO: KL to SFT, nats a response | <= 8 |" in done.stdout


def test_dedup_and_prepare(tmp_path: Path) -> None:
    """A figure renamed, or a method that no longer runs, would break the tables of docs/data.md."""
    root = Path(__file__).parents[1]
    for name, figures in (("dedup", {"precision", "recall"}), ("prepare", {"used"})):
        out = tmp_path / f"{name}.json"
        words = [str(root / "benchmarks" / f"{name}.py"), "--sizes", "400", "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        runs = json.loads(out.read_text())
        assert all(run.keys() >= {"rows", "processor_microseconds_a_row", "memory_megabytes", *figures} for run in runs)
    ours = json.loads((tmp_path / "dedup.json").read_text())[0]
    assert ours["precision"] == 1.0 and ours["recall"] >= 0.9 and ours["near_duplicates"] > 10
