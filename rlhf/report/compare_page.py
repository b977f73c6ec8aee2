"""One page about several runs: how they differ, which is better, at what cost, and where each figure comes from.

`python -m rlhf.report RUN [RUN ...] -o report.html`. A RUN is the folder that a pipeline, a single stage or
`python -m rlhf.evaluation` wrote. As in `rlhf.report`, the page opens from disk without a network, nothing is measured here,
and what is missing or half-written is named while the rest is shown. Every figure stands under the run that it comes from, and
each run is listed with its W&B run id and the hash of its manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.report import compare_charts, compare_samples, compare_tables
from rlhf.report.compare_lineage import draw_lineage, lineage
from rlhf.report.compare_runs import comparability, labels, overlaps, read_run
from rlhf.report.health import health
from rlhf.report.page import _plotly_gzip_base64, _write_page, template


def write_comparison(folders: Sequence[Path], file: Path, *, registry: Path | None = None, force: bool = False) -> Path:
    """Makes the page.

    Args:
        folders: run folders; one that is corrupt is named on the page, and the others are still compared.
        registry: where manifests are looked for when a run's folder has none.
        force: compare runs that cannot be compared, and say so on the page.

    Raises:
        UserError: no such folder, a folder that is no run, or runs that were not measured with the same prompts and reward
            model.
    """
    found = [read_run(folder, registry) for folder in folders]
    for run, label in zip(found, labels([run.folder for run in found]), strict=True):
        run.label = label
    runs, evaluations = [run for run in found if run.is_run], [run for run in found if run.evaluation]
    marks = comparability(runs)
    if marks and not force:
        raise UserError(f"{marks[0]}; compare with --force, and the page will say so")
    plots = [
        *compare_charts.curves(runs),
        *compare_charts.frontier_chart(runs),
        *compare_charts.evaluated_frontiers(evaluations, runs),
        *compare_charts.time_charts(runs),
    ]
    said = [
        *(part for found in evaluations if (part := compare_samples.of_evaluation(found))),
        compare_samples.of_runs(runs),
    ]
    page = template("comparison.html.j2").render(
        runs=runs,
        marks=[*marks, *overlaps(found)],
        incomparable=bool(marks),
        headings=[compare_tables.heading(run) for run in runs],
        differences=compare_tables.differences(runs),
        common=compare_tables.common(runs),
        outcome=compare_tables.outcome(runs),
        evaluated=compare_tables.evaluated(evaluations),
        win_rates=compare_tables.win_rates(evaluations),
        cards=compare_tables.card_table(runs),
        health=compare_tables.health_table(runs),
        diagnoses=[(run.label, stage) for run in runs for stage in health(run.folder)],
        samples=said[0],
        lineage=draw_lineage(*lineage(runs)),
        memory=compare_tables.memory_table(runs),
        sources=compare_tables.sources(runs),
        problems=[(run.label, line) for run in found for line in run.problems],
        charts=plots,
        plotly=_plotly_gzip_base64() if plots else "",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    return _write_page(page, file)
