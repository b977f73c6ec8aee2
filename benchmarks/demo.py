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
from statistics import fmean
from typing import Any

# (stage, figure before training if there is one, figure, label, what the project wants of it)
FIGURES = (
    ("sft", "eval_loss_before", "eval_loss_after", "SFT: held-out loss, nats a token", "<= 3.70"),
    ("reward", "", "accuracy", "reward model: accuracy, held-out sentences", ">= .93"),
    ("reward", "", "accuracy_held_out_raters", "the same, by raters it never saw", ">= .92"),
    ("reward", "", "human_ceiling", "how often these raters agree", ""),
    ("reward", "", "vader_accuracy", "VADER on the same pairs", ""),
    ("ppo", "reward_positive_before", "reward_positive_after", "PPO: liked by the reward model", ">= .95"),
    ("ppo", "gold_positive_before", "gold_positive_after", "positive by VADER", ">= .85"),
    ("ppo", "gold_negative_before", "gold_negative_after", "negative by VADER", "<= .04"),
    ("ppo", "", "kl", "KL to SFT, nats a response", "<= 8"),
    ("ppo", "distinct2_before", "distinct2_after", "distinct-2", ">= .9 of before"),
    ("ppo", "length_before", "length_after", "tokens a response", ">= .7 of before"),
    ("ppo", "stop_rate_before", "stop_rate_after", "answers that end by themselves", ">= .97"),
    ("", "", "peak_rss_gb", "peak memory, GB", "<= 6"),
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
    """Return a Markdown table: each figure, its target, its value in each run, and the mean of these."""
    lines = [
        " | ".join(["| figure | target", *(f"seed {run['seed']}" for run in runs), "mean"]) + " |",
        "|---" * (3 + len(runs)) + "|",
    ]
    for stage, before, after, label, target in FIGURES:
        figures = [run[stage] if stage else run for run in runs]
        if all(part[after] is not None for part in figures):
            figures.append({name: fmean(part[name] for part in figures) for name in (before, after) if name})
            values = [(f"{part[before]:.3g} → " if before else "") + f"{part[after]:.3g}" for part in figures]
            lines.append(" | ".join([f"| {label}", target, *values]) + " |")
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
