"""The page of a reward model's report card."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.json_files import entries, finite_number, section
from rlhf.report.figures import NO_FIGURE, _percent, _text
from rlhf.report.page import _plotly_gzip_base64, _write_page, template


def write_card_page(card: Mapping[str, Any], file: Path) -> Path:
    """A page of a reward model's report card alone, which opens from disk without a network."""
    section = _card_section(card)
    page = template("report.html.j2").render(
        title="Report card of a reward model",
        results={},
        reward_card=section,
        charts=[],
        timing=[],
        plots=section["charts"],
        plotly=_plotly_gzip_base64(),
    )
    return _write_page(page, file)


def _card_section(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a report card, numbers as text and plots as traces; nothing of a card that is not there."""
    if not card:
        return {}
    probes = [
        {
            **probe,
            **section(probe, "example"),
            "gain": finite_number(probe.get("gain")),
            "raised": _percent(finite_number(probe.get("raised"))),
        }
        for probe in entries(card, "probes")
    ]
    left_out = [
        f"{split}: {entry.get('count')} {reason} (rows {', '.join(map(str, entry.get('rows', [])[:5]))})"
        for split, reasons in section(card, "left_out").items()
        for reason, entry in reasons.items()
    ]
    charts = [
        _accuracy_chart(card),
        _slices_chart(card),
        _calibration_chart(card),
        _length_chart(card),
        _samples_chart(card),
    ]
    return {
        "verdict": str(card.get("verdict", "")),
        "flags": entries(card, "flags"),
        "notes": card.get("notes") or [],
        "facts": _card_facts(card),
        "probes": probes,
        "examples": entries(section(card, "samples"), "examples"),
        "left_out": left_out,
        "charts": [chart for chart in charts if chart],
    }


def _card_facts(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    calibration, length, samples = (section(card, name) for name in ("calibration", "length", "samples"))
    facts = [
        ("Calibration error", _percent(finite_number(calibration.get("ece"))),
         "Distance of its probabilities from how often it is right."),
        ("Temperature", _text(finite_number(calibration.get("temperature"))),
         "1 is calibrated. Above 1: it is too sure of itself."),
        ("Length and score", _text(finite_number(length.get("correlation"))), "Rank correlation within a prompt."),
        ("Length and rating", _text(finite_number(length.get("label_correlation"))), "The same of what people think."),
        ("Responses outside", _percent(finite_number(samples.get("outside"))),
         "Of the SFT policy's own: beyond the scores of 98% of the training responses."),
    ]  # fmt: skip
    return [fact for fact in facts if fact[1] != NO_FIGURE]


def _accuracy_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    length = section(card, "length")
    lines = [
        ("held-out pairs", card.get("accuracy")),
        ("new prompts", card.get("accuracy_held_out_prompts")),
        ("raters it never saw", card.get("accuracy_held_out_raters")),
        ("human ceiling", card.get("human_ceiling")),
        ("balanced by length", length.get("balanced_accuracy")),
        ("independent scorer", card.get("gold_accuracy")),
        *((str(line.get("name")), line.get("accuracy")) for line in entries(card, "rivals")),
    ]
    return _intervals(
        "Accuracy, and what to hold it against", lines, "The bar is the 95% interval over prompts. 0.5 is a coin."
    )


def _slices_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    lines = [(f"{line.get('slice')}: {line.get('kind')}", line) for line in entries(card, "slices")]
    return _intervals("Accuracy by kind of pair", lines, "Where it is right, and where it guesses.")


def _intervals(title: str, lines: Sequence[tuple[str, Any]], note: str) -> dict[str, Any] | None:
    """Shares with their intervals, one below the other."""
    known = [
        (label, line)
        for label, line in lines
        if isinstance(line, Mapping) and finite_number(line.get("value")) is not None
    ]
    if not known:
        return None

    def reach(line: Mapping[str, Any], end: str) -> float:
        value, bound = float(line["value"]), finite_number(line.get(end))
        return 0.0 if bound is None else round(abs(bound - value), 4)

    trace = {
        "name": title,
        "x": [round(float(line["value"]), 4) for _, line in known],
        "y": [label for label, _ in known],
        "above": [reach(line, "high") for _, line in known],
        "below": [reach(line, "low") for _, line in known],
    }
    return {"title": title, "unit": "", "note": note, "kind": "intervals", "traces": [trace]}


def _calibration_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    bins = entries(section(card, "calibration"), "bins")
    if not bins:
        return None
    traces = [
        {"name": "model", "x": [b["confidence"] for b in bins], "y": [b["right"] for b in bins]},
        {"name": "calibrated", "x": [0.5, 1.0], "y": [0.5, 1.0]},
    ]
    note = "Across: the probability it gives the answer it prefers. Up: how often people prefer it. Below the line: too sure."
    return {"title": "Reliability", "unit": "", "note": note, "kind": "lines", "traces": traces}


def _length_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    curve = entries(section(card, "length"), "curve")
    if not curve:
        return None
    lengths = [point["length"] for point in curve]
    traces = [{"name": name, "x": lengths, "y": [point[name] for point in curve]} for name in ("score", "rating")]
    note = "Across: tokens. Up: standard deviations. A score that climbs where ratings do not is a taste for length."
    return {"title": "Score and rating by length", "unit": "", "note": note, "kind": "lines", "traces": traces}


def _samples_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    histogram = section(section(card, "samples"), "histogram")
    edges = histogram.get("edges")
    if not edges:
        return None
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    traces = [
        {"name": name, "x": middles, "y": histogram[key]}
        for name, key in (("SFT policy's own", "samples"), ("training responses", "training"))
    ]
    note = "Where the two do not overlap, PPO starts outside of what the reward model has seen."
    return {"title": "Scores of responses", "unit": "share by score", "note": note, "kind": "lines", "traces": traces}
