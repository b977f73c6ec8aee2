"""The plots of the page: a line a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.base.json_files import finite_number, section
from rlhf.report.charts import _thin
from rlhf.report.compare_runs import RunFolder, mappings
from rlhf.run.metrics import reward_kl_points

FITTED_POINTS = 60


class Curve(NamedTuple):
    """A plot with a line a run."""

    stage: str
    metrics: tuple[str, ...]
    """The first of these that a run has logged."""
    title: str
    unit: str
    note: str


CURVES = (
    Curve("ppo", ("objective/score",), "Reward score", "", "Should rise, then flatten."),
    Curve("ppo", ("objective/rlhf_reward",), "Score less KL cost", "", "What PPO maximises."),
    Curve(
        "ppo",
        ("objective/kl_full", "objective/kl"),
        "KL from the SFT model",
        "nats a response",
        "A jump means that the policy leaves the language it knew.",
    ),
    Curve("ppo", ("objective/entropy",), "Entropy", "nats a token", "Near 0 the policy says one thing only."),
    Curve("ppo", ("response/length",), "Response length", "tokens", "A steady climb or fall can be a trick."),
    Curve("ppo", ("response/stop_rate",), "Stop rate", "", "Share of responses that end by themselves."),
    Curve("ppo", ("response/distinct_2",), "Distinct word pairs", "", "Falls when answers grow alike."),
    Curve(
        "ppo", ("ppo/explained_variance",), "Explained variance", "", "How well values foresee the reward; 1 is best."
    ),
    Curve("ppo", ("ppo/clipfrac",), "Clipped tokens", "share", "High: steps are too large."),
    Curve("ppo", ("ppo/value_loss",), "Value loss", "", "Should fall."),
    Curve("sft", ("sft/loss",), "SFT loss, training", "nats a token", ""),
    Curve("sft", ("sft/eval_loss",), "SFT loss, held out", "nats a token", "If it turns up, that is overfitting."),
    Curve("reward", ("reward/loss",), "Reward model's loss, training", "", ""),
    Curve("reward", ("reward/eval_accuracy", "reward/accuracy"), "Reward model's accuracy", "", "0.5 is a coin."),
)


def curves(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """`CURVES`, without those of which no run has anything."""
    charts = []
    for curve in CURVES:
        traces = [trace for index, run in enumerate(runs) if (trace := _trace(index, run, curve))]
        if traces:
            axis = "updates" if curve.stage == "ppo" else "optimiser updates"
            charts.append({
                "kind": "lines", "section": "curves", "stage": curve.stage, "title": curve.title, "unit": curve.unit,
                "note": curve.note, "axis": axis, "traces": traces, "source": f"{curve.stage}/metrics.jsonl",
            })  # fmt: skip
    return charts


def _trace(index: int, run: RunFolder, curve: Curve) -> dict[str, Any] | None:
    """One run's line. `episodes` is what an update's number is multiplied with to count responses."""
    rows = run.metrics.get(curve.stage, [])
    for metric in curve.metrics:
        points = [(row.get("step"), v) for row in rows if (v := finite_number(row.get(metric))) is not None]
        if points:
            points = _thin(points)
            counted = [(finite_number(row.get("episodes")), finite_number(row.get("step"))) for row in rows]
            episodes = next((count / step for count, step in counted if count and step), None)
            return {
                "run": index, "x": [x for x, _ in points], "y": [float(f"{y:.5g}") for _, y in points],
                "episodes": episodes, **run.source(curve.stage),
            }  # fmt: skip
    return None


def frontier_chart(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Score over the root of KL, a point an update (Gao et al. 2022)."""
    traces = []
    for index, run in enumerate(runs):
        points = _thin(reward_kl_points(run.metrics.get("ppo", [])))
        if points:
            xs, ys = ([float(f"{p[key]:.5g}") for p in points] for key in ("sqrt_kl", "score"))
            labels = [f"update {p['step']:.0f}" for p in points]
            traces.append({"run": index, "x": xs, "y": ys, "labels": labels, **run.source("ppo")})
    if not traces:
        return []
    note = "Left is cheap, up is good: at equal KL the higher curve is the better run. Where it bends down, PPO goes too far."
    return [{
        "kind": "frontier", "section": "frontier", "title": "Score over the square root of KL", "unit": "", "note": note,
        "axis": "square root of KL, nats", "traces": traces, "source": "ppo/metrics.jsonl",
    }]  # fmt: skip


def evaluated_frontiers(evaluations: Sequence[RunFolder], runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Gains over the SFT policy by the root of KL, as `rlhf.evaluation` measured them on held-out prompts: a plot a scorer,
    with the fits of Gao et al. (2022) and best-of-n."""
    charts = []
    of_runs = {run.folder.name: run.source("ppo") for run in runs}
    for found in evaluations:
        points = mappings(section(found.evaluation, "frontier"), "points")
        golds = dict.fromkeys(itertools.chain.from_iterable(section(p, "gold_gain") for p in points))
        for scorer in ("score", *(f"gold/{name}" for name in golds)):
            traces = [
                *_measured(found, points, scorer, of_runs),
                *_fits(found, points, scorer),
                *_best_of_n(found, scorer),
            ]
            if traces:
                charts.append({
                    "kind": "frontier", "section": "frontier", "title": f"Gain in {scorer} over the SFT policy", "unit": "",
                    "note": f"{found.label}: held-out prompts, 95% intervals. Where gold bends down while the score still "
                    "rises, PPO goes too far. Best-of-n is what the same KL buys without training.",
                    "axis": "square root of KL, nats", "traces": traces, "source": f"{found.label}/evaluation.json",
                })  # fmt: skip
    return charts


def _gain(point: Mapping[str, Any], scorer: str) -> Mapping[str, Any]:
    return section(point, "score_gain") if scorer == "score" else section(section(point, "gold_gain"), scorer[5:])


def _series(point: Mapping[str, Any]) -> str:
    """What a point is drawn with: the snapshots of a run, or a registered policy by itself."""
    return str(point.get("run") or point.get("model"))


def _measured(
    found: RunFolder, points: Sequence[Mapping[str, Any]], scorer: str, of_runs: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """A trace a run: its checkpoints, from the nearest to the SFT policy on. A snapshot's source is its run's."""
    models = {
        str(m.get("name")): {"run_id": str(m.get("run_id") or ""), "manifest": str(m.get("hash") or "")}
        for m in mappings(found.evaluation, "models")
    }
    traces = []
    for color, name in enumerate(dict.fromkeys(map(_series, points))):
        own = sorted((p for p in points if _series(p) == name), key=lambda p: float(p.get("sqrt_kl") or 0))
        own = [p for p in own if finite_number(_gain(p, scorer).get("value")) is not None]
        gains = [_gain(p, scorer) for p in own]
        reach = {
            end: [None if (bound := finite_number(g.get(side))) is None else abs(bound - g["value"]) for g in gains]
            for end, side in (("above", "high"), ("below", "low"))
        }
        if own:
            traces.append({
                "color": color, "name": name, "x": [p.get("sqrt_kl") for p in own], "y": [g["value"] for g in gains],
                "labels": [str(p.get("model")) for p in own], **reach, "mode": "markers",
                **(models.get(name) or of_runs.get(name) or {"run_id": "", "manifest": ""}),
            })  # fmt: skip
    return traces


def _fits(found: RunFolder, points: Sequence[Mapping[str, Any]], scorer: str) -> list[dict[str, Any]]:
    """The fitted curves of the runs, as far as their points reach."""
    colors = list(dict.fromkeys(map(_series, points)))
    traces = []
    for fit in mappings(section(found.evaluation, "frontier"), "fits"):
        a, b = finite_number(fit.get("a")), finite_number(fit.get("b"))
        far = max((float(p.get("sqrt_kl") or 0) for p in points if p.get("run") == fit.get("run")), default=0.0)
        if fit.get("scorer") == scorer and a is not None and b is not None and far > 0:
            xs = [far * i / FITTED_POINTS for i in range(1, FITTED_POINTS + 1)]
            name = f"{fit.get('run')}: d ({a:.3g} − {b:.3g} log d)"
            ys = [x * (a - b * math.log(x)) for x in xs]
            traces.append(
                {
                    "color": colors.index(str(fit.get("run"))),
                    "name": name,
                    "x": xs,
                    "y": ys,
                    "mode": "lines",
                    "dash": "dot",
                }
            )
    return traces


def _best_of_n(found: RunFolder, scorer: str) -> list[dict[str, Any]]:
    curve = mappings(section(found.evaluation, "best_of_n"), "curve")
    scores = [
        section(line, "score") if scorer == "score" else section(section(line, "gold"), scorer[5:]) for line in curve
    ]
    values = [finite_number(score.get("value")) for score in scores]
    known = [(line, value) for line, value in zip(curve, values, strict=True) if value is not None]
    if not known:
        return []
    first = known[0][1]
    xs, ys = [math.sqrt(max(line["kl"], 0.0)) for line, _ in known], [value - first for _, value in known]
    labels = [f"best of {line.get('n')}" for line, _ in known]
    return [
        {"color": 9, "name": "best-of-n", "x": xs, "y": ys, "labels": labels, "mode": "lines+markers", "dash": "dash"}
    ]


def time_charts(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Seconds of each phase, a bar a run."""
    names = dict.fromkeys((p.get("stage"), p.get("phase")) for run in runs for p in run.phases())
    traces = []
    for stage, phase in names:
        seconds = [
            next(
                (
                    finite_number(p.get("seconds"))
                    for p in run.phases()
                    if (p.get("stage"), p.get("phase")) == (stage, phase)
                ),
                None,
            )
            for run in runs
        ]
        sources = [run.source(str(stage)) for run in runs]
        traces.append(
            {"name": f"{stage} · {phase}", "x": seconds, "y": [run.label for run in runs], "sources": sources}
        )
    return [
        {"kind": "bars", "section": "time", "title": "Time by phase", "unit": "seconds", "note": "", "axis": "seconds",
         "traces": traces, "source": "results.json"}
    ] if traces else []  # fmt: skip
