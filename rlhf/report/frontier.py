"""Charts of score over KL (Gao et al. 2022): the updates of runs, and policies that an evaluation measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.base.json_files import finite_number, section
from rlhf.report.charts import Chart, rounded, thin
from rlhf.report.run_folder import RunFolder, mappings
from rlhf.run.metrics import reward_kl_points

FITTED_POINTS = 60
"""Points at which a fitted curve is drawn."""
BEST_OF_N_COLOR = 9
"""The last of the page's ten colours; runs take the others first."""


def frontier_charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """Return the chart of the runs' logged updates, a point each; none where no run has any."""
    traces = []
    for index, run in enumerate(runs):
        points = thin(reward_kl_points(run.metrics.get("ppo", [])))
        if points:
            xs, ys = ([rounded(point[key]) for point in points] for key in ("sqrt_kl", "score"))
            labels = [f"update {point['step']:.0f}" for point in points]
            traces.append({"run": index, "x": xs, "y": ys, "labels": labels, **run.source("ppo")})
    if not traces:
        return []
    note = "Left is cheap, up is good: at equal KL the higher curve is the better run. Where it bends down, PPO goes too far."
    return [_chart("Score over the square root of KL", note, traces, "ppo/metrics.jsonl")]


def evaluated_frontiers(evaluations: Sequence[RunFolder], runs: Sequence[RunFolder]) -> list[Chart]:
    """Return a chart for each scorer of each evaluation: gains over the SFT policy, their fits, and best-of-n."""
    charts = []
    run_sources = {run.folder.name: run.source("ppo") for run in runs}
    for evaluation in evaluations:
        note = (
            f"{evaluation.label}: held-out prompts, 95% intervals. Where gold bends down while the score still rises, PPO "
            "goes too far. Best-of-n is what the same KL buys without training."
        )
        points = mappings(section(evaluation.evaluation, "frontier"), "points")
        golds = dict.fromkeys(itertools.chain.from_iterable(section(point, "gold_gain") for point in points))
        for scorer in ("score", *(f"gold/{name}" for name in golds)):
            traces = [
                *_measured(evaluation, points, scorer, run_sources),
                *_fits(evaluation, points, scorer),
                *_best_of_n(evaluation, scorer),
            ]
            if traces:
                title = f"Gain in {scorer} over the SFT policy"
                charts.append(_chart(title, note, traces, f"{evaluation.label}/evaluation.json"))
    return charts


def _chart(title: str, note: str, traces: list[dict[str, Any]], source: str) -> Chart:
    return {
        "kind": "frontier", "section": "frontier", "title": title, "unit": "", "note": note,
        "axis": "square root of KL, nats", "traces": traces, "source": source,
    }  # fmt: skip


def _scored(line: Mapping[str, Any], scorer: str, suffix: str = "") -> Mapping[str, Any]:
    """Return a scorer's figure: that under `score` or, for `gold/NAME`, the one of that name under `gold`."""
    if scorer == "score":
        return section(line, f"score{suffix}")
    return section(section(line, f"gold{suffix}"), scorer.removeprefix("gold/"))


def _curve_name(point: Mapping[str, Any]) -> str:
    """Return the name under which a point is drawn: its run's, or its own for a registered policy."""
    return str(point.get("run") or point.get("model"))


def _measured(
    evaluation: RunFolder,
    points: Sequence[Mapping[str, Any]],
    scorer: str,
    run_sources: Mapping[str, Mapping[str, str]],
) -> list[dict[str, Any]]:
    """Return a trace a run: its snapshots by their KL. The source of a snapshot is its run's."""
    sources = {model.pop("label"): model for model in evaluation.evaluated_models()}
    traces = []
    for color, name in enumerate(dict.fromkeys(map(_curve_name, points))):
        own = sorted((p for p in points if _curve_name(p) == name), key=lambda p: float(p.get("sqrt_kl") or 0))
        own = [p for p in own if finite_number(_scored(p, scorer, "_gain").get("value")) is not None]
        gains = [_scored(p, scorer, "_gain") for p in own]
        if own:
            traces.append({
                "color": color, "name": name, "x": [p.get("sqrt_kl") for p in own], "y": [g["value"] for g in gains],
                "labels": [str(p.get("model")) for p in own], "above": [_distance(g, "high") for g in gains],
                "below": [_distance(g, "low") for g in gains], "mode": "markers",
                **(sources.get(name) or run_sources.get(name) or {"run_id": "", "manifest": ""}),
            })  # fmt: skip
    return traces


def _distance(figure: Mapping[str, Any], bound: str) -> float | None:
    end = finite_number(figure.get(bound))
    return None if end is None else abs(end - figure["value"])


def _fits(evaluation: RunFolder, points: Sequence[Mapping[str, Any]], scorer: str) -> list[dict[str, Any]]:
    """Return the fitted curves of the runs, as far as their points reach."""
    colors = list(dict.fromkeys(map(_curve_name, points)))
    traces = []
    for fit in mappings(section(evaluation.evaluation, "frontier"), "fits"):
        run, a, b = fit.get("run"), finite_number(fit.get("a")), finite_number(fit.get("b"))
        farthest = max((float(p.get("sqrt_kl") or 0) for p in points if p.get("run") == run), default=0.0)
        if fit.get("scorer") == scorer and a is not None and b is not None and farthest > 0:
            xs = [farthest * i / FITTED_POINTS for i in range(1, FITTED_POINTS + 1)]
            traces.append({
                "color": colors.index(str(run)), "name": f"{run}: d ({a:.3g} − {b:.3g} log d)", "x": xs,
                "y": [x * (a - b * math.log(x)) for x in xs], "mode": "lines", "dash": "dot",
            })  # fmt: skip
    return traces


def _best_of_n(evaluation: RunFolder, scorer: str) -> list[dict[str, Any]]:
    """Return the curve of best-of-n, as a gain over n = 1."""
    lines = mappings(section(evaluation.evaluation, "best_of_n"), "curve")
    points = [
        (line, value) for line in lines if (value := finite_number(_scored(line, scorer).get("value"))) is not None
    ]
    if not points:
        return []
    first = points[0][1]
    return [{
        "color": BEST_OF_N_COLOR, "name": "best-of-n", "x": [math.sqrt(max(line["kl"], 0.0)) for line, _ in points],
        "y": [value - first for _, value in points], "labels": [f"best of {line.get('n')}" for line, _ in points],
        "mode": "lines+markers", "dash": "dash",
    }]  # fmt: skip
