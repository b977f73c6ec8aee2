"""Toy PPO trainers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shapes  # noqa: F401  (switches the checks on)
from test_models import VOCAB, ppo_config, role_models
from transformers import PreTrainedTokenizerBase

from rlhf.doctor.live import LiveDoctor
from rlhf.models.tokenization import load_tokenizer
from rlhf.ppo.rollout import Environment
from rlhf.ppo.state import Outputs
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward.sources import AdapterReward, Reward
from rlhf.run.timing import PhaseTimer
from rlhf.run.tracker import Tracker

OPENING = [5, 6, 7, 8, 9, 10, 11]
PROMPTS = [[*OPENING, *range(20, 20 + extra)] for extra in (1, 4, 2, 7, 3, 1)]
#: A quarter of the vocabulary ends a response, so toy responses have all lengths.
STOPS = list(range(2, VOCAB, 4))

Make = Callable[..., PPOTrainer]


@pytest.fixture
def tokenizer(toy_base: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(toy_base("llama")), chat_template="chatml")


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Make]:
    """Makes trainers; `folder` tells them apart, and two with one folder share checkpoints. `fresh` is as a run starts."""
    with contextlib.ExitStack() as stack:

        def build(
            family: str = "gpt2", *, folder: str = "run", seed: int = 21, fresh: bool = False, **options: Any
        ) -> PPOTrainer:
            config = ppo_config(**options)
            models = role_models(family, tmp_path / f"reward_{family}", config, seed=seed, fresh=fresh)
            tracker = Tracker(
                tmp_path / folder,
                stage="ppo",
                name="toy",
                group="toy",
                config={},
                wandb_mode="disabled",
                resume=config.resume,
            )
            stack.enter_context(tracker)
            environment = Environment(
                prompts=PROMPTS,
                rows=[{}] * len(PROMPTS),
                reward=Reward({"reward": AdapterReward(models)}),
            )
            outputs = Outputs(tracker=tracker, folder=tmp_path / folder / "checkpoints", timer=PhaseTimer())
            doctor = LiveDoctor("ppo", config.doctor, tracker, dataclasses.asdict(config))
            trainer = PPOTrainer(models, tokenizer, config, environment, outputs, observe=doctor.observe)
            trainer.sampling = dataclasses.replace(trainer.sampling, stop_token_ids=STOPS)
            return trainer

        yield build
