"""The command-line parser of all commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from rlhf.base.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated options and raises `UserError`, one line, in place of printing its usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"prog": program(), "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def program() -> str:
    """Return the command that runs: `rlhf VERB`, `python -m MODULE` or the name of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("rlhf ") or spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"
