"""The command line of the registry: `rlhf registry list | show REF | verify [REF] | delete REF | ...`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.cli import Parser
from rlhf.base.errors import run_command
from rlhf.base.functions import load_function
from rlhf.registry import Registry
from rlhf.sharing import verbs

#: Adds the parser of a verb: (name, help text, function, *names of references).
AddVerb = Callable[..., argparse.ArgumentParser]


def build_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(description="Inspect, compare and move artefacts.")
    _add_registry_option(parser, default="registry")
    commands = parser.add_subparsers(dest="command", required=True, metavar="VERB")

    def verb(name: str, help: str, run: verbs.Verb, *references: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=help)
        for reference in references:
            command.add_argument(reference.lower(), metavar=reference, help="sft/demo, sft/demo@2 or sft/demo@TAG")
        # SUPPRESS keeps this default from overwriting an option that stands before the verb.
        _add_registry_option(command, default=argparse.SUPPRESS)
        command.set_defaults(run=run)
        return command

    _add_inspecting(verb)
    _add_deleting(verb)
    _add_copying(verb)
    return parser


def _add_inspecting(verb: AddVerb) -> None:
    verb("list", "list all artefacts", verbs.print_list)
    verb("show", "show manifest and lineage of an artefact", verbs.show, "REF")
    checks = _later("rlhf.sharing.verify:command")
    verify = verb("verify", "check files, parents and inputs of all artefacts, or of one", checks)
    verify.add_argument("ref", metavar="REF", nargs="?", help="default: all")
    lineage = verb("lineage", "show what an artefact was made from, down to the data, as a tree", verbs.lineage, "REF")
    diff = verb("diff", "show differences in parents, data, options and figures", verbs.diff, "A", "B")
    for command in (lineage, diff):
        command.add_argument("--json", action="store_true", help="print JSON")
    tag = verb("tag", "give a version a name, such as best", verbs.tag, "REF")
    tag.add_argument("tag", metavar="TAG")
    tag.add_argument("--remove", action="store_true", help="remove the tag")


def _add_deleting(verb: AddVerb) -> None:
    delete = verb("delete", "delete one version", verbs.delete, "REF")
    delete.add_argument("--force", action="store_true", help="also if others were made from it")
    prune = verb("prune", "delete old versions that have no tag and no children", verbs.prune)
    prune.add_argument("name", metavar="STAGE/NAME", nargs="?", help="default: all names")
    keep = "newest versions of each name to keep; default: 1"
    prune.add_argument("--keep", type=_count, default=1, metavar="N", help=keep)
    prune.add_argument("--yes", action="store_true", help="delete; without it, list the versions only")


def _add_copying(verb: AddVerb) -> None:
    export = verb("export", "write a folder for transformers or peft", _later("rlhf.sharing.export:command"), "REF")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="new folder")
    export.add_argument("--form", choices=("merged", "adapter"), default="merged", help="default: merged")
    dtypes = ("float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of merged weights")
    push = verb("push", "copy an artefact and its ancestors to a folder, the hub or W&B", verbs.push, "REF")
    pull = verb("pull", "copy an artefact and its ancestors into the registry", verbs.pull, "REF")
    for command in (push, pull):
        command.add_argument("place", metavar="PLACE", help="a folder, hf:OWNER/NAME or wandb:ENTITY/PROJECT")
    entry = verb("import", "register a model that was trained elsewhere", _later("rlhf.sharing.import_model:command"))
    entry.add_argument("folder", metavar="FOLDER", help="transformers model, peft adapter, or one with a value head")
    entry.add_argument("--as", dest="target", required=True, metavar="STAGE/NAME", help="sft/NAME or reward/NAME")
    entry.add_argument("--policy", metavar="REF", help="for a reward model: the SFT policy that PPO starts from")
    entry.add_argument("--base", metavar="FOLDER", help="base model of an adapter; default: the one in its config")
    entry.add_argument("--chat_template", metavar="NAME", help="chatml, plain or a file; default: the tokenizer's own")
    again = _later("rlhf.sharing.reproduce:command")
    reproduce = verb("reproduce", "make an artefact again from its manifest and compare every byte", again, "REF")
    folder = Path("outputs/reproduced")
    reproduce.add_argument("--into", type=Path, default=folder, metavar="DIR", help="folder of the replay")
    reproduce.add_argument("--ancestors", action="store_true", help="also make everything that it was made from")


def _add_registry_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--registry", default=default, metavar="DIR", help="default: registry")


def _later(path: str) -> verbs.Verb:
    """Return a verb whose module is imported when it runs, because it needs torch."""

    def run(*arguments: Any) -> None:
        load_function(path)(*arguments)

    return run


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; `verify` raises `UserError` for a broken artefact, so that the exit code is 2."""
    arguments = build_parser().parse_args(argv)
    # In a file or pipe, lines are not cut to the width of a terminal.
    console = screen.console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False)
    arguments.run(Registry(arguments.registry), arguments, console)


if __name__ == "__main__":
    run_command(main)
