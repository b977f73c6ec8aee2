"""README.md against the code: its commands, options, recipes and links exist."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from rlhf.__main__ import VERBS
from rlhf.base.functions import load_function
from rlhf.config import find_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("rlhf ")]
COMMANDS += [f"rlhf {words}" for words in re.findall(r"`rlhf ((?:\w+ )*\w+[^`]*)`", PAGE) if "VERB" not in words]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_of_the_readme_is_one(command: str) -> None:
    """A verb, option or recipe that was renamed, and that every newcomer would type."""
    verb, *words = shlex.split(command, comments=True)[1:]
    assert verb in VERBS
    options = VERBS[verb].options and load_function(VERBS[verb].options).__dataclass_fields__  # type: ignore[attr-defined]
    for word in words:
        if word.startswith("--") and options:
            assert word.removeprefix("--") in {*options, "config", "help"}, f"{verb} has no {word}"
    for place, following in itertools.pairwise(words):
        if place == "--config" and not following.startswith(("mine", "FILE", "FOLDER")):
            assert find_config(following).exists()


@pytest.mark.parametrize(
    "link", sorted(set(re.findall(r"`((?:docs|notebooks|benchmarks|configs|rlhf)/[\w/.]+)`", PAGE)))
)
def test_what_the_readme_points_to_is_there(link: str) -> None:
    """A page or file that was moved."""
    assert (ROOT / link).exists()


def test_every_page_of_the_docs_is_reachable() -> None:
    """A page that nobody would find, unless another page leads to it."""
    pages = "".join(file.read_text(encoding="utf-8") for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert [file.name for file in (ROOT / "docs").glob("*.md") if f"docs/{file.name}" not in pages] == []


@pytest.mark.parametrize("module", sorted({verb.module for verb in VERBS.values()}))
def test_every_verb_has_its_command(module: str) -> None:
    """A verb whose module was moved: `python -m rlhf.stages.sft` and `rlhf sft` are the same command."""
    assert callable(importlib.import_module(module).main)
