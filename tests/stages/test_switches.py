"""The switches of PPO through the command line, all on together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import Call

from rlhf.models.adapters import ADAPTER_FILE
from rlhf.ppo.trainer import PPOTrainer
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
    updates = [row for row in rows if "objective/kl_coef" in row]  # the others are held-out evaluations
    assert [row["ppo/ptx_loss"] > 0 for row in updates] == [False, True, True, True]
    assert len({row["objective/kl_coef"] for row in updates}) > 1


LEAN = {"gradient_checkpointing": "true", "microbatch_tokens": 64, "offload_base": "true", "sampler": "generate"}


def test_options_of_memory_and_sampling_reach_the_run(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: options that the stage does not pass on, and results that depend on them."""
    registry = tmp_path / "registry"
    shutil.copytree(finished[0], registry)
    rows = {}
    for name, options in (("plain", {}), ("lean", LEAN)):
        done = call(
            "rlhf.stages.ppo",
            *("--config", toy_config / "ppo.yaml", "--name", name, "--registry", registry, "--dtype", "float32"),
            *("--output_dir", tmp_path / name),
            *[word for option, value in options.items() for word in (f"--{option}", value)],
        )
        assert done.code == 0, done.err[-3000:]
        file = tmp_path / name / "ppo" / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines())
        rows[name] = [line for line in lines if "objective/score" in line]
    for one, two in zip(rows["plain"], rows["lean"], strict=True):
        assert two["response/length"] == one["response/length"]
        assert abs(two["objective/score"] - one["objective/score"]) < 1e-3


def test_running_out_of_memory_leaves_the_last_checkpoint(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: an allocator's traceback, a checkpoint that is lost, and a lowered batch size that --resume does not take."""
    registry = tmp_path / "registry"
    shutil.copytree(finished[0], registry)
    words = (
        "--config",
        toy_config / "ppo.yaml",
        "--name",
        "large",
        "--registry",
        registry,
        "--output_dir",
        tmp_path / "o",
    )
    optimise, updates = PPOTrainer.optimise, []

    def runs_out(self: PPOTrainer, *args: Any) -> dict[str, float]:
        updates.append(self.state.updates_done)
        if self.state.updates_done == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return optimise(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "optimise", runs_out)
        complaint = call("rlhf.stages.ppo", *words, "--microbatch_size", 4).complaint
    assert "'optimise'" in complaint and "microbatch_size" in complaint and updates == [0, 1]
    done = call("rlhf.stages.ppo", *words, "--microbatch_size", 2, "--resume", "true")
    assert done.code == 0, done.err[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "o" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "objective/kl" in row] == [1, 2]


def test_a_rollout_that_cannot_fit_is_refused_before_the_first_forward(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a run that loads, evaluates, and dies in its first rollout."""
    complaint = call(
        "rlhf.stages.ppo",
        *("--config", toy_config / "ppo.yaml", "--name", "huge", "--registry", finished[0], "--output_dir", tmp_path),
        *("--rollout_batch_size", 2**32, "--total_episodes", 2**32, "--minibatch_size", 2**32),
    ).complaint
    assert "GB of keys and values" in complaint and "rollout_batch_size" in complaint
