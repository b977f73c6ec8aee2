"""The audit's plain part shares no code with what it recomputes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[3] / "rlhf" / "doctor" / "audit"
PLAIN = sorted(AUDIT.glob("plain_*.py"))
#: Libraries, and the place of the cache.
ALLOWED = {"torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes", "rlhf.base.assets"}


def strangers(source: str, standard: frozenset[str]) -> list[str]:
    """Return the modules that a source imports and a plain file may not."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    own = [name for name in names if not name.startswith("rlhf.doctor.audit.plain_")]
    return [name for name in own if name not in ALLOWED and name.partition(".")[0] not in standard | ALLOWED]


@pytest.mark.parametrize("file", PLAIN, ids=lambda file: file.stem)
def test_imports(file: Path) -> None:
    """Catches: a function of the trainer's, whose fault both sides would have."""
    import sys

    assert len(PLAIN) >= 4
    assert strangers(file.read_text(encoding="utf-8"), sys.stdlib_module_names) == []


def test_this_test_can_fail() -> None:
    """Catches: a reader of imports that sees none."""
    source = "import json\nimport torch\nfrom rlhf.ppo import functional\ndef f():\n    import rlhf.models.roles\n"
    assert strangers(source, frozenset({"json"})) == ["rlhf.ppo", "rlhf.models.roles"]
