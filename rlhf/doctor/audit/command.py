"""`rlhf doctor audit RUN`: the sheets in a run's folder are recomputed; exit code 0: all agrees, 1: something differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, did_you_mean
from rlhf.doctor.audit import ppo, training
from rlhf.doctor.audit.sheet import FOLDER, Sheet, list_sheets, read_sheet
from rlhf.doctor.statements import Statement

#: What recomputes the sheets of a stage.
EXAMINERS: Mapping[str, Callable[[Sheet], list[Statement]]] = {
    **dict.fromkeys(("pretrain", "sft", "reward"), training.examine),
    "ppo": ppo.examine,
}


def find_sheets(run: Path) -> list[tuple[str, Path]]:
    """Return the sheets of a run or of one of its stages, as (stage, folder).

    Raises:
        UserError: there are none.
    """
    stages = {stage: run / stage for stage in EXAMINERS if list_sheets(run / stage)}
    if list_sheets(run):
        stages = {run.absolute().name: run}
    sheets = [(stage, path) for stage, folder in stages.items() for path in list_sheets(folder)]
    if not sheets:
        near = (
            did_you_mean(str(run), map(str, run.parent.glob("*"))) if run.parent.is_dir() and not run.is_dir() else ""
        )
        raise UserError(
            f"no sheet of an audit in {run}{near}: stages write them to {FOLDER}/ with audit_steps above 0, in one process; "
            "give the output_dir of a run"
        )
    return sheets


def require_sources(sheet: Sheet, folder: Path) -> None:
    """Raise `UserError` if an artefact that a sheet needs is gone."""
    sources: dict[str, Any] = sheet.facts["sources"]
    places = [sources["policy"], *(reward["path"] for reward in sources.get("rewards", {}).values())]
    missing = [place for place in places if place and not Path(place).is_dir()]
    if missing:
        raise UserError(f"{folder} was made with {missing[0]}, which is gone: restore it, or make the run again")


def line(statement: Statement) -> str:
    """Return a statement as a line."""
    if statement.passed:
        mark = "--    " if statement.measured.startswith("not examined") else "ok    "
        return f"{mark}{statement.name}: {statement.measured}"
    remedy = f" To do: {statement.action}." if statement.severity != "note" else ""
    mark = "note " if statement.severity == "note" else "WRONG"
    return f"{mark} {statement.name}: {statement.measured}. Cause: {statement.cause}.{remedy}"


def main(words: Sequence[str]) -> int:
    """Print a line for each quantity of each sheet; return the exit code."""
    parser = Parser(
        prog="rlhf doctor audit", description="Recompute the sheets of a run, and compare with what the run computed."
    )
    parser.add_argument("run", help="folder of a run or of one of its stages")
    run = Path(parser.parse_args(words).run)
    wrong = False
    for stage, folder in find_sheets(run):
        sheet = read_sheet(folder)
        require_sources(sheet, folder)
        if stage not in EXAMINERS:
            raise UserError(f"{folder} is of no stage that has an audit: {', '.join(EXAMINERS)}")
        print(f"{stage}, update {sheet.update}", flush=True)
        statements = EXAMINERS[stage](sheet)
        for statement in statements:
            print(f"  {line(statement)}", flush=True)
        wrong = wrong or not all(statement.passed for statement in statements)
    return int(wrong)
