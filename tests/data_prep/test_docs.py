"""docs/data.md against the code: readers, steps and options that are there have to be said, and the reverse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlhf.data_prep.formats.readers import READERS
from rlhf.data_prep.prepare.recipe import CLEANING_STEPS, Options, Source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its head left out."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = section[section.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as the page writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return ", ".join(map(str, field.default_factory())) or "none"
    if field.default is dataclasses.MISSING:
        return "required"
    return "none" if field.default is None else str(field.default)


@pytest.mark.parametrize("heading, config", [("Options", Options), ("Options of a source", Source)])
def test_every_option_is_listed_with_its_default(heading: str, config: Any) -> None:
    """Catches: an option that was added, renamed or removed, and a default that was changed, without the page."""
    documented = {row[0]: row[2] for row in table(heading)}
    assert documented == {f"`{field.name}`": f"`{default_of(field)}`" for field in dataclasses.fields(config)}


def test_every_reader_and_its_columns() -> None:
    """Catches: a reader that nobody is told of."""
    documented = {row[0]: row[2] for row in table("Readers")}
    assert documented == {
        f"`{name}`": ", ".join(f"`{column}`" for column in reader.needs) or "see below"
        for name, reader in READERS.items()
    }


def test_every_cleaning_step() -> None:
    """Catches: a step without a word, or one that is said to be on and is off."""
    documented = {name.strip("` "): row[2] for row in table("Cleaning") for name in row[0].split(",")}
    assert set(documented) == set(CLEANING_STEPS)
    assert [name for name in CLEANING_STEPS if documented[name].startswith("yes")] == Options().clean
