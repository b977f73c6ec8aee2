"""The layers of the package: imports go down only, and no file takes part in a circle.

`LAYERS` lists the rooms from the ground up. Every import statement is read, those inside functions and for typing too, and
every string that names a module of the package: tables of verbs and of builders import by such strings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1] / "rlhf"

#: Each room imports from rooms further up in this list only, which lie below it in the house.
LAYERS = (
    "base",
    "config",
    "registry",
    "run",
    "models",
    "data_prep",
    "reward",
    "ppo",
    "doctor",
    "report",
    "evaluation",
    "stages",
    "sharing",
    "migration",
    "generation",
    "init",
    "pipeline",
    "completion",
    "__main__",
)
LARGEST_FILE = 500
MOST_ARROWS = 110
#: A string that names a module, or a function of one; `NAMED` stands for the place of such an import.
NAMED_MODULE, NAMED = re.compile(r"rlhf(\.\w+)+(:\w+)?"), "main"
#: Functions that may import the package when they are called: runners, and tables of verbs, which start quickly that way.
STARTERS = {"main", "dispatch"}


class Import(NamedTuple):
    """A module that a module imports, and the function in which it does (an empty string at the top)."""

    importer: str
    imported: str
    function: str


def modules(root: Path) -> dict[str, Path]:
    """Return the files of a package by dotted module name."""
    names = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports(root: Path) -> list[Import]:
    """Return all imports of the package's modules by each other."""
    files = modules(root)

    def resolve(name: str) -> str:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports name their module in full"
                yield from ((f"{child.module}.{alias.name}", function) for alias in child.names)
            elif isinstance(child, ast.Constant) and NAMED_MODULE.fullmatch(str(child.value)):
                yield str(child.value).partition(":")[0], NAMED
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from walk(child, inside)

    result = []
    for importer, file in files.items():
        for name, function in walk(ast.parse(file.read_text(encoding="utf-8")), ""):
            imported = resolve(name)
            if imported and imported != importer:
                result.append(Import(importer, imported, function))
    return result


def room(module: str) -> str:
    """Return the room of a module: `rlhf.ppo.trainer` is in `ppo`."""
    return [*module.split("."), ""][1]


def arrows_up(edges: Iterable[Import]) -> list[Import]:
    """Return the imports of a room by one below it, or by one that no layer names."""
    rank = {name: height for height, name in enumerate(LAYERS)}
    return [
        one
        for one in edges
        if room(one.importer) != room(one.imported)
        and room(one.importer)
        and rank.get(room(one.importer), -1) <= rank.get(room(one.imported), len(LAYERS))
    ]


def circles(edges: Iterable[Import]) -> list[str]:
    """Return the modules that import themselves by way of others."""
    targets: dict[str, set[str]] = {}
    for one in edges:
        targets.setdefault(one.importer, set()).add(one.imported)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = targets.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return sorted(module for module in targets if module in reachable(module))


def hidden(edges: Iterable[Import]) -> list[Import]:
    """Return the imports inside functions that are neither a runner's `main` nor a table of verbs."""
    return [one for one in edges if one.function and one.function not in STARTERS]


IMPORTS = imports(ROOT)


def test_imports_go_down_only() -> None:
    """Catches: a room that needs one above it, which makes neither readable or testable alone."""
    assert arrows_up(IMPORTS) == []


def test_no_circles() -> None:
    """Catches: files that can only be understood together."""
    assert circles(IMPORTS) == []


def test_no_hidden_imports() -> None:
    """Catches: an import moved into a function so that a circle does not show."""
    assert hidden(IMPORTS) == []


def test_few_arrows_between_rooms() -> None:
    """Catches: rooms that grow together into one knot."""
    arrows = {(room(one.importer), room(one.imported)) for one in IMPORTS if room(one.importer) != room(one.imported)}
    assert len(arrows) <= MOST_ARROWS


def test_every_file_is_in_a_room() -> None:
    """Catches: loose files at the root of the package, and rooms that no layer names."""
    assert {room(module) for module in modules(ROOT)} - {""} == set(LAYERS)


def test_no_file_is_too_long() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in modules(ROOT).values()}
    assert {file: lines for file, lines in lengths.items() if lines > LARGEST_FILE} == {}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with an arrow up, a circle and a hidden import; `rlhf.config.ppo` is as it should be."""
    files = {
        "__init__.py": "",
        "base/__init__.py": "",
        "base/errors.py": "from rlhf.config.ppo import PPOConfig\n",
        "config/__init__.py": "",
        "config/ppo.py": "from rlhf.base.text import short\n",
        "base/text.py": "def short():\n    import rlhf.base.files\n",
        "base/files.py": "from rlhf.base import text\n",
        "stages/run.py": "def main():\n    from rlhf.base import text\n",
        "attic/junk.py": "import rlhf.base.text\n",
        "registry/table.py": "VERBS = {'run': 'rlhf.stages.run:main'}\n",
    }
    for name, text in files.items():
        file = tmp_path / "rlhf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "rlhf"


def test_these_tests_can_fail(package: Path) -> None:
    """Catches: a reader of imports that sees none, with which all of the above would pass."""
    edges = imports(package)
    up = {(one.importer, one.imported) for one in arrows_up(edges)}
    assert up == {
        ("rlhf.base.errors", "rlhf.config.ppo"),
        ("rlhf.attic.junk", "rlhf.base.text"),
        ("rlhf.registry.table", "rlhf.stages.run"),
    }
    assert circles(edges) == ["rlhf.base.files", "rlhf.base.text"]
    assert [(one.importer, one.function) for one in hidden(edges)] == [("rlhf.base.text", "short")]
