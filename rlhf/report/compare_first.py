"""The first screen of the page that compares runs: which one is ahead, by how much, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.base import intervals
from rlhf.base.json_files import finite_number
from rlhf.doctor.diagnosis import Diagnosis
from rlhf.report.figures import number, percent
from rlhf.report.first_screen import (
    Tile,
    Verdict,
    base_model,
    lead_stage,
    listed,
    sentence,
    shortened,
    task,
    tiles,
    verdict,
)
from rlhf.report.run_folder import TITLES, RunFolder, judge_of

COLUMNS = 4
"""Figures of a run on the first screen."""


class Deciding(NamedTuple):
    """The figure by which runs are ranked."""

    name: str
    label: str
    better: int
    share: bool

    def text(self, value: float) -> str:
        """Return a value as text."""
        return percent(value) if self.share else number(value)


def first_table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the main figures of the runs: `heads`, and `rows` of one `Tile` or None for each head; {} without any."""
    own = [{tile.label: tile for tile in tiles(run)} for run in runs]
    heads = list(dict.fromkeys(label for figures in own for label in figures))[:COLUMNS]
    rows: list[list[Tile | None]] = [[figures.get(label) for label in heads] for figures in own]
    return {"heads": heads, "rows": rows} if heads else {}


def common_task(runs: Sequence[RunFolder]) -> str:
    """Return what the runs train for, if it is one thing."""
    tasks = {task(run) for run in runs}
    return tasks.pop() if len(tasks) == 1 else ""


def common_base(runs: Sequence[RunFolder]) -> str:
    """Return the base model of all runs, or nothing where they differ."""
    names = {base_model(run) for run in runs}
    return names.pop() if len(names) == 1 else ""


def compared_verdict(
    runs: Sequence[RunFolder],
    findings: Mapping[str, Sequence[Diagnosis]],
    marks: Sequence[str],
    incomparable: bool,
    recommended: Sequence[str] = (),
) -> Verdict:
    """Return which run is ahead by the last stage's deciding figure, and what speaks against believing it.

    Args:
        findings: the doctor's, by the run's label.
        marks: reasons to distrust the figures.
        incomparable: the runs were measured by different reward models or on different prompts.
        recommended: checkpoints that evaluations recommend, a sentence each.
    """
    if len(runs) == 1:
        outcome = verdict(runs[0], findings.get(runs[0].label, []))
        outcome.doubts = list(dict.fromkeys([*(sentence(mark) for mark in marks), *outcome.doubts]))
        return outcome
    outcome = Verdict("These runs cannot be ranked", "open") if incomparable else _ranking(runs)
    if not runs:
        outcome = Verdict("An evaluation without a run", "open", "Good")
    outcome.better += recommended
    outcome.doubts += [sentence(mark) for mark in marks]
    for label, diagnoses in findings.items():
        names = [f.name.replace("_", " ") for diagnosis in diagnoses for f in diagnosis.roots]
        if names:
            outcome.doubts.append(f"The doctor on {label}: {shortened(names)}.")
    if runs:
        outcome.doubts.append("Each run has one seed: another one can turn the order round.")
    return outcome


def _deciding(runs: Sequence[RunFolder]) -> Deciding | None:
    """Return the deciding figure of the stage at which all runs ended; None where they ended at different ones."""
    stages = {lead_stage(run) for run in runs}
    stage = stages.pop() if len(stages) == 1 else ""
    choices = {
        "ppo": [Deciding("gold_positive_after", f"positive answers, by {judge_of(runs[0])}", 1, True),
                Deciding("score_after", "reward model's score", 1, False)],
        "reward": [Deciding("accuracy", "held-out accuracy", 1, True)],
        "sft": [Deciding("eval_loss_after", "held-out loss", -1, False)],
        "pretrain": [Deciding("eval_bits_per_character", "held-out bits per character", -1, False)],
    }.get(stage, [])  # fmt: skip
    known = [c for c in choices if all(finite_number(run.figures(stage).get(c.name)) is not None for run in runs)]
    return next(iter(known), None)


def _ranking(runs: Sequence[RunFolder]) -> Verdict:
    choice = _deciding(runs) if runs else None
    if choice is None:
        ends = sorted({TITLES[stage] for run in runs if (stage := lead_stage(run))})
        return Verdict(
            f"No common figure ranks these runs{f'; they end at {listed(ends)}' if len(ends) > 1 else ''}", "open"
        )
    stage = lead_stage(runs[0])
    values = [(float(run.figures(stage)[choice.name]), run) for run in runs]
    ordered = sorted(values, key=lambda pair: -choice.better * pair[0])
    (top, best), (next_value, second) = ordered[:2]
    if top == next_value:
        return Verdict(f"No run is ahead: the best two have {choice.label} {choice.text(top)}", "open")
    lead = f"{choice.text(top)} against {choice.text(next_value)} of {second.label}"
    outcome = Verdict(f"{best.label} is ahead in {choice.label}: {lead}", "good", "Ahead")
    outcome.better += [f"{run.label}: {choice.text(value)}." for value, run in ordered]
    kls = [(finite_number(run.figures("ppo").get("kl")), run) for _, run in ordered]
    outcome.cost += [f"{run.label}: {kl:.1f} nats of KL." for kl, run in kls if kl is not None]
    difference = paired_difference(best, second) if stage == "ppo" else None
    if difference and difference["low"] is not None and difference["high"] is not None:
        bounds = f"{number(difference['low'])} to {number(difference['high'])}"
        line = f"Score of {best.label} over {second.label} on the same prompts: {number(difference['value'])} (95% {bounds})"
        if difference["low"] > 0:
            outcome.better.insert(0, f"{line}.")
        else:
            outcome.level = "mixed"
            outcome.doubts.insert(0, f"{line}, which chance can explain.")
    return outcome


def paired_difference(run: RunFolder, other: RunFolder) -> dict[str, float | None] | None:
    """Return the mean difference of two runs' scores on the prompts of both, with its 95% interval over prompts."""
    scores = [
        {str(row.get("prompt")): s for row in each.samples if (s := finite_number(row.get("ppo_score"))) is not None}
        for each in (run, other)
    ]
    prompts = [prompt for prompt in scores[0] if prompt in scores[1]]
    values = np.array([scores[0][prompt] - scores[1][prompt] for prompt in prompts])
    return intervals.mean(values, np.arange(len(values)))
