"""People's feedback, of any shape, as checked demonstrations, comparisons and prompts; and the demo's data."""

from __future__ import annotations

from pathlib import Path

from rlhf.base.functions import load_function
from rlhf.data_prep.prepare.recipe import AnyConfig, DataConfig, ReviewsConfig, Source, read_recipe

__all__ = ["DataConfig", "ReviewsConfig", "Source", "prepare", "read_recipe"]

#: Builders by recipe, which need libraries that take seconds to import.
_BUILDERS = {
    DataConfig: "rlhf.data_prep.prepare.build:prepare_sources",
    ReviewsConfig: "rlhf.data_prep.demo.build:prepare_reviews",
}


def prepare(config: AnyConfig) -> Path:
    """Make the data folder of a recipe and return it; a folder that the same recipe made is left as it is."""
    folder: Path = load_function(_BUILDERS[type(config)])(config)
    return folder
