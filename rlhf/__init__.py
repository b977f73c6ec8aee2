"""RLHF in three stages: supervised fine-tuning, reward model, PPO with a KL penalty against the SFT reference."""

__version__ = "0.1.0"
