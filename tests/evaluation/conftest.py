"""A toy PPO run with snapshots."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from judged import World

from rlhf.config import PPOConfig, parse_config
from rlhf.stages import ppo

SIZES = ("--num_prompts", 6, "--samples_per_prompt", 3, "--response_length", 8, "--best_of", 8, "--best_of_prompts", 3)
PLACE = ("--wandb_mode", "disabled", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, toy_config: Path, finished: tuple[Path, Path]) -> World:
    folder = tmp_path_factory.mktemp("world")
    registry, run, prompts = folder / "registry", folder / "snaps", folder / "data"
    shutil.copytree(finished[0], registry)
    prompts.mkdir()
    ask = 'Write one sentence of a movie review that starts with "{}"'
    rows = [{"prompt": ask.format(word)} for word in ("This", "Of", "Plot", "Was", "Very", "Funny", "Film")]
    (prompts / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = (*PLACE, "--registry", registry)
    sizes = ("--total_episodes", 32, "--snapshot_steps", 1, "--name", "snaps", "--output_dir", run)
    words = ("--config", toy_config / "ppo.yaml", *place, *sizes)
    ppo.run(parse_config(PPOConfig, list(map(str, words))))
    return World(registry, run, prompts, tuple(map(str, (*place, "--dataset", prompts, *SIZES))))
