"""The end of a stage on the terminal: what it reached, and the commands that come next."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.base import screen
from rlhf.base.errors import UserError
from rlhf.config import TrainingConfig
from rlhf.config.shipped import find_config
from rlhf.registry import Artifact
from rlhf.registry.outcome import outcome

#: Options of the command line that the next command takes over.
CARRIED = ("name", "dataset", "output_dir", "registry", "device")


def print_outcome(artifact: Artifact) -> None:
    """Print the figures of an artefact, before and after training."""
    from rich.table import Column, Table

    figures = outcome(artifact.stage, artifact.manifest.metrics)
    table = Table(Column(artifact.reference), show_edge=False, pad_edge=False, title_justify="left")
    if any(figure.before for figure in figures):
        table.add_column("before", justify="right")
    table.add_column("after" if len(table.columns) > 1 else "", justify="right")
    for label, before, after in figures:
        table.add_row(label, *([before] if len(table.columns) > 2 else []), after)
    if figures:
        screen.console(highlight=False, markup=False).print(table)


def print_next(artifact: Artifact | None, config: TrainingConfig, argv: Sequence[str] | None = None) -> None:
    """Print the commands that come after a stage; nothing without an artefact, and in other processes than the first."""
    if artifact is None or os.environ.get("RANK", "0") != "0":
        return
    print("next:")
    for command in next_commands(artifact, config, sys.argv[1:] if argv is None else argv):
        print(f"  {shlex.join(command)}")


def next_commands(artifact: Artifact, config: TrainingConfig, argv: Sequence[str]) -> list[list[str]]:
    """Return the commands that come after a stage, with the names of its run and the options of its command line `argv`."""
    given = dict(_carried(argv))
    place = ["--registry", config.registry] if config.registry != type(config).registry else []
    policy = next((f"{p.stage}/{p.name}@{p.version}" for p in artifact.manifest.parents if p.stage == "sft"), "")
    if artifact.stage == "pretrain":
        given.pop("dataset", None)  # plain text
        return [_stage("sft", argv, given, "--model_name_or_path", artifact.reference)]
    if artifact.stage == "sft":
        return [_stage("reward", argv, given, "--policy", artifact.reference)]
    if artifact.stage == "reward":
        card = ["rlhf", "card", "--model", artifact.reference, "--dataset", config.dataset, *place]
        return [_stage("ppo", argv, given, "--policy", policy, "--reward", artifact.reference), card]
    return [
        ["rlhf", "chat", "--compare", policy, artifact.reference, *place],
        ["rlhf", "evaluate", "--models", policy, artifact.reference, "--dataset", config.dataset, *place],
        ["rlhf", "report", config.output_dir],
    ]


def _stage(stage: str, argv: Sequence[str], given: dict[str, str], *inputs: str) -> list[str]:
    """Return the command of a stage, with its file beside the one of this command line, if there is one."""
    files = [Path(argv[at + 1]).with_name(f"{stage}.yaml") for at, word in enumerate(argv[:-1]) if word == "--config"]
    beside: list[str] = []
    for file in files:
        with contextlib.suppress(UserError):  # there is none
            find_config(file)
            beside += ["--config", str(file)]
    return ["rlhf", stage, *beside, *(word for name, value in given.items() for word in (f"--{name}", value)), *inputs]


def _carried(argv: Sequence[str]) -> list[tuple[str, str]]:
    words = [word.removeprefix("--").partition("=") if word.startswith("--") else ("", "", "") for word in argv]
    values = zip(words, [*argv, ""][1:], strict=True)
    return [
        (name.replace("-", "_"), value if equals else following)
        for (name, equals, value), following in values
        if name.replace("-", "_") in CARRIED
    ]
