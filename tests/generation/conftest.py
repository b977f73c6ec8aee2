"""Small models to talk to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def place(finished: tuple[Path, Path]) -> list[str]:
    """The options that say where the toy artefacts are and how they compute."""
    return ["--registry", str(finished[0]), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def base_folder(toy_base: Callable[[str], Path]) -> Path:
    """A base model as a folder, of which nothing is in a registry; its tokenizer has no chat template."""
    return toy_base("llama")
