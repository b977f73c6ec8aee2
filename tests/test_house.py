"""docs/house.md against the code: the tree is complete, and every file and name on the page exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_layers import LAYERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf"
PAGE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
#: `path/file.py` or `path/file.py: name` or `path/file.py: Class.name`.
REFERENCE = re.compile(r"`((?:rlhf|tests|docs)/[\w/]+\.(?:py|md))(?:: ([\w.]+))?`")


def tree() -> dict[str, set[str]]:
    """Return the names that the page lists for each room: files without their ending, and folders with a slash."""
    block = PAGE.split("```text\n")[1].split("```")[0]
    rooms: dict[str, set[str]] = {}
    room = ""
    for line in block.splitlines():
        words = line.split(" | ")[0].split()
        if not line.startswith("    "):
            room = words[0].removesuffix("/")
            rooms[room] = set()
            words = words[1:]
        rooms[room] |= set(words)
    return rooms


def listed(room: str) -> set[str]:
    """Return the files and folders of a room, as the page writes them."""
    place = PACKAGE / room
    if not place.is_dir():
        return set()
    names = {file.stem for file in place.glob("*.py")} - {"__init__"}
    folders = {f"{folder.name}/" for folder in place.iterdir() if folder.is_dir() and not folder.name.startswith("__")}
    return names | folders


def names_in(file: Path) -> set[str]:
    """Return the functions, classes, their methods, and constants that a file defines."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= (
                {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
                if isinstance(node, ast.ClassDef)
                else set()
            )
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_the_tree_lists_the_rooms_from_top_to_bottom() -> None:
    """Catches: a room that was added, removed or moved between layers without the page."""
    assert list(tree()) == [room for room in reversed(LAYERS) if room not in ("pipeline", "completion", "__main__")]


@pytest.mark.parametrize("room", [room for room in LAYERS if (PACKAGE / room).is_dir()])
def test_the_tree_lists_every_file(room: str) -> None:
    """Catches: a file that nobody finds on the page, and one on the page that is gone."""
    assert tree()[room] == listed(room)


@pytest.mark.parametrize(("file", "name"), sorted(set(REFERENCE.findall(PAGE))))
def test_every_file_and_name_exists(file: str, name: str) -> None:
    """Catches: a step or recipe that names a file or function that was moved or renamed."""
    assert (ROOT / file).is_file()
    assert not name or name in names_in(ROOT / file)


def test_the_references_are_found() -> None:
    """Catches: a page whose way of naming files this test no longer reads, with which it would pass empty."""
    assert len(REFERENCE.findall(PAGE)) > 30
    assert PAGE.count(".py: ") == sum(bool(name) for _, name in REFERENCE.findall(PAGE))
