"""RLHF in three stages: supervised fine-tuning, reward model, PPO with a KL penalty against the SFT reference."""

import logging

# On a CPU it warns of a kernel that is not installed, at import, before a command has said a word.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
