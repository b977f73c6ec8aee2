"""Check artefacts: their files, their parents, and what they were made from outside the registry."""

from __future__ import annotations

import argparse

from rich.console import Console

from rlhf.base.errors import UserError, require
from rlhf.models import inputs
from rlhf.registry import Registry


def command(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Check one artefact or all, and print a line for each."""
    references = [registry.resolve(arguments.ref)] if arguments.ref else registry.references()
    broken = 0
    for reference in references:
        try:
            artifact = registry.get(reference)
            changed = inputs.problem(artifact, registry)
            require(not changed, f"{changed}; restore it, or make {artifact.stage}/{artifact.name} again")
            console.print(f"ok   {artifact.reference}", soft_wrap=True)
        except UserError as error:
            broken += 1
            console.print(f"BAD  {reference}: {error}", soft_wrap=True)
    if broken:
        raise UserError(
            f"{broken} of {len(references)} artefacts in registry {registry.root} cannot be used; see the lines above"
        )
    if not references:
        console.print(f"registry {registry.root} is empty")
