"""The verbs of `rlhf registry`; each prints to the console, and raises `UserError` if it fails."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.tree import Tree

from rlhf.base.errors import UserError, did_you_mean
from rlhf.registry import Registry
from rlhf.registry.lineage import Difference, as_tree, children, difference, prunable, size
from rlhf.registry.outcome import deciding_figure
from rlhf.sharing.hub import open_place
from rlhf.sharing.hub import pull as pull_from
from rlhf.sharing.hub import push as push_to

#: (registry, arguments, console)
Verb = Callable[[Registry, argparse.Namespace, Console], None]


def print_list(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Print a table of all versions, broken ones included."""
    columns = ("made from", "base model", "created")
    folded = [Column(name, overflow="fold", min_width=10) for name in columns]
    table = Table(
        Column("artefact", no_wrap=True), Column("figures", min_width=24), *folded, show_edge=False, pad_edge=False
    )
    for reference in registry.references():
        line = registry.try_read(reference)
        if line.artifact is None:
            table.add_row(str(reference), f"BROKEN: {line.problem}")
            continue
        manifest = line.artifact.manifest
        parents = ", ".join(str(parent.reference) for parent in manifest.parents)
        figure = deciding_figure(manifest.stage, manifest.metrics)
        table.add_row(str(reference), figure, parents, manifest.base_model, manifest.created[:16].replace("T", " "))
    console.print(table if table.rows else f"registry {registry.root} is empty")


def show(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Print an artefact's manifest and lineage."""
    artifact = registry.read(arguments.ref)
    table = Table("field", "value", title=artifact.reference, title_justify="left")
    table.add_row("path", str(artifact.path))
    table.add_row("hash", artifact.hash)
    for field, value in dataclasses.asdict(artifact.manifest).items():
        if field == "parents":
            continue  # they are in the tree
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{field}.{key}" if key else field, item if isinstance(item, str) else json.dumps(item))
    console.print(table)
    console.print(_rich_tree(as_tree(registry.lineage(artifact))))


def delete(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Delete one version."""
    registry.delete(arguments.ref, force=arguments.force)
    console.print(f"deleted {arguments.ref}")


def lineage(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Print everything that an artefact was made from, and its children."""
    artifact = registry.read(arguments.ref)
    tree = as_tree(registry.lineage(artifact))
    if arguments.json:
        print(json.dumps(tree, indent=2))
        return
    console.print(_rich_tree(tree))
    references = [child.reference for child in children(registry, artifact)]
    console.print(f"made from it: {', '.join(references) or 'nothing yet'}", soft_wrap=True)


def _rich_tree(line: dict[str, Any]) -> Tree:
    """Return an artefact with its data, base model and parents below it."""
    tree = Tree(f"{line['reference']}  " + (line.get("problem") or f"{line['hash'][:12]}  {line['created']}"))
    for text in line.get("data", []):
        tree.add(text)
    for parent in line.get("made_from", []):
        tree.add(_rich_tree(parent))
    return tree


def diff(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Print how two artefacts differ."""
    first, second = registry.read(arguments.a), registry.read(arguments.b)
    differences = difference(first, second)
    if arguments.json:
        print(json.dumps([one._asdict() for one in differences], indent=2))
        return
    if not differences:
        console.print(f"{first.reference} and {second.reference} do not differ")
        return
    table = Table("", "what", first.reference, second.reference, "change")
    section = ""
    for one in differences:
        title = one.section if one.section != section else ""
        table.add_row(title, one.name, _text(one.first), _text(one.second), _change(one))
        section = one.section
    console.print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _change(one: Difference) -> str:
    """Return the change of a metric; other differences have none."""
    numbers = [v for v in (one.first, one.second) if isinstance(v, int | float) and not isinstance(v, bool)]
    return f"{numbers[1] - numbers[0]:+.4g}" if one.section == "metrics" and len(numbers) == 2 else ""


def tag(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Add a tag to a version, or remove it."""
    artifact = registry.read(arguments.ref)
    registry.tag(artifact, arguments.tag, remove=arguments.remove)
    console.print(f"{artifact.reference} {'no longer has' if arguments.remove else 'has'} the tag {arguments.tag}")


def prune(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Delete old versions without tags and children, or only list them."""
    names = sorted({f"{reference.stage}/{reference.name}" for reference in registry.references()})
    if arguments.name is not None and arguments.name not in names:
        near = did_you_mean(arguments.name, names)
        raise UserError(f"no artefact '{arguments.name}' in registry {registry.root}{near}; give STAGE/NAME")
    if arguments.yes:
        registry.clean()
    doomed = prunable(registry, [arguments.name] if arguments.name else names, arguments.keep)
    verb, total = "deleted" if arguments.yes else "would delete", 0.0
    for artifact in doomed:
        megabytes = size(artifact.path) / 1e6
        total += megabytes
        if arguments.yes:
            registry.delete(artifact.reference)
        console.print(f"{verb} {artifact.reference}  {megabytes:.1f} MB")
    hint = "" if arguments.yes or not doomed else "; --yes deletes them"
    console.print(f"{len(doomed)} versions, {total:.1f} MB{hint}")


def push(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Copy an artefact and its ancestors to another place."""
    references = push_to(registry, registry.get(arguments.ref), open_place(arguments.place))
    console.print(f"pushed {', '.join(references) or 'nothing: all versions exist there'}", soft_wrap=True)


def pull(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Copy an artefact and its ancestors from another place."""
    references = pull_from(registry, arguments.ref, open_place(arguments.place))
    console.print(f"pulled {', '.join(references) or 'nothing: all versions exist here'}", soft_wrap=True)
