"""People's feedback, in whatever shape -> checked demonstrations, comparisons and prompts; and the demo's data and base model."""

from __future__ import annotations

from pathlib import Path

from rlhf.data_prep.demo import ReviewsConfig, prepare_reviews
from rlhf.data_prep.prepare.recipe import AnyConfig, DataConfig, Source, read_recipe

__all__ = ["DataConfig", "ReviewsConfig", "Source", "prepare", "read_recipe"]


def prepare(config: AnyConfig) -> Path:
    """Makes the data folder of a recipe and returns it; one that is there, made by the same recipe, is left as it is."""
    if isinstance(config, ReviewsConfig):
        return prepare_reviews(config)
    from rlhf.data_prep.prepare.build import prepare_sources  # it needs libraries that the demo does not

    return prepare_sources(config)
