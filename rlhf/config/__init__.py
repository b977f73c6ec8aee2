"""Options of all stages, read from YAML files and the command line; unknown keys are refused.

Names follow transformers and TRL where the meaning is the same. Each option's `help` states its meaning
and unit. Sizes are in sequences unless the help says tokens; steps are optimiser updates.
"""

from rlhf.config.evaluation import CHECKS, EvaluationConfig
from rlhf.config.limits import divides, require_above_zero, require_at_least
from rlhf.config.options import (
    TRACKING_OPTIONS,
    ComputeConfig,
    RunConfig,
    StageConfig,
    TextConfig,
    TrainingConfig,
    TrainingLength,
    option,
)
from rlhf.config.parse import build, folder_name, options_parser, parse_config, read_overrides, read_yaml, yaml_value
from rlhf.config.ppo import REGISTERED_REWARD, PPOConfig, is_registered_reward
from rlhf.config.pretrain import PretrainConfig
from rlhf.config.reward import CardConfig, RewardCardConfig, RewardConfig
from rlhf.config.sft import SFTConfig, read_new_tokens
from rlhf.config.shipped import find_config
from rlhf.config.stages import STAGE_CONFIGS
