"""The demo's data: rated movie-review sentences -> demonstrations, rankings, prompts. Its splits are its own, and fixed."""

from rlhf.data_prep.demo.build import ReviewsConfig, prepare_reviews

__all__ = ["ReviewsConfig", "prepare_reviews"]
