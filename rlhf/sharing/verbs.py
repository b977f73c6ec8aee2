"""The verbs of `python -m rlhf.registry` that compare, delete, move and make artefacts again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.registry import Registry

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

# Imported where they are used: `list` and `show` need neither torch nor a hub's client.


def add_parsers(commands: Any) -> list[argparse.ArgumentParser]:
    """Adds the verbs to the subparsers of `python -m rlhf.registry`; each sets `run`, which carries it out."""
    made: list[argparse.ArgumentParser] = []

    def verb(
        name: str, help: str, run: Callable[[argparse.Namespace, Console], None], *refs: str
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=help)
        for ref in refs:
            parser.add_argument(ref.lower(), metavar=ref, help="sft/demo, sft/demo@2 or sft/demo@TAG")
        parser.set_defaults(run=run)
        made.append(parser)
        return parser

    lineage = verb("lineage", "what an artefact was made from, down to the data, as a tree", _lineage, "REF")
    lineage.add_argument("--json", action="store_true", help="for other programs")
    difference = verb("diff", "differences of two artefacts in parents, data, options and figures", _diff, "A", "B")
    difference.add_argument("--json", action="store_true", help="for other programs")
    tag = verb("tag", "give a version a name, such as best", _tag, "REF")
    tag.add_argument("tag", metavar="TAG")
    tag.add_argument("--remove", action="store_true", help="take the tag away")
    prune = verb("prune", "delete old versions that have no tag and that nothing was made from", _prune)
    prune.add_argument("name", metavar="STAGE/NAME", nargs="?", help="default: all names")
    prune.add_argument(
        "--keep", type=_count, default=1, metavar="N", help="newest versions of each name that stay; default: 1"
    )
    prune.add_argument("--yes", action="store_true", help="delete; without it, only say what would go")
    export = verb("export", "a plain folder that transformers or peft opens without this package", _export, "REF")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="is made")
    export.add_argument("--form", choices=("merged", "adapter"), default="merged", help="default: merged")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of merged weights"
    )
    for name, help, run in (
        ("push", "copy an artefact and all it was made from to a folder, the hub or W&B", _push),
        ("pull", "copy an artefact and all it was made from into the registry", _pull),
    ):
        verb(name, help, run, "REF").add_argument(
            "place", metavar="PLACE", help="a folder, hf:OWNER/NAME or wandb:ENTITY/PROJECT"
        )
    reproduce = verb("reproduce", "make an artefact again from its manifest and compare every byte", _reproduce, "REF")
    reproduce.add_argument(
        "--into", type=Path, default=Path("outputs/reproduced"), metavar="DIR", help="for the replay"
    )
    reproduce.add_argument("--ancestors", action="store_true", help="everything that it was made from, too")
    return made


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text}")
    return int(text)


def _lineage(arguments: argparse.Namespace, console: Console) -> None:
    from rich.tree import Tree

    from rlhf.registry.lineage import as_tree, children

    registry = Registry(arguments.registry)
    artifact = registry.read(arguments.ref)
    tree = as_tree(registry.lineage(artifact))
    if arguments.json:
        print(json.dumps(tree, indent=2))
        return
    root = Tree(_title(tree))
    _grow(root, tree)
    console.print(root)
    made = [child.reference for child in children(registry, artifact)]
    console.print(f"made from it: {', '.join(made) or 'nothing yet'}", soft_wrap=True)


def _grow(branch: Tree, line: dict[str, Any]) -> None:
    """Below an artefact: its data and base model, then its parents with theirs."""
    for text in line.get("data", []):
        branch.add(text)
    for parent in line.get("made_from", []):
        _grow(branch.add(_title(parent)), parent)


def _title(line: dict[str, Any]) -> str:
    return f"{line['reference']}  " + (line.get("problem") or f"{line['hash'][:12]}  {line['created']}")


def _diff(arguments: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    from rlhf.registry.lineage import difference

    registry = Registry(arguments.registry)
    first, second = registry.read(arguments.a), registry.read(arguments.b)
    found = difference(first, second)
    if arguments.json:
        print(json.dumps([one._asdict() for one in found], indent=2))
        return
    if not found:
        console.print(f"{first.reference} and {second.reference} do not differ")
        return
    table = Table("", "what", first.reference, second.reference, "change")
    section = ""
    for one in found:
        table.add_row(
            one.section if one.section != section else "", one.name, _text(one.first), _text(one.second), _change(one)
        )
        section = one.section
    console.print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _change(one: Any) -> str:
    """Of two figures; the difference of two options says nothing."""
    numbers = [v for v in (one.first, one.second) if isinstance(v, int | float) and not isinstance(v, bool)]
    return f"{numbers[1] - numbers[0]:+.4g}" if one.section == "metrics" and len(numbers) == 2 else ""


def _tag(arguments: argparse.Namespace, console: Console) -> None:
    registry = Registry(arguments.registry)
    artifact = registry.read(arguments.ref)
    registry.tag(artifact, arguments.tag, remove=arguments.remove)
    console.print(f"{artifact.reference} {'no longer has' if arguments.remove else 'has'} the tag {arguments.tag}")


def _prune(arguments: argparse.Namespace, console: Console) -> None:
    from rlhf.registry.lineage import prunable, size

    registry = Registry(arguments.registry)
    names = sorted({f"{reference.stage}/{reference.name}" for reference in registry.references()})
    if arguments.name is not None and arguments.name not in names:
        near = did_you_mean(arguments.name, names)
        raise UserError(f"no artefact '{arguments.name}' in registry {registry.root}{near}; give STAGE/NAME")
    doomed = prunable(registry, [arguments.name] if arguments.name else names, arguments.keep)
    total = 0
    for artifact in doomed:
        bytes_there = size(artifact.path)
        total += bytes_there
        if arguments.yes:
            registry.delete(artifact.reference)
        console.print(
            f"{'deleted' if arguments.yes else 'would delete'} {artifact.reference}  {bytes_there / 1e6:.1f} MB"
        )
    hint = "" if arguments.yes or not doomed else "; --yes deletes them"
    console.print(f"{len(doomed)} versions, {total / 1e6:.1f} MB{hint}")


def _export(arguments: argparse.Namespace, console: Console) -> None:
    from rlhf.sharing.export import export

    registry = Registry(arguments.registry)
    artifact = registry.get(arguments.ref)
    folder = export(registry, artifact, arguments.folder, arguments.form, arguments.dtype)
    console.print(f"{artifact.reference} is in {folder}", soft_wrap=True)


def _push(arguments: argparse.Namespace, console: Console) -> None:
    from rlhf.sharing.hub import open_place, push

    registry = Registry(arguments.registry)
    pushed = push(registry, registry.get(arguments.ref), open_place(arguments.place))
    console.print(f"pushed {', '.join(pushed) or 'nothing: all of it is there'}", soft_wrap=True)


def _pull(arguments: argparse.Namespace, console: Console) -> None:
    from rlhf.sharing.hub import open_place, pull

    pulled = pull(Registry(arguments.registry), arguments.ref, open_place(arguments.place))
    console.print(f"pulled {', '.join(pulled) or 'nothing: all of it is here'}", soft_wrap=True)


def _reproduce(arguments: argparse.Namespace, console: Console) -> None:
    from rlhf.sharing.reproduce import reproduce

    registry = Registry(arguments.registry)
    artifact = registry.get(arguments.ref)
    outcomes = reproduce(registry, artifact, arguments.into, whole_chain=arguments.ancestors)
    for one in outcomes:
        console.print(f"{'DIFFERS' if one.different else 'same'}  {one.reference}", soft_wrap=True)
        for line in (*one.different, *one.software):
            console.print(f"    {line}", soft_wrap=True)
    if any(one.different for one in outcomes):
        raise UserError(
            "what was made is not the same to the last byte; see the lines above (another machine or library?)"
        )
