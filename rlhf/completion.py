"""Shell completion: `rlhf completion SHELL` prints a script that a shell reads once; a TAB starts no Python.

The script holds every verb, option and choice, and lists the artefacts in `registry/` of the current folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from rlhf.base.cli import Parser, spellings

#: Where each shell looks for the script.
SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/rlhf",
    "zsh": "a folder of $fpath, as _rlhf, before compinit runs",
    "fish": "~/.config/fish/completions/rlhf.fish",
}
#: Options and arguments whose values are artefacts, and those whose values are files or folders.
ARTEFACTS = {
    "policy", "reward", "model", "models", "compare", "reference", "baseline", "selection_reward", "ref", "a", "b",
    "run",
}  # fmt: skip
FILES = {"config", "dataset", "output_dir", "registry", "output", "folder", "into", "runs", "load", "save"}
#: Functions that list `sft/demo`, `reward/demo`, ... from the folders of a registry.
_LIST = {
    "bash": """_rlhf_artefacts() { local a; for a in registry/*/*/; do a=${a#registry/}; compgen -W "${a%/}" -- "$1"; done; }""",
    "zsh": """_rlhf_artefacts() { local a; for a in registry/*/*(N/); do compadd -- ${a#registry/}; done }""",
    "fish": """function _rlhf_artefacts; for a in registry/*/*/; string replace -r '^registry/(.*)/$' '$1' $a; end; end""",
}


class _Parsing(BaseException):
    """Carries the parser of a verb that has come to parse its words."""


def parser_of(verb: str, dispatch: Callable[[], None]) -> argparse.ArgumentParser:
    """Return the parser whose help `rlhf VERB --help` shows, by running the verb until it parses its words."""

    def stop(self: Parser, *arguments: Any, **options: Any) -> NoReturn:
        raise _Parsing(self)

    words, parse = sys.argv, Parser.parse_known_args
    sys.argv, Parser.parse_known_args = ["rlhf", verb, "--help"], stop  # type: ignore[assignment, method-assign]
    try:
        dispatch()
    except _Parsing as stopped:
        return stopped.args[0]  # type: ignore[no-any-return]
    finally:
        sys.argv, Parser.parse_known_args = words, parse  # type: ignore[method-assign]
    raise AssertionError(f"{verb} --help parses no words")


def script(shell: str, verbs: Mapping[str, str], dispatch: Callable[[], None]) -> str:
    """Return the script of a shell, from the summaries of the verbs by name and the function that runs them."""
    import shtab

    root = argparse.ArgumentParser("rlhf")
    commands = root.add_subparsers()
    for verb, summary in verbs.items():
        parser = _own_parser() if verb == "completion" else parser_of(verb, dispatch)
        _complete_values(parser)
        commands.add_parser(verb, help=summary, parents=[parser], add_help=False)
    return str(shtab.complete(root, shell, preamble=cast(Any, _LIST)))


def _complete_values(parser: argparse.ArgumentParser) -> None:
    """Mark the options and arguments whose values are files or artefacts, in the subcommands too; one spelling each."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_values(command)
        elif action.dest in ARTEFACTS:
            action.complete = {"bash": "_rlhf_artefacts", "zsh": "_rlhf_artefacts", "fish": "(_rlhf_artefacts)"}  # type: ignore[attr-defined]
        elif action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        action.option_strings = spellings(action)


def _own_parser() -> Parser:
    parser = Parser(
        description="Print the script that completes verbs, options, choices and artefacts on TAB.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rlhf completion SHELL > FILE, where FILE is\n"
        + "\n".join(f"  {s:5s} {file}" for s, file in SHELLS.items()),
    )
    parser.add_argument("shell", choices=tuple(SHELLS))
    return parser


def main(verbs: Mapping[str, str], dispatch: Callable[[], None]) -> None:
    """Print the script of the shell that the command line names."""
    print(script(_own_parser().parse_args().shell, verbs, dispatch))
