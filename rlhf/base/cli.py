"""The command-line parser of all commands."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf.base.errors import UserError

_WIDEST = 120
"""Columns of the widest help text: longer lines are hard to read."""


def whole_number_or_auto(text: str) -> int | str:
    """Read an option's value that is a whole number or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got '{text}'") from None


_KINDS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", whole_number_or_auto: "N|auto"}


class HelpFormatter(argparse.HelpFormatter):
    """Help in two columns: each option once, the kind of its value, and the default where its text states none."""

    def __init__(self, prog: str, **options: Any) -> None:
        columns = min(shutil.get_terminal_size().columns, _WIDEST)
        super().__init__(prog, **{"max_help_position": 28, "width": columns - 2, **options})

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or "default:" in text:
            return text
        if action.required:
            return f"{text} (required)"
        if action.nargs == 0 or default in (None, argparse.SUPPRESS, [], ""):
            return text
        values = default if isinstance(default, list) else [default]
        shown = " ".join(
            str(v).lower() if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else str(v) for v in values
        )
        return f"{text} (default: {shown.replace('%', '%%')})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(spellings(action))} {value}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        value = self._metavar_formatter(action, default_metavar)(1)[0]
        forms = {"+": f"{value} ...", "*": f"[{value} ...]"}
        if isinstance(action.nargs, str) and action.option_strings and action.nargs in forms:
            return forms[action.nargs]
        return super()._format_args(action, default_metavar)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.const, bool):
            return "true|false"
        return _KINDS.get(action.type, "TEXT")


def spellings(action: argparse.Action) -> Sequence[str]:
    """Return an option's names, without `--a-b` where there is `--a_b`."""
    names = action.option_strings
    return [name for name in names if name.startswith("--") and "_" in name] or names


class RawHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`HelpFormatter` that leaves the lines of a description as they are."""


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated options and raises `UserError`, one line, in place of printing its usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults = {"prog": program(), "allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(*args, **{**defaults, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def program() -> str:
    """Return the command that runs: `rlhf VERB`, `python -m MODULE` or the name of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("rlhf ") or spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"
