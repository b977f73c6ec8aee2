"""Options of all stages: one vocabulary, YAML files plus command-line overrides, unknown keys refused.

Names follow transformers and TRL where the meaning is the same. Each option's `help` states its meaning and unit; sizes
are in sequences unless it says tokens, steps are optimiser updates.
"""

from rlhf.config.evaluation import CHECKS, EvaluationConfig
from rlhf.config.limits import divides, require_above_zero, require_at_least, require_below_one
from rlhf.config.options import (
    INPUT_OPTIONS,
    PLACE_OPTIONS,
    ComputeConfig,
    RunConfig,
    StageConfig,
    TextConfig,
    TrainingConfig,
    TrainingLength,
    option,
)
from rlhf.config.parse import build, parse_config, read_yaml
from rlhf.config.ppo import MIN_WHITENED, PPOConfig, reward_kind
from rlhf.config.pretrain import PretrainConfig
from rlhf.config.reward import CardConfig, RewardCardConfig, RewardConfig
from rlhf.config.sft import SFTConfig, read_new_tokens

__all__ = [
    "CHECKS",
    "INPUT_OPTIONS",
    "MIN_WHITENED",
    "PLACE_OPTIONS",
    "CardConfig",
    "ComputeConfig",
    "EvaluationConfig",
    "PPOConfig",
    "PretrainConfig",
    "RewardCardConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "StageConfig",
    "TextConfig",
    "TrainingConfig",
    "TrainingLength",
    "build",
    "divides",
    "option",
    "parse_config",
    "read_new_tokens",
    "read_yaml",
    "require_above_zero",
    "require_at_least",
    "require_below_one",
    "reward_kind",
]
