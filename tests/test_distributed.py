"""PPO in two processes is PPO in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.models.adapters import ADAPTER_FILE
from rlhf.registry import Registry

OPTIONS = {
    "dtype": "float64",
    "optim": "adamw_torch",
    "adam_epsilon": 1e-3,  # so that a gradient that is all rounding does not become a whole step
    "rollout_batch_size": 8,
    "minibatch_size": 8,
    "microbatch_size": 2,
    "total_episodes": 24,
    "whiten_rewards": "true",
    "ptx_coef": 0.5,
    "kl_target": 0.5,
    "kl_horizon": 100,
    "max_approx_kl": 1.0,
    "num_ppo_epochs": 2,
    "ema_decay": 0.5,
}


def launch(processes: int, toy_config: Path, finished: Path, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Runs the stage; the folder of what it registered, and its log."""
    shutil.copytree(finished, folder / "registry")
    words = [sys.executable, "-m"]
    if processes > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    words += ["rlhf.stages.ppo", "--config", str(toy_config / "ppo.yaml")]
    words += ["--name", "many", "--registry", str(folder / "registry"), "--output_dir", str(folder / "out")]
    words += [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "out" / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert ("in 2 processes" in done.stdout) == (processes == 2)
    assert done.stdout.count("registered ppo/many@") == 1, "one process writes, one talks"
    return Registry(folder / "registry").get("ppo/many@1").path, [json.loads(line) for line in lines]


def test_two_processes_do_what_one_does(toy_config: Path, finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches: gradients that are averaged or not added at all, whitening or a loss denominator of one process's rows, the
    same random numbers in both, a policy that drifts apart, two writers of one file."""
    (one, single), (two, double) = (launch(count, toy_config, finished[0], tmp_path / str(count)) for count in (1, 2))
    weights, others = load_file(one / ADAPTER_FILE), load_file(two / ADAPTER_FILE)
    moved = 0.0
    for name, tensor in weights.items():
        assert float((tensor - others[name]).abs().max()) < 1e-6, name
        moved = max(moved, float(tensor.abs().max())) if "lora_B" in name else moved
    assert moved > 1e-3
    assert [row["step"] for row in single if "objective/score" in row] == [1, 2, 3] and len(single) == len(double)
    for row, other in zip(single, double, strict=True):
        for name in row:
            if name.split("/")[0] in ("objective", "ppo", "response", "eval") and isinstance(row[name], float):
                assert other[name] == pytest.approx(row[name], abs=1e-5), name
