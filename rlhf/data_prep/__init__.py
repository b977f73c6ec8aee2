"""Raw rows -> validated rows, with counts of what was dropped and why; and the demo's data and base model."""

from rlhf.data_prep.build import DataConfig, prepare

__all__ = ["DataConfig", "prepare"]
