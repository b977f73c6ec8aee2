"""The recipes that come with the package: `--config demo` works outside the repository, too."""

from __future__ import annotations

from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean

PACKAGE = Path(__file__).parents[1]


def recipes() -> Path:
    """Return the folder of the recipes: inside the installed package, or beside it in the repository."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(path: str | Path) -> Path:
    """Return a config file or folder: the path itself if it exists, else the recipe that it names.

    `demo`, `configs/demo` and `demo/ppo.yaml` name recipes.

    Raises:
        UserError: there is neither.
    """
    file, recipe = Path(path), recipes() / str(path).removeprefix("configs/")
    if file.exists():
        return file
    if recipe.exists() and recipe.is_relative_to(recipes()) and ".." not in recipe.parts:
        return recipe
    names = sorted(folder.name for folder in recipes().glob("*/"))
    siblings = [str(p) for p in file.parent.glob("*")] if file.parent.is_dir() else []
    if file.suffix:
        raise UserError(f"no config file {path}{did_you_mean(str(path), siblings)}")
    raise UserError(
        f"no config folder {path}{did_you_mean(str(path), [*siblings, *names])}; recipes: {', '.join(names)}"
    )
