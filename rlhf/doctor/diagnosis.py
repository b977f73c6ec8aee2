"""Diagnosis of a run from its folder: causes first, symptoms below them.

A stage's folder holds its statements (`doctor.jsonl`), what it logged (`metrics.jsonl`, `samples.jsonl`, `comparison.jsonl`)
and its options (`checkpoints/made_of.json`). Nothing is measured here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object_or_none
from rlhf.base.reading import FolderReader
from rlhf.doctor import statements
from rlhf.doctor.finding import Finding, Kind, either, of_statement
from rlhf.doctor.health import ppo_outcome, ppo_reward
from rlhf.doctor.health.check import registered
from rlhf.doctor.health.findings import CHECKS, replay
from rlhf.doctor.health.history import SAMPLES_READ, ComparisonRow, History, SampleRow, Settings
from rlhf.doctor.statements import Statement
from rlhf.registry import Registry
from rlhf.run.metrics import LogRow

#: Stages that leave logs.
STAGES = ("pretrain", "sft", "reward", "ppo")
#: Findings that a model or reward of an earlier stage can cause, by kind: what is learned and answered, not how it is computed.
#: Those of the review are about the SFT model's answers; their names stand here, as their table needs torch.
INHERITED: Mapping[Kind, frozenset[str]] = {
    "audit": frozenset(),
    "investigation": frozenset(),
    "review": frozenset({"clipped", "judge_score", "length_score", "reward_constant", "reward_scale", "unfinished"}),
    "symptom": frozenset(check.name for module in (ppo_reward, ppo_outcome) for check in registered(module.__name__))
    - {"slowing_down"}
    | {"loss_flat", "accuracy_at_chance", "accuracy_below_chance"},
}
#: Causes that the summary names where none is confirmed.
LIKELY = 3


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The faults of a stage, and the statements about what was looked at."""

    stage: str
    updates: int
    checks: int
    """Checks of this stage."""
    findings: list[Finding]
    """Causes before symptoms; each is followed by those that it explains."""
    left_out: list[str]
    """A line for each file that could not be read as a whole."""
    statements: list[Statement] = field(default_factory=list)
    """The newest about each thing, notes and those that passed included."""
    origin: str = ""
    """Critical finding of an earlier stage, as `stage: name`, from which some of these may follow."""

    @property
    def roots(self) -> list[Finding]:
        """Findings that no other explains."""
        return [finding for finding in self.findings if not finding.explained_by]

    def cause(self, finding: Finding) -> str:
        """Return the cause of a finding as text, or what it is a consequence of."""
        if not finding.explained_by:
            return finding.cause
        own = any(f.name == finding.explained_by and f.kind != "symptom" for f in self.findings)
        return f"{'explained by' if own else 'may follow from'} {finding.explained_by}"

    @property
    def notes(self) -> list[Statement]:
        """Statements that are worth reading, and neither findings nor consequences of any."""
        explained = {name for finding in self.roots for name in finding.explains}
        return [s for s in self.statements if not s.passed and not s.is_finding and s.name not in explained]

    @property
    def summary(self) -> str:
        """Established and likely causes, in a sentence."""
        parts = [part for part in map(self._part, ("audit", "review", "investigation")) if part]
        inherited = [finding.name for finding in self.findings if self.origin and finding.explained_by == self.origin]
        follows = [f"{_listed(inherited)} may follow from {self.origin}, start there"] if inherited else []
        return "; ".join([*parts, *([] if follows and not self.roots else self._likely()), *follows])

    def _part(self, part: str) -> str:
        """Return what one part of the doctor established."""
        rows = [s for s in self.statements if s.part == part]
        failed = list(dict.fromkeys(s.name for s in rows if s.is_finding))
        confirmed = [s for s in rows if s.is_confirmed]
        things = {s.name for s in confirmed} - set(failed)
        if not failed and not things:
            return ""
        steps = [str(step) for step in sorted({s.step for s in confirmed})]
        at = f" at update{'s' if len(steps) > 1 else ''} {_listed(steps)}"
        wrong = _listed(failed)
        if part == "audit":
            others = f", {len(things)} quantities confirmed" if things else ""
            return (
                f"computation wrong in {wrong}{others}"
                if failed
                else f"computation confirmed ({len(things)} quantities{at})"
            )
        if part == "review":
            return f"inputs not sound: {wrong}" if failed else f"inputs sound ({len(things)} looked at)"
        return f"experiments confirm {wrong}" if failed else f"experiments confirm no fault ({len(things)} made)"

    def _likely(self) -> list[str]:
        """Return what the symptoms without a confirmed cause point at."""
        symptoms = [finding for finding in self.roots if finding.kind == "symptom"]
        confirmed = len(self.roots) > len(symptoms)
        if not symptoms:
            return [] if confirmed else ["no symptoms"]
        if confirmed:
            return [f"not explained by that: {_listed([f.name for f in symptoms])}"]
        if len(symptoms) == 1:
            causes = [f"{cause}" for cause in symptoms[0].causes[:LIKELY]] or [symptoms[0].shows]
            return [f"most likely {either(causes)} ({symptoms[0].evidence})"]
        return [f"most likely {either([f'{(*f.causes, f.shows)[0]} ({f.evidence})' for f in symptoms[:LIKELY]])}"]

    def as_json(self) -> dict[str, Any]:
        """Return all of it, and the summary, as plain data."""
        findings = [finding.as_json() for finding in self.findings]
        return {**dataclasses.asdict(self), "findings": findings, "summary": self.summary}


def diagnose(run: Path) -> list[Diagnosis]:
    """Return the diagnosis of each stage of a run.

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
    return _follow([_diagnose_stage(folder) for folder in logs])


def _follow(stages: Sequence[Diagnosis]) -> list[Diagnosis]:
    """Put what a stage may have inherited behind its own findings, below the first critical one of an earlier stage."""
    diagnoses, origin = list[Diagnosis](), ""
    for stage in stages:
        names = {f.name for f in stage.roots if origin and f.name in INHERITED[f.kind]}
        below = [f for f in stage.findings if {f.name, f.explained_by} & names]
        own = [f for f in stage.findings if f not in below]
        below = [dataclasses.replace(f, explained_by=f.explained_by or origin) for f in below]
        diagnoses.append(dataclasses.replace(stage, findings=[*own, *below], origin=origin if below else ""))
        critical = [f.name for f in diagnoses[-1].roots if f.severity == "critical"]
        origin = origin or (f"{stage.stage}: {critical[0]}" if critical else "")
    return diagnoses


def _diagnose_stage(folder: Path) -> Diagnosis:
    history, reader = read_history(folder), FolderReader(folder)
    rows = statements.newest(statements.read(reader))
    return Diagnosis(
        stage=history.stage,
        updates=len(history.steps),
        checks=sum(history.stage in check.stages for check in CHECKS),
        findings=sort_out(replay(history, passed=statements.passed(rows)), rows),
        statements=rows,
        left_out=history.left_out + [f"{history.stage}/{problem}" for problem in reader.problems],
    )


def sort_out(symptoms: Sequence[Finding], rows: Sequence[Statement] = ()) -> list[Finding]:
    """Return the findings in the order in which to read them: causes first, each followed by what it explains.

    Args:
        symptoms: causes before consequences.
        rows: the newest statements, oldest first.
    """
    findings = [*_failures(rows), *symptoms]
    names = {finding.name for finding in findings}
    ranks = {id(finding): _rank(finding, names) for finding in findings}
    waiting, ordered = sorted(findings, key=lambda finding: ranks[id(finding)]), list[Finding]()
    while waiting:
        root = waiting.pop(0)
        explained = _consequences(root, waiting)
        below = [finding for finding in waiting if finding.name in explained]
        waiting = [finding for finding in waiting if finding.name not in explained]
        ordered += [root, *(dataclasses.replace(finding, explained_by=root.name) for finding in below)]
    return ordered


def _consequences(root: Finding, others: Sequence[Finding]) -> set[str]:
    """Return the names of the other findings that follow from one, directly or by way of another."""
    names, queue = set[str](), [root]
    while queue:
        explains = queue.pop().explains
        queue += [finding for finding in others if finding.name in explains and finding.name not in names]
        names |= {finding.name for finding in others if finding.name in explains}
    return names


def _failures(rows: Sequence[Statement]) -> list[Finding]:
    """Return the failed statements, each once with its first and last update and its first evidence."""
    findings: dict[tuple[str, str], Finding] = {}
    for new in (of_statement(s) for s in sorted(rows, key=lambda s: s.step) if s.is_finding):
        key = new.kind, new.name
        findings[key] = dataclasses.replace(findings.get(key, new), last=new.last)
    return list(findings.values())


def _rank(finding: Finding, names: set[str]) -> int:
    """Return the place of a finding: confirmed faults first, and warnings that explain nothing behind critical symptoms."""
    if finding.kind == "audit":
        return 0
    critical = finding.severity == "critical"
    if finding.kind != "symptom":
        explains = bool(names & set(finding.explains))
        return (
            (1 if critical else 2 if explains else 4)
            if finding.kind == "review"
            else (2 if critical or explains else 4)
        )
    if not finding.causes:
        return 6  # all that may be behind it is excluded
    return 3 if critical else 5


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


def print_diagnoses(diagnoses: Sequence[Diagnosis], *, has_models: bool = True) -> None:
    """Print for each stage what is established, and a table of findings: check, updates, evidence, cause and remedy.

    Args:
        has_models: the models are there to experiment with.
    """
    from rich.markup import escape
    from rich.table import Table

    console = screen.console()
    for diagnosis in diagnoses:
        lines = [*diagnosis.left_out]
        if not diagnosis.findings:
            lines.append(
                f"{diagnosis.stage}: {diagnosis.checks} checks on {diagnosis.updates} logged updates, nothing found"
            )
        lines += [f"{diagnosis.stage}: {diagnosis.summary}"] if diagnosis.findings or diagnosis.statements else []
        lines += [f"{diagnosis.stage}, note: {note.name}: {note.measured}. {note.cause}" for note in diagnosis.notes]
        for line in lines:
            console.print(line, markup=False, highlight=False)
        if not diagnosis.findings:
            continue
        table = Table(
            title=f"{diagnosis.stage}, {diagnosis.updates} logged updates", title_justify="left", show_lines=True
        )
        for column in ("finding", "updates", "evidence", "cause", "to do"):
            table.add_column(column, overflow="fold")
        for f in diagnosis.findings:
            name, action = (f"  {f.name}", "") if f.explained_by else (f.label, f.action)
            table.add_row(*map(escape, (name, f.updates, f.evidence, diagnosis.cause(f), action)))
        console.print(table)
        console.print(
            f"{_start(diagnosis)}{_next_step(diagnosis) if has_models else ''}",
            markup=False,
            highlight=False,
        )


def _start(diagnosis: Diagnosis) -> str:
    """Return where to start: at the first finding, or in the stage from which it may follow."""
    stage, _, name = diagnosis.origin.partition(": ")
    begins = [f"It begins in {stage}: start with {name} there."] if stage else []
    return " ".join([*begins, *([f"Start with {diagnosis.roots[0].name}."] if diagnosis.roots and not begins else [])])


def _next_step(diagnosis: Diagnosis) -> str:
    """Return what would tell the causes apart that remain, where experiments can."""
    open_causes = sum(len(f.causes) for f in diagnosis.roots if f.kind == "symptom")
    tried = any(s.part == "investigation" for s in diagnosis.statements)
    if diagnosis.stage != "ppo" or open_causes < 2 or tried:
        return ""
    return " Several causes remain: `rlhf doctor investigate RUN` tries which it is."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def main(words: Sequence[str]) -> int:
    """Print the diagnosis of `RUN [--registry FOLDER] [--json]`; return the exit code, 0 if nothing was found, else 1."""
    parser = Parser(
        description="Find out what went wrong in a run: from its audit, its review, experiments and its logs.",
        epilog="Before a run: rlhf doctor preflight --config FILE",
    )
    parser.add_argument(
        "run", help="folder of a run or of one of its stages, or an artefact: ppo/NAME, ppo/NAME@VERSION"
    )
    parser.add_argument("--registry", default="registry", help="folder of the model registry, for artefacts")
    parser.add_argument("--json", action="store_true", help="print a JSON list, an object a stage, and no table")
    arguments = parser.parse_args(words)
    diagnoses = diagnose(find_run(arguments.run, arguments.registry))
    if arguments.json:
        print(json.dumps([diagnosis.as_json() for diagnosis in diagnoses], indent=1))
    else:
        print_diagnoses(diagnoses)
    return int(any(diagnosis.findings for diagnosis in diagnoses))
