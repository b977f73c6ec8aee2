"""The report card in files, in W&B and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.run.tracker import Tracker

Card = dict[str, Any]


def figures(card: Card) -> dict[str, Any]:
    """Return the card's main figures, flat, for a manifest."""

    def value(name: str, part: str = "value") -> float | None:
        return None if card[name] is None else card[name][part]

    calibration, balanced = card["calibration"] or {}, card["length"]["balanced_accuracy"]
    return {
        "accuracy": value("accuracy"),
        "accuracy_low": value("accuracy", "low"),
        "accuracy_high": value("accuracy", "high"),
        "pairs": 0 if card["accuracy"] is None else card["accuracy"]["pairs"],
        "accuracy_held_out_prompts": value("accuracy_held_out_prompts"),
        "accuracy_held_out_raters": value("accuracy_held_out_raters"),
        "human_ceiling": value("human_ceiling"),
        "gold_accuracy": value("gold_accuracy"),
        "calibration_error": calibration.get("ece"),
        "temperature": calibration.get("temperature"),
        "length_balanced_accuracy": None if balanced is None else balanced["value"],
        "length_correlation": card["length"]["correlation"],
        "samples_outside": card["samples"]["outside"],
        "rivals_beaten": sum(line["beaten"] for line in card["rivals"]),
        "rivals": len(card["rivals"]),
        "flags": [flag["name"] for flag in card["flags"]],
        "verdict": card["verdict"],
    }


def save_card(card: Card, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `card.json` and `scores.jsonl` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "scores.jsonl").write_text(lines, encoding="utf-8")
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def log_card(card: Card, tracker: Tracker, step: int) -> None:
    """Log the main figures as metrics and the long parts as tables, in W&B and in the local record."""
    numbers = {f"card/{name}": value for name, value in figures(card).items() if isinstance(value, int | float)}
    tracker.log(numbers, step)
    tracker.log_table("card/accuracies", accuracy_rows(card), step)
    tracker.log_table(
        "card/probes", [{k: v for k, v in p.items() if k != "example"} | p["example"] for p in card["probes"]], step
    )
    tracker.log_table("card/flags", card["flags"], step)
    bins = (card["calibration"] or {}).get("bins", [])  # none where there was too little to calibrate
    tracker.log_scatter("card/reliability", bins, "confidence", "right", "Confidence and how often it is right", step)


def accuracy_rows(card: Card) -> list[dict[str, Any]]:
    """Return every accuracy of the card as a row `what`, `value`, `low`, `high`, `pairs`."""
    named = [
        ("held-out pairs", card["accuracy"]),
        ("prompts that are not in training", card["accuracy_held_out_prompts"]),
        ("held-out raters", card["accuracy_held_out_raters"]),
        ("people, on those raters (ceiling)", card["human_ceiling"]),
        ("pairs balanced by length", card["length"]["balanced_accuracy"]),
        ("independent scorer", card["gold_accuracy"]),
        *((f"rival: {line['name']}", line["accuracy"]) for line in card["rivals"]),
        *((f"{line['slice']}: {line['kind']}", line) for line in card["slices"]),
    ]
    return [
        {"what": what, **{part: figure[part] for part in ("value", "low", "high", "pairs")}}
        for what, figure in named
        if figure
    ]


def print_card(card: Card) -> None:
    """Print the card, its verdict first."""
    from rich.table import Table

    console = screen.console(highlight=False)
    console.print(card["verdict"], style="bold", markup=False)
    for flag in card["flags"]:
        console.print(f"! {flag['message']}", markup=False)
    for note in card["notes"]:
        console.print(note, markup=False)
    table = Table("accuracy", "", "95% interval", "pairs", show_edge=False, pad_edge=False)
    for line in accuracy_rows(card):
        low, high = line["low"], line["high"]
        between = "" if low is None else f"{low:.1%} to {high:.1%}"
        table.add_row(line["what"], f"{line['value']:.1%}", between, f"{line['pairs']:,}")
    console.print(table)
    table = Table("probe", "change, std", "raised", "", show_edge=False, pad_edge=False)
    for probe in card["probes"]:
        table.add_row(
            probe["name"], f"{probe['gain']:+.2f}", f"{probe['raised']:.0%}", "FLAGGED" if probe["flagged"] else ""
        )
    console.print(table)
    calibration, length, samples = card["calibration"], card["length"], card["samples"]
    if calibration:
        temperature = calibration["temperature"]
        fitted = "no temperature helps" if temperature is None else f"temperature {temperature:.2f}"
        console.print(f"calibration: off by {calibration['ece']:.1%} on average, {fitted}")
    if length["correlation"] is not None and length["label_correlation"] is not None:
        console.print(
            f"length: correlation {length['correlation']:+.2f} with scores, {length['label_correlation']:+.2f} with ratings"
        )
    console.print(
        f"the policy's own responses: mean {samples['samples']['mean']:+.2f}, training responses "
        f"{samples['training']['mean']:+.2f}; {samples['outside']:.0%} outside"
    )
