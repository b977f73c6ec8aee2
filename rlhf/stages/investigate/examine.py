"""Choosing experiments by the findings of a run, running them within a time limit, and reporting."""

from __future__ import annotations

import dataclasses
import textwrap
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object_or_none
from rlhf.doctor.diagnosis import diagnose, find_run, sort_out
from rlhf.doctor.statements import Statement, append
from rlhf.run.tracker import RUN_FILE
from rlhf.stages.investigate import policies, rewards, supervised, updates
from rlhf.stages.investigate.experiment import EXPERIMENTS, Experiment, next_one
from rlhf.stages.investigate.subject import PPOSubject

#: What opens a run for experiments, by stage, in the order in which the stages of a run are examined.
SUBJECTS: dict[str, Any] = {"ppo": PPOSubject, "reward": supervised.RewardSubject, "sft": supervised.SFTSubject}
#: Modules that register experiments.
MODULES = (updates, rewards, policies, supervised)


def examine(arguments: Namespace) -> list[Statement]:
    """Run the experiments that a command line asks for; print, append and return what came out."""
    names = [one.name for one in EXPERIMENTS]
    if unknown := [name for name in arguments.only if name not in names]:
        raise UserError(f"no experiment '{unknown[0]}'{did_you_mean(unknown[0], names)}; there are {', '.join(names)}")
    run, end = find_run(arguments.run, arguments.registry or "registry"), time.monotonic() + 60 * arguments.minutes
    folders = sorted((f for f in (run, *(run / stage for stage in SUBJECTS)) if stage_of(f)), key=_place)
    if not folders:
        raise UserError(f"no run of {', '.join(SUBJECTS)} in {run}; give the output_dir of a run")
    statements: list[Statement] = []
    for folder in folders:
        try:
            statements += investigate(folder, arguments.registry, end, arguments.only)
        except UserError as error:
            if len(folders) == 1:
                raise
            _say(f"{stage_of(folder)}: not examined: {error}")
    return statements


def stage_of(folder: Path) -> str:
    """Return the stage whose run is in a folder; an empty text for none that can be examined."""
    stage = str((read_object_or_none(folder / RUN_FILE) or {}).get("stage", ""))
    return stage if stage in SUBJECTS else ""


def _place(folder: Path) -> int:
    return list(SUBJECTS).index(stage_of(folder))


def investigate(folder: Path, registry: str | None, end: float, only: Sequence[str]) -> list[Statement]:
    """Run the experiments of a stage's run until `end` (monotonic seconds); print, append and return their statements."""
    stage = stage_of(folder)
    chosen = [one for one in EXPERIMENTS if one.stage == stage and (not only or one.name in only)]
    if not chosen:
        return []
    findings = _findings(folder)
    _say(f"{stage}: symptoms are {', '.join(sorted(findings)) or 'none'}")
    subject = SUBJECTS[stage](folder, registry)
    _say(f"{stage}: experiments with {subject}")
    statements: list[Statement] = []
    left, done, started = list(chosen), 0.0, time.monotonic()
    while left:
        experiment = next_one(left, findings, subject)
        cost, now = experiment.cost(subject), time.monotonic()
        if now + cost * (now - started) / (done or 1.0) > end:
            break
        left.remove(experiment)
        statements += _run(experiment, subject)
        done += cost
    append(folder, statements)
    if left:
        names = ", ".join(one.name for one in left)
        _say(f"left out for want of time (--minutes): {names}")
    _say(_verdict(stage, statements))
    return statements


def _findings(folder: Path) -> set[str]:
    """Return the names of the symptoms of a stage, and of what audit and review found."""
    try:
        findings = [finding for diagnosis in diagnose(folder) for finding in diagnosis.findings]
    except UserError:  # it ended before its first update
        return set()
    return {finding.name for finding in findings if finding.kind != "investigation"}


def _run(experiment: Experiment, subject: Any) -> list[Statement]:
    """Run one experiment and print what came out."""
    started = time.monotonic()
    try:
        statements = [dataclasses.replace(one, step=subject.updates) for one in experiment.run(subject)]
        problem = ""
    except (UserError, RuntimeError, ValueError) as error:
        statements, problem = [], str(error).splitlines()[0]
    _say(f"{experiment.name} ({time.monotonic() - started:.0f} s): {experiment.question}")
    if problem or not statements:
        _say(f"could not run: {problem}" if problem else "nothing to examine", 2)
    for one in statements:
        word = "ruled out" if one.is_confirmed else "open" if one.passed else f"confirmed, {one.severity}"
        _say(f"{word}: {one.name}: {one.measured}", 2)
        if one.action:
            _say(f"cause: {one.cause}", 4)
            _say(f"to do: {one.action}", 4)
    return statements


def _say(text: str, indent: int = 0) -> None:
    console = screen.console()
    margin = " " * indent
    lines = textwrap.wrap(text, console.width, initial_indent=margin, subsequent_indent=f"{margin}  ")
    console.print("\n".join(lines), markup=False, highlight=False)


def _verdict(stage: str, statements: Sequence[Statement]) -> str:
    if causes := [finding for finding in sort_out([], statements) if not finding.explained_by]:
        return f"{stage}: {'; or '.join(f'{one.cause} ({one.name})' for one in causes)}"
    excluded, passed = sum(one.is_confirmed for one in statements), sum(one.passed for one in statements)
    return f"{stage}: no cause was confirmed; {excluded} were ruled out, {passed - excluded} stay open"
