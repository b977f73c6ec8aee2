"""Diagnosis of a run from its folder.

A run's folder holds what its stages left: `metrics.jsonl`, `samples.jsonl`, `comparison.jsonl` (PPO) and the options in
`checkpoints/made_of.json`. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.base import screen
from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object_or_none
from rlhf.base.reading import FolderReader
from rlhf.doctor.health.findings import CHECKS, Finding, replay
from rlhf.doctor.health.history import SAMPLES_READ, ComparisonRow, History, SampleRow, Settings
from rlhf.registry import Registry
from rlhf.run.metrics import LogRow

#: Stages that leave logs.
STAGES = ("pretrain", "sft", "reward", "ppo")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Findings in one stage's log."""

    stage: str
    updates: int
    checks: int
    """Checks of this stage."""
    findings: list[Finding]
    """Causes before symptoms."""
    left_out: list[str]
    """A line for each file that could not be read as a whole."""


def diagnose(run: Path) -> list[Diagnosis]:
    """Return the findings in the log of each stage of a run.

    Args:
        run: the folder of a stage, or one that holds the folders `sft`, `reward` and `ppo`, or some of them.

    Raises:
        UserError: there is no log in it.
    """
    folders = [run] if (run / "metrics.jsonl").is_file() else [run / stage for stage in STAGES]
    logs = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    if not logs:
        near = did_you_mean(str(run), map(str, run.parent.glob("*"))) if run.parent.is_dir() else ""
        raise UserError(
            f"no metrics.jsonl in {run}, nor in {', '.join(STAGES)} below it{near}; give the output_dir of a run"
        )
    return [
        Diagnosis(
            stage=history.stage,
            updates=len(history.steps),
            checks=sum(history.stage in check.stages for check in CHECKS),
            findings=replay(history),
            left_out=history.left_out,
        )
        for history in map(read_history, logs)
    ]


def read_history(folder: Path) -> History:
    """Return the log of a stage's folder as far as it can be read; the names of its figures decide the stage.

    Raises:
        UserError: the log holds no figures.
    """
    reader = FolderReader(folder)
    rows = reader.read_rows("metrics.jsonl", LogRow)
    kinds = {name.partition("/")[0] for row in rows for name in row}
    stage = next((stage for stage in STAGES if stage in kinds), None)
    if stage is None:
        raise UserError(
            f"{folder / 'metrics.jsonl'} holds no figures of a stage; it may have ended before its first update"
        )
    history = History(
        stage,
        rows,
        settings=reader.read_object("checkpoints/made_of.json", Settings),
        samples=reader.read_rows("samples.jsonl", SampleRow, expected=False)[:SAMPLES_READ],
        comparison=reader.read_rows("comparison.jsonl", ComparisonRow, expected=False),
    )
    history.left_out = [f"{stage}/{problem}" for problem in reader.problems]
    return history


def find_run(run: str, registry: str) -> Path:
    """Return the folder of a run: a path, or an artefact's run.

    Raises:
        UserError: there is no such artefact, or another run has used that folder since.
    """
    if Path(run).is_dir() or run.partition("/")[0] not in STAGES:
        return Path(run)
    artifact = Registry(registry).read(run)
    folder = Path(str(artifact.option("output_dir"))) / artifact.manifest.stage
    record = read_object_or_none(folder / "tracking.json")
    if record is None:
        raise UserError(f"{artifact.reference} was made in {folder}, which holds no log any more")
    if record.get("run_id") != artifact.manifest.wandb_run_id:
        raise UserError(f"{artifact.reference} was made in {folder}, but another run has logged there since")
    return folder


def print_diagnoses(diagnoses: Sequence[Diagnosis]) -> None:
    """Print a table of each stage's findings: check, updates, evidence, cause and remedy."""
    from rich.markup import escape
    from rich.table import Table

    console = screen.console()
    for diagnosis in diagnoses:
        for line in diagnosis.left_out:
            console.print(line, markup=False, highlight=False)
        if not diagnosis.findings:
            console.print(
                f"{diagnosis.stage}: {diagnosis.checks} checks on {diagnosis.updates} logged updates, nothing found"
            )
            continue
        table = Table(
            title=f"{diagnosis.stage}, {diagnosis.updates} logged updates", title_justify="left", show_lines=True
        )
        for column in ("finding", "updates", "evidence", "cause", "to do"):
            table.add_column(column, overflow="fold")
        for finding in diagnosis.findings:
            check = finding.check
            cells = (f"{check.name} ({check.severity})", finding.updates, finding.evidence, check.cause, check.action)
            table.add_row(*map(escape, cells))
        console.print(table)
        console.print(f"Start with {diagnosis.findings[0].check.name}: the others may be its consequences.")


def main(words: Sequence[str]) -> int:
    """Print the diagnosis of `RUN [--registry FOLDER]`; return the exit code, 0 if nothing was found, else 1."""
    parser = Parser(
        description="Find out from its logs what went wrong in a run.",
        epilog="Before a run: rlhf doctor preflight --config FILE",
    )
    parser.add_argument(
        "run", help="folder of a run or of one of its stages, or an artefact: ppo/NAME, ppo/NAME@VERSION"
    )
    parser.add_argument("--registry", default="registry", help="folder of the model registry, for artefacts")
    arguments = parser.parse_args(words)
    diagnoses = diagnose(find_run(arguments.run, arguments.registry))
    print_diagnoses(diagnoses)
    return int(any(diagnosis.findings for diagnosis in diagnoses))
