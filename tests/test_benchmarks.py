"""Each benchmark at toy size."""

from __future__ import annotations

import json
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
