"""`rlhf doctor FILE` on the log of another project's run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.base import screen
from rlhf.base.cli import Parser
from rlhf.doctor.diagnosis import Diagnosis, print_diagnoses, sort_out
from rlhf.doctor.foreign.checks import Examination, examine, learning_rates
from rlhf.doctor.foreign.reading import read_place


def main(words: Sequence[str]) -> int:
    """Print what a foreign log shows; return the exit code, 0 if nothing was found, else 1."""
    parser = Parser(description="Find out from another project's log what went wrong in a run.")
    parser.add_argument("run", help="a log file, or the folder of a run that holds one")
    parser.add_argument(
        "--stage", choices=("sft", "reward", "ppo"), help="what was trained, where the log's names leave it open"
    )
    arguments = parser.parse_args(words)
    examinations = [examine(run) for run in read_place(Path(arguments.run), arguments.stage)]
    for place, examination in enumerate(examinations, start=1):
        _print(examination, f", run {place} of {len(examinations)}" if len(examinations) > 1 else "")
    return int(any(examination.findings for examination in examinations))


def _print(examination: Examination, place: str) -> None:
    run = examination.run
    console = screen.console(soft_wrap=True)
    steps = run.history.steps
    span = f"steps {steps[0]} to {steps[-1]}" if steps else "no step"
    name = f" ({run.log.name})" if run.log.name else ""
    lines = [f"{run.kind.title}: {run.file}{name}{place}, {run.log.form}, {len(steps)} logged steps, {span}"]
    lines += run.log.notes
    lines.append(f"figures: {', '.join(sorted(run.names))}")
    rates = learning_rates(run)
    known = [f"{option} {value}" for option, value in run.settings.items()]
    known += [f"step size in the log {rates}"] if rates else []
    lines.append(f"settings: {', '.join(known) or 'none is known'}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
    print_diagnoses(
        [
            Diagnosis(
                stage=run.kind.stage,
                updates=len(steps),
                checks=len(examination.ran),
                findings=sort_out(examination.findings),
                left_out=[],
            )
        ],
        has_models=False,
    )
    console.print(f"checks that ran: {', '.join(check.name for check in examination.ran)}", highlight=False)
    if examination.left_out:
        console.print("not run:", highlight=False)
    by_reason: dict[str, list[str]] = {}
    for check, reason in examination.left_out.items():
        by_reason.setdefault(reason, []).append(check)
    for reason, checks in by_reason.items():
        console.print(f"  {', '.join(checks)}: {reason}", markup=False, highlight=False)
