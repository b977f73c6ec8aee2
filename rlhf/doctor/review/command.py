"""`rlhf doctor options --config FILE [--option value ...]`: what is out of the ordinary in a stage's options and data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.errors import UserError, run_command
from rlhf.config import TrainingConfig, find_config
from rlhf.data_prep.load import Loaded, load_rows
from rlhf.data_prep.stage_rows import Kind
from rlhf.doctor.plan.command import base_model
from rlhf.doctor.preflight.command import parse
from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.inputs import review_inputs
from rlhf.doctor.statements import Statement

USAGE = "usage: rlhf doctor options --config FILE [--option value ...], FILE and options of a stage"
KINDS: dict[str, Kind] = {"sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}


def review(stage: str, config: Any, file: Path) -> tuple[Facts, list[Statement]]:
    """Return the facts and statements on a stage's options, and on its data where that is on this machine.

    Nothing is counted in tokens, as that would need the model.
    """
    return review_inputs(stage, config, _base_model(config, file), _data(stage, config), None)


def _data(stage: str, config: TrainingConfig) -> Mapping[str, Loaded]:
    if stage not in KINDS or not Path(config.dataset).expanduser().exists():
        return {}
    return {split: load_rows(config.dataset, split, kind=KINDS[stage]) for split in ("train", "validation")}


def _base_model(config: Any, file: Path) -> str:
    """Return the name of the base model; an empty text where nothing names it."""
    if hasattr(config, "hidden_size"):  # pretraining makes it
        return ""
    try:
        return base_model(config, file)[0]
    except UserError:
        return ""


def show(facts: Facts, statements: Sequence[Statement]) -> None:
    """Print what is out of the ordinary, worst first: the quantity, what it does to the run, what to do, and the source."""
    unusual = [statement for statement in statements if not statement.passed]
    console = screen.console()
    console.print(f"{facts.stage}: {len(statements)} quantities looked at, {len(unusual)} out of the ordinary")
    if facts.width is None:
        console.print("The base model's config cannot be read here, so step sizes are not looked at.")
    if not facts.rows:
        console.print("The data is not on this machine, so it is not looked at.")
    order = ("critical", "warning", "note")
    for s in sorted(unusual, key=lambda statement: order.index(statement.severity)):
        text = f"\n{s.severity} {s.name}: {s.measured}\n  effect: {s.cause}\n  to do: {s.action}\n  source: {s.source}"
        console.print(text, markup=False, highlight=False)


def main(words: Sequence[str]) -> int:
    """Print the review of a config; return the exit code, 1 where something is nearly certainly wrong, else 0."""
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    if "--config" not in words:
        raise UserError(USAGE)
    stage, config = parse(words)
    facts, statements = review(stage, config, find_config(words[words.index("--config") + 1]))
    show(facts, statements)
    return int(any(not s.passed and s.severity != "note" for s in statements))


if __name__ == "__main__":
    run_command(lambda: sys.exit(main(sys.argv[1:])))
