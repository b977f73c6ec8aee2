"""The switches of PPO through the command line, all on together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from toys import Call

from rlhf.models import ADAPTER_FILE
from rlhf.registry import Registry

SWITCHES = {
    "num_responses_per_prompt": 2,
    "kl_target": 3.0,
    "kl_horizon": 50,
    "max_approx_kl": 0.5,
    "max_kl": 50.0,
    "on_max_kl": "roll_back",
    "reward_clip": 3.0,
    "whiten_rewards": "true",
    "value_warmup_updates": 1,
    "ema_decay": 0.5,
    "ptx_coef": 1.0,
    "ptx_ratio": 0.5,
}


def test_every_switch_at_once_and_the_mean_of_the_weights_as_an_artifact(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: an option that the command line does not take, switches that break each other, a mean nobody registers."""
    registry = tmp_path / "registry"
    shutil.copytree(finished[0], registry)
    options = [word for name, value in SWITCHES.items() for word in (f"--{name}", value)]
    done = call(
        "rlhf.stages.ppo",
        *("--config", toy_config / "ppo.yaml", "--policy", "sft/toy", "--reward", "reward/toy", "--name", "all"),
        *("--registry", registry, "--output_dir", tmp_path / "out", "--rollout_batch_size", 8, "--total_episodes", 32),
        *options,
    )
    assert done.code == 0, done.err[-3000:]
    last, mean = (Registry(registry).get(f"ppo/{name}") for name in ("all", "all-ema"))
    weights = [load_file(artifact.path / ADAPTER_FILE) for artifact in (last, mean)]
    assert weights[0].keys() == weights[1].keys()
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert mean.manifest.parents == last.manifest.parents and mean.manifest.metrics["updates"] == 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ppo/ptx_loss"] > 0 for row in rows] == [False, True, True, True]
    assert len({row["objective/kl_coef"] for row in rows}) > 1
