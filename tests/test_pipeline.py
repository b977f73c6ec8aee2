"""The whole chain at toy size, through the command line, as its user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOY = {
    "sft": "max_steps: 4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\neval_steps: 2\nsave_steps: 2\n",
    "reward": "policy: sft/toy\nmax_steps: 4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 1\n"
    "eval_steps: 2\nsave_steps: 2\n",
    "ppo": "policy: sft/toy\nreward: reward/toy\ntotal_episodes: 16\nrollout_batch_size: 8\nminibatch_size: 4\n"
    "microbatch_size: 2\nresponse_length: 8\nnum_eval_samples: 6\nsave_steps: 1\n",
}


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory: pytest.TempPathFactory, toy_base: Callable[[str], Path], toy_data: Path) -> Path:
    """A config folder for `rlhf.pipeline` on the toy model and data."""
    folder = tmp_path_factory.mktemp("config")
    for stage, text in TOY.items():
        common = f"name: toy\ndataset: {toy_data}\nlora_r: 4\nlora_alpha: 8\nlearning_rate: 1e-2\n"
        model = f"model_name_or_path: {toy_base('llama')}\nchat_template: chatml\n" if stage == "sft" else ""
        (folder / f"{stage}.yaml").write_text(common + model + text)
    return folder


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_config: Path) -> tuple[Path, Path]:
    """Registry and output folder of a finished toy pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = command(
        "rlhf.pipeline", "--config", toy_config, "--registry", folder / "registry", "--output_dir", folder / "out"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "registry", folder / "out"


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


def test_second_run_skips_what_is_registered(finished: tuple[Path, Path], toy_config: Path) -> None:
    """A recipe hash that depends on the place or the time would train everything again."""
    done = command("rlhf.pipeline", "--config", toy_config, "--registry", finished[0], "--output_dir", finished[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("skipped") == 3
