"""One page about several runs: how they differ, which is better, at what cost, and where each figure comes from.

`rlhf report RUN [RUN ...] -o report.html`. A RUN is a folder of a pipeline, of a single stage, or of
`rlhf evaluate`. Nothing is measured here, and files that are missing or half-written are named on the page. Every
figure stands under its run, and each run is listed with its W&B run id and the hash of its manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.report import charts, compare_first, compare_tables, frontier, kinds, samples
from rlhf.report.compare_lineage import draw_lineage, lineage
from rlhf.report.first_screen import last_stage
from rlhf.report.page import diagnoses, evenly_spaced, write_page
from rlhf.report.run_folder import RunFolder, comparability, labels, overlaps, read_run


def write_comparison(folders: Sequence[Path], file: Path, *, registry: Path | None = None, force: bool = False) -> Path:
    """Write the page of several runs and return its path.

    Args:
        folders: run folders; one that is corrupt is named on the page, and the others are still compared.
        registry: where manifests are looked for when a run's folder has none.
        force: compare runs that should not be compared, and mark the page.

    Raises:
        UserError: no such folder, a folder that is no run, or runs that were not measured with the same prompts and reward
            model.
    """
    all_folders = [read_run(folder, registry) for folder in folders]
    for run, label in zip(all_folders, labels(folders), strict=True):
        run.label = label
    runs = [run for run in all_folders if run.is_run]
    evaluations = [run for run in all_folders if run.evaluation]
    for evaluation in evaluations:
        evaluation.evaluated = evaluation.read_rows("samples.jsonl", kinds.Sample)
    marks = comparability(runs)
    if marks and not force:
        raise UserError(f"{marks[0]}; --force compares them and marks the page")
    plots = [
        *charts.compared_charts(runs),
        *frontier.frontier_charts(runs),
        *frontier.evaluated_frontiers(evaluations, runs),
        *charts.compared_phases(runs),
    ]
    findings = {run.label: diagnoses(run) for run in runs}
    doubts = [*marks, *overlaps([last_stage(run) for run in all_folders])]
    judged = next((each for each in evaluations if each.evaluated), None)
    answers = samples.evaluation_samples(judged) if judged else samples.run_samples(runs)
    speakers = [model["label"] for model in judged.evaluated_models()] if judged else [run.label for run in runs]
    tables = compare_tables.evaluated(evaluations)
    recommended = [str(table["recommended"]) for table in tables if table["recommended"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_page(
        file,
        "comparison.html.j2",
        title=f"{len(runs)} run{'' if len(runs) == 1 else 's'} compared",
        base_model=compare_first.common_base(runs),
        task=compare_first.common_task(runs),
        verdict=compare_first.compared_verdict(runs, findings, doubts, bool(marks), recommended),
        table=compare_first.first_table(runs),
        examples=samples.examples(answers),
        rule=samples.example_rule(answers),
        runs=runs,
        marks=[*marks, *overlaps(all_folders)],
        incomparable=bool(marks),
        headings=[compare_tables.heading(run) for run in runs],
        differences=compare_tables.differences(runs),
        common=compare_tables.common(runs),
        outcome=compare_tables.outcome(runs),
        evaluated=tables,
        win_rates=compare_tables.win_rates(evaluations),
        cards=compare_tables.card_table(runs),
        health=compare_tables.health_table(runs),
        diagnoses=[(label, diagnosis) for label, own in findings.items() for diagnosis in own],
        samples=evenly_spaced(answers, samples.COMPARED_SHOWN),
        orders=samples.orders(speakers),
        before=str(judged.evaluation.get("baseline")) if judged else "the run's SFT answer",
        lineage=draw_lineage(*lineage(runs)),
        memory=compare_tables.memory_table(runs),
        sources=compare_tables.sources(runs),
        problems=[(run.label, line) for run in all_folders for line in [*run.problems, *_unregistered(run)]],
        charts=plots,
    )


def _unregistered(run: RunFolder) -> list[str]:
    stages = [stage for stage in run.metrics if stage not in run.manifests]
    return [
        f"no readable manifest of {', '.join(stages)}: options and parents are known only as far as the run logged them"
    ] if stages else []  # fmt: skip
