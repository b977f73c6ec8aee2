"""The demo over several seeds: `python benchmarks/demo.py --seeds 0 1 2 3`, one after the other.

Runs `rlhf.pipeline` once a seed, writes every run's `results.json` into one file, and prints the table of the README, a column
a seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# (stage, figure, label, what the project wants of it)
FIGURES = (
    ("sft", "eval_loss_before", "SFT: held-out loss before", ""),
    ("sft", "eval_loss_after", "SFT: held-out loss after", "<= 3.70"),
    ("reward", "accuracy", "reward: accuracy, held-out sentences", ">= .93"),
    ("reward", "accuracy_held_out_raters", "reward: accuracy, held-out raters", ">= .92"),
    ("reward", "human_ceiling", "reward: human ceiling", ""),
    ("reward", "vader_accuracy", "reward: VADER on the same pairs", ""),
    ("ppo", "reward_positive_before", "PPO: share with reward above 0, before", ""),
    ("ppo", "reward_positive_after", "PPO: share with reward above 0, after", ">= .95"),
    ("ppo", "gold_positive_before", "PPO: positive by VADER, before", ""),
    ("ppo", "gold_positive_after", "PPO: positive by VADER, after", ">= .85"),
    ("ppo", "gold_negative_before", "PPO: negative by VADER, before", ""),
    ("ppo", "gold_negative_after", "PPO: negative by VADER, after", "<= .04"),
    ("ppo", "kl", "PPO: KL to SFT, nats a response", "<= 8"),
    ("ppo", "distinct2_before", "PPO: distinct-2, before", ""),
    ("ppo", "distinct2_after", "PPO: distinct-2, after", ">= .9 of before"),
    ("ppo", "length_before", "PPO: tokens a response, before", ""),
    ("ppo", "length_after", "PPO: tokens a response, after", ">= .6 of before"),
    ("ppo", "stop_rate_after", "PPO: stop rate, after", ">= .97"),
    ("sft", "seconds", "SFT: seconds", ""),
    ("reward", "seconds", "reward: seconds", ""),
    ("ppo", "seconds", "PPO: seconds", ""),
    ("", "total_seconds", "whole: seconds", "<= 1200"),
    ("", "peak_rss_gb", "whole: peak memory, GB", "<= 6"),
)


def run_seed(config: Path, seed: int, folder: Path) -> dict[str, Any]:
    """One whole pipeline in a process of its own; a finished one is read, not run again."""
    results = folder / f"seed-{seed}" / "results.json"
    if not results.is_file():
        command = [sys.executable, "-m", "rlhf.pipeline", "--config", str(config), "--seed", str(seed)]
        command += ["--registry", str(folder / f"seed-{seed}" / "registry"), "--output_dir", str(results.parent)]
        subprocess.run(command, check=True)
    return json.loads(results.read_text())


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table: each figure, its target, and its value in each run."""
    lines = [
        " | ".join(["| figure | target", *(f"seed {run['seed']}" for run in runs)]) + " |",
        "|---" * (2 + len(runs)) + "|",
    ]
    for stage, name, label, target in FIGURES:
        values = [(run[stage] if stage else run)[name] for run in runs]
        if None not in values:
            lines.append(" | ".join([f"| {label}", target, *(f"{value:.4g}" for value in values)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("outputs/seeds"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo.json"))
    arguments = parser.parse_args()
    runs = [run_seed(arguments.config, seed, arguments.folder) for seed in arguments.seeds]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
