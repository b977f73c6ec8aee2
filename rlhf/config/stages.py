"""The stages that train, by name, with their options."""

from __future__ import annotations

from rlhf.config.options import TrainingConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.pretrain import PretrainConfig
from rlhf.config.reward import RewardConfig
from rlhf.config.sft import SFTConfig

#: In the order in which a pipeline runs them.
STAGE_CONFIGS: dict[str, type[TrainingConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
}
