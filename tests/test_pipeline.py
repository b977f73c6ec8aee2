"""The whole chain at toy size, through the command line, as its user runs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path


def test_results_hold_every_promised_figure(finished: tuple[Path, Path]) -> None:
    """A figure that a stage forgets to report, or reports under another name, would be missing from results.json."""
    results = json.loads((finished[1] / "results.json").read_text())
    promised = {
        "sft": "eval_loss_before eval_loss_after seconds",
        "reward": "accuracy accuracy_held_out_raters human_ceiling vader_accuracy pairs seconds",
        "ppo": "episodes updates seconds seconds_per_update kl score_before score_after gold_positive_before "
        "gold_positive_after gold_negative_before gold_negative_after reward_positive_before reward_positive_after "
        "distinct2_before distinct2_after length_before length_after stop_rate_after",
    }
    for stage, names in promised.items():
        assert set(names.split()) <= results[stage].keys()
    assert results["ppo"]["episodes"] == 16 and results["ppo"]["updates"] == 2
    assert results["total_seconds"] > 0 and results["peak_rss_gb"] > 0
    assert (finished[1] / "report.html").stat().st_size > 10_000


def test_second_run_skips_what_is_registered(
    finished: tuple[Path, Path], toy_config: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A recipe hash that depends on the place or the time would train everything again."""
    done = command("rlhf.pipeline", "--config", toy_config, "--registry", finished[0], "--output_dir", finished[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("skipped") == 3
