"""`rlhf.ppo.functional` is maths: importing it must cost torch and nothing else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = {"transformers", "trl", "peft", "wandb", "bitsandbytes", "datasets"}
TEST_ONLY = {"jaxtyping", "beartype"}  # a plain install does not have them


def loaded_by(module: str) -> set[str]:
    """Which of the packages above a fresh interpreter holds after importing this module."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, module], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & (HEAVY | TEST_ONLY)


def test_functional_imports_torch_only() -> None:
    """Catches: an import (here or in rlhf/__init__ or rlhf/ppo/__init__) that drags a trainer stack into the maths."""
    assert loaded_by("rlhf.ppo.functional") == set()


def test_the_check_can_fail() -> None:
    """Catches: a check that passes whatever is imported (wrong interpreter, empty output, misspelt names)."""
    assert "transformers" in loaded_by("transformers")
