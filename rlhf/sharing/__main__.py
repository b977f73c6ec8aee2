"""`python -m rlhf.registry list | show REF | verify [REF] | delete REF [--force] [--registry DIR]`, and the verbs of `verbs`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, run_command
from rlhf.registry import Artifact, Lineage, Reference, Registry
from rlhf.sharing import verbs


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Look at, compare and move artefacts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    lister = commands.add_parser("list", help="all artefacts")
    show = commands.add_parser("show", help="manifest and lineage of one artefact")
    show.add_argument("reference", metavar="REF", help="e.g. sft/demo (the latest version) or sft/demo@2")
    verify = commands.add_parser("verify", help="check the files and parents of all artefacts, or of one")
    verify.add_argument("reference", metavar="REF", nargs="?", help="default: all")
    delete = commands.add_parser("delete", help="delete one version")
    delete.add_argument("reference", metavar="REF", help="e.g. sft/demo@2")
    delete.add_argument("--force", action="store_true", help="also one that others were made from")
    # Before or after the command; SUPPRESS keeps the second parser's default from undoing what the first one read.
    parser.add_argument("--registry", default="registry", metavar="DIR", help="default: registry")
    for command in (lister, show, verify, delete, *verbs.add_parsers(commands)):
        command.add_argument("--registry", default=argparse.SUPPRESS, metavar="DIR", help="default: registry")
    return parser.parse_args(argv)


def _print_list(registry: Registry, console: Console) -> None:
    table = Table("artefact", "created", "kind", "base model", "made from", "state")
    for reference in registry.references():
        line = registry.try_read(reference)
        if line.artifact is None:
            table.add_row(str(reference), "", "", "", "", f"BROKEN: {line.problem}")
            continue
        manifest = line.artifact.manifest
        parents = ", ".join(str(parent.reference) for parent in manifest.parents)
        table.add_row(str(reference), manifest.created, manifest.kind, manifest.base_model, parents, "")
    console.print(table if table.rows else f"registry {registry.root} is empty")


def _print_artifact(registry: Registry, artifact: Artifact, console: Console) -> None:
    table = Table("field", "value", title=artifact.reference, title_justify="left")
    table.add_row("path", str(artifact.path))
    table.add_row("hash", artifact.hash)
    for field, value in dataclasses.asdict(artifact.manifest).items():
        if field == "parents":
            continue  # they are in the tree
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{field}.{key}" if key else field, item if isinstance(item, str) else json.dumps(item))
    console.print(table)

    def grow(tree: Tree, parents: Iterable[Lineage]) -> Tree:
        for line in parents:
            note = line.artifact.hash[:12] if line.artifact else line.problem
            grow(tree.add(f"{line.reference}  {note}"), line.parents)
        return tree

    console.print(grow(Tree(f"{artifact.reference}  made from"), registry.lineage(artifact).parents))


def _verify_all(registry: Registry, references: Sequence[Reference], console: Console) -> None:
    bad = 0
    for reference in references:
        try:
            artifact = registry.get(reference)
            console.print(f"ok   {artifact.reference}", soft_wrap=True)
        except UserError as error:
            bad += 1
            console.print(f"BAD  {reference}: {error}", soft_wrap=True)
    if bad:
        raise UserError(
            f"{bad} of {len(references)} artefacts in registry {registry.root} cannot be used; see the lines above"
        )
    if not references:
        console.print(f"registry {registry.root} is empty")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. A broken artefact under `verify` is a `UserError`, so that the exit code is 2."""
    arguments = _parse(argv)
    registry = Registry(arguments.registry)
    # In a file or pipe nothing is cut to the width of a terminal.
    console = Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False)
    if arguments.command == "list":
        _print_list(registry, console)
    elif arguments.command == "show":
        _print_artifact(registry, registry.read(arguments.reference), console)
    elif arguments.command == "delete":
        registry.delete(arguments.reference, force=arguments.force)
        console.print(f"deleted {arguments.reference}")
    elif arguments.command != "verify":
        arguments.run(arguments, console)
    else:
        chosen = [registry.resolve(arguments.reference)] if arguments.reference else registry.references()
        _verify_all(registry, chosen, console)


if __name__ == "__main__":
    run_command(main)
