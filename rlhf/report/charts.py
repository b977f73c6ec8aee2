"""Curves of metrics and bars of phases, for the run's page and for the page that compares runs.

A chart is a dictionary of the page's plotting script: `title`, `unit`, `note`, `kind` and `traces`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.base.json_files import finite_number
from rlhf.report.run_folder import RunFolder, series
from rlhf.run import metrics

POINTS_PER_CURVE = 400
"""Enough for a plot 500 pixels wide; a run of 100,000 steps would make a page of many megabytes otherwise."""

Chart = dict[str, Any]


def thin(points: Sequence[Any]) -> Sequence[Any]:
    """Return `POINTS_PER_CURVE` of the points at most, evenly spaced, the last one included."""
    if len(points) <= POINTS_PER_CURVE:
        return points
    last = len(points) - 1
    return [points[index * last // (POINTS_PER_CURVE - 1)] for index in range(POINTS_PER_CURVE)]


def rounded(value: float) -> float:
    """Return five significant digits; more would only make the page larger."""
    return float(f"{value:.5g}")


def _curve(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Return the `x` (updates) and `y` of a metric; None for one that was not logged."""
    points = thin(series(rows, metric))
    return {"x": [x for x, _ in points], "y": [rounded(y) for _, y in points]} if points else None


def run_charts(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """Return the charts of the metrics shown in a run's page.

    Args:
        logs: rows of `metrics.jsonl` by stage.
    """
    charts: dict[str, Chart] = {}
    for metric in metrics.shown("report"):
        title = metric.chart or metric.title
        chart = charts.setdefault(title, {
            "kind": "lines", "section": "curves", "title": title, "unit": metric.unit, "note": "", "axis": axis_of(metric),
            "traces": [], "metrics": [],
        })  # fmt: skip
        chart["note"] = chart["note"] or metric.note
        if curve := _curve(logs.get(metric.stage, []), metric.name):
            chart["traces"].append({"name": metric.label, **curve})
            chart["metrics"].append(about(metric))
    return [chart for chart in charts.values() if chart["traces"]]


def axis_of(metric: metrics.Metric) -> str:
    """Return what a metric is drawn over."""
    return "PPO updates" if metric.stage == "ppo" else "optimiser updates"


def about(metric: metrics.Metric) -> dict[str, str]:
    """Return a metric's name, definition, and the signs of trouble, for the fold below its chart."""
    return {"label": metric.label, "meaning": metric.meaning, "trouble": metric.trouble.strip("-")}


def compared_charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """Return the charts of the metrics shown in a comparison, a line a run."""
    charts = []
    for metric in metrics.shown("comparison"):
        traces = [trace for index, run in enumerate(runs) if (trace := _run_trace(index, run, metric))]
        if traces:
            charts.append({
                "kind": "lines", "section": "curves", "stage": metric.stage, "title": metric.title, "unit": metric.unit,
                "note": metric.note, "axis": axis_of(metric), "traces": traces, "source": f"{metric.stage}/metrics.jsonl",
                "metrics": [about(metric)],
            })  # fmt: skip
    return charts


def _run_trace(index: int, run: RunFolder, metric: metrics.Metric) -> dict[str, Any] | None:
    """Return one run's line; its `episodes` are the responses of an update, to turn one axis into the other."""
    rows = run.metrics.get(metric.stage, [])
    curve = _curve(rows, metric.name) or _curve(rows, metric.fallback)
    if curve is None:
        return None
    counts = ((finite_number(row.get("episodes")), finite_number(row.get("step"))) for row in rows)
    episodes = next((count / step for count, step in counts if count and step), None)
    return {"run": index, **curve, "episodes": episodes, **run.source(metric.stage)}


def phase_charts(phases: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the seconds and the peak memory of a run's phases, a bar each."""
    charts = []
    for title, key, unit, note in (
        ("Time", "seconds", "seconds", "Where the time went, by stage and phase."),
        ("Peak memory", "peak_rss_gb", "GB", "Most memory that a phase held; the highest bar decides whether it fits."),
        ("Peak GPU memory", "peak_cuda_gb", "GB", "Most memory of the GPU that a phase held."),
    ):
        bars = [
            (f"{row.get('stage', '')} · {row.get('phase', '')}", value)
            for row in phases
            if (value := finite_number(row.get(key))) is not None
        ]
        if bars:
            trace = {"name": title, "x": [value for _, value in bars], "y": [label for label, _ in bars]}
            charts.append({"kind": "bars", "section": "time", "title": title, "unit": unit, "note": note, "axis": unit,
                           "traces": [trace]})  # fmt: skip
    return charts


def compared_phases(runs: Sequence[RunFolder]) -> list[Chart]:
    """Return the seconds of each phase, a bar a run."""
    seconds = [
        {(row.get("stage"), row.get("phase")): finite_number(row.get("seconds")) for row in reversed(run.phases())}
        for run in runs
    ]
    phases = dict.fromkeys((row.get("stage"), row.get("phase")) for run in runs for row in run.phases())
    traces = [
        {"name": f"{stage} · {phase}", "x": [own.get((stage, phase)) for own in seconds],
         "y": [run.label for run in runs], "sources": [run.source(str(stage)) for run in runs]}
        for stage, phase in phases
    ]  # fmt: skip
    return [
        {"kind": "bars", "section": "time", "title": "Time by phase", "unit": "seconds", "note": "", "axis": "seconds",
         "traces": traces, "source": "results.json"}
    ] if traces else []  # fmt: skip
