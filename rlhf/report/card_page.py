"""The report card of a reward model: a section of a run's page, or a page of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.json_files import entries, finite_number, section
from rlhf.report import first_screen
from rlhf.report.charts import Chart
from rlhf.report.figures import NO_FIGURE, number, percent
from rlhf.report.page import write_page
from rlhf.report.run_folder import RunFolder, mappings


def write_card_page(card: Mapping[str, Any], file: Path) -> Path:
    """Write a page of a report card alone and return its path."""
    content = card_section(card)
    run = RunFolder(
        file.parent, places={"reward": file.parent}, results={"reward": _figures(card)}, reward_card=dict(card)
    )
    return write_page(
        file,
        "report.html.j2",
        title=f"Report card of {card.get('model') or 'a reward model'}",
        verdict=first_screen.verdict(run, []),
        tiles=first_screen.tiles(run),
        charts=content.pop("charts"),
        reward_card=content,
    )


def _figures(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's figures under the names that the reward stage registers."""
    names = ("accuracy", "accuracy_held_out_prompts", "accuracy_held_out_raters", "human_ceiling")
    values = {name: finite_number(section(card, name).get("value")) for name in names}
    low, error = section(card, "accuracy").get("low"), section(card, "calibration").get("ece")
    return {**values, "accuracy_low": finite_number(low), "calibration_error": finite_number(error)}


def card_section(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report card as the template shows it, figures as text and plots as traces; {} without a card."""
    if not card:
        return {}
    probes = [
        {**probe, **section(probe, "example"), "gain": finite_number(probe.get("gain")), "raised": percent(probe.get("raised"))}
        for probe in mappings(card, "probes")
    ]  # fmt: skip
    left_out = [
        f"{split}: {entry.get('count')} {reason} (rows {', '.join(map(str, entry.get('rows', [])[:5]))})"
        for split, reasons in section(card, "left_out").items()
        for reason, entry in reasons.items()
    ]
    charts = (
        _accuracy_chart(card),
        _slices_chart(card),
        _calibration_chart(card),
        _length_chart(card),
        _samples_chart(card),
    )
    return {
        "verdict": str(card.get("verdict", "")),
        "flags": entries(card, "flags"),
        "notes": entries(card, "notes"),
        "facts": card_facts(card),
        "probes": probes,
        "examples": entries(section(card, "samples"), "examples"),
        "left_out": left_out,
        "charts": [chart for chart in charts if chart],
    }


def card_facts(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the single figures of a card: name, value as text, and note."""
    calibration, length, samples = (section(card, name) for name in ("calibration", "length", "samples"))
    facts = [
        ("Calibration error", percent(calibration.get("ece")), "Distance of its probabilities from how often it is right."),
        ("Temperature", number(calibration.get("temperature")), "1 is calibrated. Above 1: it is too sure of itself."),
        ("Length and score", number(length.get("correlation")), "Rank correlation within a prompt."),
        ("Length and rating", number(length.get("label_correlation")), "Rank correlation of people's ratings with length."),
        ("Responses outside", percent(samples.get("outside")),
         "Share of the SFT policy's own responses beyond the scores of 98% of the training responses."),
    ]  # fmt: skip
    return [fact for fact in facts if fact[1] != NO_FIGURE]


def _accuracy_chart(card: Mapping[str, Any]) -> Chart | None:
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
    note = "The bar is the 95% interval over prompts. 0.5 is a coin."
    return _interval_chart("Accuracy, and what to compare it with", lines, note)


def _slices_chart(card: Mapping[str, Any]) -> Chart | None:
    lines = [(f"{line.get('slice')}: {line.get('kind')}", line) for line in entries(card, "slices")]
    return _interval_chart("Accuracy by kind of pair", lines, "Where it is right, and where it guesses.")


def _interval_chart(title: str, lines: Sequence[tuple[str, Any]], note: str) -> Chart | None:
    """Return a chart of shares with their intervals, one below the other; None without any."""
    shares = [
        (label, float(line["value"]), line)
        for label, line in lines
        if isinstance(line, Mapping) and finite_number(line.get("value")) is not None
    ]
    if not shares:
        return None
    trace = {
        "name": title,
        "x": [round(value, 4) for _, value, _ in shares],
        "y": [label for label, _, _ in shares],
        "above": [_distance(value, line.get("high")) for _, value, line in shares],
        "below": [_distance(value, line.get("low")) for _, value, line in shares],
    }
    return {
        "kind": "intervals", "section": "card", "title": title, "unit": "", "note": note, "axis": "pairs ranked right",
        "traces": [trace],
    }  # fmt: skip


def _distance(value: float, bound: Any) -> float:
    end = finite_number(bound)
    return 0.0 if end is None else round(abs(end - value), 4)


def _line_chart(title: str, axis: str, unit: str, note: str, traces: list[dict[str, Any]]) -> Chart:
    return {
        "kind": "lines", "section": "card", "title": title, "axis": axis, "unit": unit, "note": note, "traces": traces
    }  # fmt: skip


def _calibration_chart(card: Mapping[str, Any]) -> Chart | None:
    bins = entries(section(card, "calibration"), "bins")
    if not bins:
        return None
    traces = [
        {"name": "model", "x": [b["confidence"] for b in bins], "y": [b["right"] for b in bins]},
        {"name": "calibrated", "x": [0.5, 1.0], "y": [0.5, 1.0], "mode": "lines", "dash": "dot"},
    ]
    note = "Below the dotted line of a calibrated model it is too sure of itself."
    return _line_chart("Reliability", "probability it gives the answer", "share in which people agree", note, traces)


def _length_chart(card: Mapping[str, Any]) -> Chart | None:
    curve = entries(section(card, "length"), "curve")
    if not curve:
        return None
    lengths = [point["length"] for point in curve]
    traces = [{"name": name, "x": lengths, "y": [point[name] for point in curve]} for name in ("score", "rating")]
    note = "A score that climbs where ratings do not is a taste for length."
    return _line_chart("Score and rating by length", "tokens", "standard deviations", note, traces)


def _samples_chart(card: Mapping[str, Any]) -> Chart | None:
    histogram = section(section(card, "samples"), "histogram")
    edges = histogram.get("edges")
    if not edges:
        return None
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    traces = [
        {"name": name, "x": middles, "y": histogram[key]}
        for name, key in (("SFT policy's own", "samples"), ("training responses", "training"))
    ]
    note = "Where the two do not overlap, PPO starts outside the responses that the reward model was trained on."
    return _line_chart("Scores of responses", "score", "share of responses", note, traces)
