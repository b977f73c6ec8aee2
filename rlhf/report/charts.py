"""The plots of a run's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf.base.json_files import finite_number
from rlhf.report.figures import Results

POINTS_PER_CURVE = 400
"""Enough for a plot 500 pixels wide; a run of 100,000 steps would make a page of many megabytes otherwise."""


class Chart(NamedTuple):
    """One plot of the page. Curves of which the files hold nothing are left out."""

    title: str
    curves: tuple[tuple[str, str, str], ...]
    """Stage, metric, label."""
    unit: str
    note: str
    """What to look for."""


CHARTS = (
    Chart(
        "Pretraining loss",
        (("pretrain", "pretrain/loss", "training"), ("pretrain", "pretrain/eval_loss", "held out")),
        "nats per token",
        "Held out should fall with training, fast and then slowly. If it turns up, the text was read too often.",
    ),
    Chart(
        "Pretraining, bits per character",
        (("pretrain", "pretrain/eval_bits_per_character", "held out"),),
        "",
        "What a held-out character costs, whatever the tokenizer. Plain bytes cost 8 bits.",
    ),
    Chart(
        "Reward score",
        (("ppo", "objective/score", "score"), ("ppo", "objective/rlhf_reward", "score less KL cost")),
        "",
        "Should rise, then flatten.",
    ),
    Chart(
        "KL from the SFT model",
        (("ppo", "objective/kl", "KL"), ("ppo", "objective/kl_k3", "KL, k3 estimate")),
        "nats per answer",
        "Should grow slowly. A jump means the policy is leaving the language it knew.",
    ),
    Chart(
        "Response length",
        (("ppo", "response/length", "length"),),
        "tokens",
        "A steady climb or fall can be a trick played on the reward model.",
    ),
    Chart(
        "PPO losses",
        (("ppo", "ppo/policy_loss", "policy"), ("ppo", "ppo/value_loss", "value")),
        "",
        "The policy loss hovers near 0. The value loss should fall.",
    ),
    Chart(
        "Entropy",
        (("ppo", "objective/entropy", "entropy"),),
        "nats",
        "How undecided the policy is. Near 0 it says one thing only.",
    ),
    Chart(
        "Explained variance",
        (("ppo", "ppo/explained_variance", "explained variance"),),
        "",
        "How well the value head foresees the reward. 1 is perfect; 0 or less is no use.",
    ),
    Chart(
        "SFT loss",
        (("sft", "sft/loss", "training"), ("sft", "sft/eval_loss", "held out")),
        "nats per token",
        "Held out should fall with training. If it turns up, that is overfitting.",
    ),
    Chart(
        "Reward model accuracy",
        (("reward", "reward/accuracy", "training"), ("reward", "reward/eval_accuracy", "held out")),
        "",
        "Share of pairs in which the preferred answer gets the higher score. 0.5 is a coin.",
    ),
)


def _draw(chart: Chart, metrics: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    traces = []
    for stage, metric, label in chart.curves:
        rows = metrics.get(stage, [])
        points = [(row.get("step"), value) for row in rows if (value := finite_number(row.get(metric))) is not None]
        if points:
            points = _thin(points)
            traces.append({"name": label, "x": [x for x, _ in points], "y": [float(f"{y:.5g}") for _, y in points]})
    if not traces:
        return None
    return {"title": chart.title, "unit": chart.unit, "note": chart.note, "kind": "lines", "traces": traces}


def _thin(points: list[Any]) -> list[Any]:
    """At most `POINTS_PER_CURVE` of them, evenly spaced, the last one included."""
    if len(points) <= POINTS_PER_CURVE:
        return points
    last = len(points) - 1
    return [points[index * last // (POINTS_PER_CURVE - 1)] for index in range(POINTS_PER_CURVE)]


def _timing_charts(results: Results) -> list[dict[str, Any]]:
    rows = [row for row in results.get("phases") or [] if isinstance(row, Mapping)]
    labels = [f"{row.get('stage', '')} · {row.get('phase', '')}" for row in rows]
    charts = []
    for title, key, unit in (
        ("Time", "seconds", "seconds"),
        ("Peak memory", "peak_rss_gb", "GB"),
        ("Peak GPU memory", "peak_cuda_gb", "GB"),
    ):
        bars = [
            (label, value)
            for label, row in zip(labels, rows, strict=True)
            if (value := finite_number(row.get(key))) is not None
        ]
        if bars:
            trace = {"name": title, "x": [value for _, value in bars], "y": [label for label, _ in bars]}
            charts.append({"title": title, "unit": unit, "note": "", "kind": "bars", "traces": [trace]})
    return charts
