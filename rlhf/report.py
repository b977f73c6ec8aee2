"""One page about a whole run: what each stage gained, how PPO moved, what the policy says now, and how to read it.

`python -m rlhf.report RUN` makes `RUN/report.html` again from the files that the stages left there; with several folders, or
with `-o FILE`, it makes a page that compares them (`rlhf.comparison`). The page is a single file that opens from disk without a
network. It shows only what those files say: nothing is measured here. Parts that are missing or half-written are named on the
page, and the rest is still shown.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rlhf.errors import UserError, run_command
from rlhf.progress import format_seconds

STAGES = ("sft", "reward", "ppo")
"""Of every run; pretraining comes before them where a run has it."""
SAMPLES_SHOWN = 20
POINTS_PER_CURVE = 400
"""Enough for a plot 500 pixels wide; a run of 100,000 steps would make a page of many megabytes otherwise."""

MINUS, NO_FIGURE = "\N{MINUS SIGN}", "\N{EN DASH}"

Results = Mapping[str, Any]

# (figure in results["ppo"] without _before/_after, label, percent?, which way is better, what it is)
COMPARED = (
    ("score", "Reward model's score", False, 1, "What PPO is trained to raise."),
    ("reward_positive", "Answers the reward model likes", True, 1, "Share with a score above 0."),
    ("gold_positive", "Positive answers", True, 1, "Share that VADER, a judge PPO never saw, calls positive."),
    ("gold_negative", "Negative answers", True, -1, "Share that VADER calls negative."),
    ("distinct2", "Distinct word pairs", True, 0, "How varied the wording is. A collapse shows here first."),
    ("length", "Length in tokens", False, 0, "A reward model may like length for its own sake."),
    ("stop_rate", "Answers that end by themselves", True, 0, "The others were cut off at the limit."),
)


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


def write_report(output_dir: str | Path) -> Path:
    """Makes `output_dir/report.html` from `results.json` and whatever else is there, and returns its path.

    Raises:
        UserError: there is no `results.json`, or it is not JSON.
    """
    output_dir = Path(output_dir)
    from rlhf.comparison.runs import overlaps, read_run  # which build on this module
    from rlhf.comparison.tables import evaluated

    results, run = read_results(output_dir), read_run(output_dir)
    missing = [problem for problem in run.problems if problem.startswith("evaluation.json")]
    stages = ("pretrain", *STAGES) if (output_dir / "pretrain").is_dir() else STAGES
    metrics = {stage: _read_rows(output_dir / stage / "metrics.jsonl", missing) for stage in stages}
    samples = _read_rows(output_dir / "ppo" / "comparison.jsonl", missing)
    card = _read_card(output_dir / "data" / "card.json", missing)
    for stage in stages:
        if not _section(results, stage):
            missing.append(f"results.json has nothing about {stage}")
    charts = [drawn for chart in CHARTS if (drawn := _draw(chart, metrics))]
    timing = _timing_charts(results)
    reward_card = _card_section(_read_card(output_dir / "reward" / "card.json", missing))
    page = template("report.html.j2").render(
        title="RLHF report",
        results=results,
        headline=_headline(results),
        stages=_stage_cards(results, card, metrics),
        compared=_comparison_rows(_section(results, "ppo")),
        health=health(output_dir),
        samples=_pick_samples(samples),
        samples_total=len(samples),
        card=_flatten(card),
        machine=_flatten(_section(results, "machine")),
        artifacts=_section(results, "artifacts"),
        charts=charts,
        timing=timing,
        reward_card=reward_card,
        plots=charts + timing + reward_card.get("charts", []),
        missing=missing,
        evaluated=evaluated([run]) if run.evaluation else [],
        marks=overlaps([run]),
        plotly=_plotly_gzip_base64() if charts or timing or reward_card else "",
    )
    return _write_page(page, output_dir / "report.html")


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


def _write_page(page: str, file: Path) -> Path:
    partial = file.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(file)
    return file


def print_results(results: Results) -> None:
    """The closing table on the terminal: each stage against what it is to be compared with."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Results", title_justify="left", caption_justify="left", show_edge=False, pad_edge=False)
    for column in ("stage", "measure", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for row in _table_rows(results):
        table.add_row(*row)
    seconds, memory = _number(results.get("total_seconds")), _number(results.get("peak_rss_gb"))
    total = f"{format_seconds(seconds)} in all" if seconds is not None else ""
    table.caption = ", ".join(
        part for part in (total, f"{memory:.1f} GB of memory" if memory is not None else "") if part
    )
    Console().print(table)


def read_results(output_dir: Path) -> dict[str, Any]:
    """`results.json` of a run, with NaN and infinity as None."""
    file = output_dir / "results.json"
    if not file.is_file():
        raise UserError(f"{file} is not there; give the folder that a finished run wrote")
    try:
        # NaN is not JSON but Python writes it; to the page it is a figure that is not there.
        results = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable as JSON ({error}); run the last stage again to rewrite it") from error
    if not isinstance(results, dict):
        raise UserError(f"{file} holds a {type(results).__name__}, not an object")
    return results


def read_jsonl(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a `.jsonl` file, and how many lines are not JSON objects (a killed run leaves half a line)."""
    rows, bad = [], 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=lambda _: None)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad += 1
    return rows, bad


def _read_rows(file: Path, missing: list[str]) -> list[dict[str, Any]]:
    name = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        missing.append(f"{name} is not there")
        return []
    rows, bad = read_jsonl(file)
    if bad:
        missing.append(f"{name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    elif not rows:
        missing.append(f"{name} is empty")
    return rows


def _read_card(file: Path, missing: list[str]) -> dict[str, Any]:
    try:
        card = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return {}  # not missing: a run on the user's own files has no data card, and one of an older version no report card
    except (json.JSONDecodeError, UnicodeDecodeError):
        missing.append(f"{file.parent.name}/{file.name} is not readable as JSON")
        return {}
    return card if isinstance(card, dict) else {}


# --- What the page says ---------------------------------------------------------------------------------------------


def _headline(results: Results) -> str:
    """The outcome in a sentence or two. The judge that PPO never saw has the last word, when there is one."""
    ppo = _section(results, "ppo")
    before, after, kl = (_number(ppo.get(key)) for key in ("score_before", "score_after", "kl"))
    if before is None or after is None:
        return ""
    change = "raised" if after > before else "lowered" if after < before else "kept"
    text = f"PPO {change} the reward model's score on held-out prompts from {_text(before)} to {_text(after)}"
    text += f", {kl:.1f} nats away from the SFT model." if kl is not None else "."
    gold_before, gold_after = (_number(ppo.get(f"gold_positive_{when}")) for when in ("before", "after"))
    if gold_before is None or gold_after is None:
        return text
    judge = f" VADER, a judge it never saw, finds {gold_after:.0%} of the answers positive ({gold_before:.0%} before)."
    if after > before and gold_after <= gold_before:
        judge += " The score rose without the thing it stands for, which is over-optimisation."
    return text + judge


def _stage_cards(
    results: Results, card: Mapping[str, Any], metrics: Mapping[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The chain data -> (pretraining ->) SFT -> reward model -> PPO, each with its figure and the marks to read it against."""
    pretrain = [_pretrain_box(results, metrics["pretrain"])] if "pretrain" in metrics else []
    return [_data_box(card, results), *pretrain, _sft_box(results), _reward_box(results), _ppo_box(results)]


def _data_box(card: Mapping[str, Any], results: Results) -> dict[str, Any]:
    rows = {str(name): _number(count) for name, count in _section(card, "rows").items()}
    counts = [(name.removesuffix("/train"), f"{n:,.0f}") for name, n in rows.items() if name.endswith("/train") and n]
    counts = counts or [(name, value) for name, value in _flatten(card) if value.replace(",", "").isdigit()][:4]
    pairs = _number(_section(results, "reward").get("pairs"))
    if not counts and pairs is not None:
        counts = [("preference pairs", f"{pairs:,.0f}")]
    return {"name": "Data", "id": "data", "counts": counts}


def _pretrain_box(results: Results, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The log tells what a fresh model begins at."""
    pretrain, name = _section(results, "pretrain"), "eval_bits_per_character"
    before = next((bits for row in log if (bits := _number(row.get(f"pretrain/{name}"))) is not None), None)
    after = _number(pretrain.get(name))
    top = max([value for value in (before, after) if value is not None] + [1e-9])
    return {
        "name": "Pretraining", "id": "pretrain", "figure": _text(after),
        "what": "held-out bits per character; lower is better", "low": "0", "high": _text(top),
        "marks": _marks(0, top, ("before", before, "base"), ("after", after, "main")), "seconds": _seconds(pretrain),
    }  # fmt: skip


def _sft_box(results: Results) -> dict[str, Any]:
    sft = _section(results, "sft")
    before, after = _number(sft.get("eval_loss_before")), _number(sft.get("eval_loss_after"))
    top = max([value for value in (before, after) if value is not None] + [1e-9])
    return {
        "name": "SFT", "id": "sft", "figure": _text(after), "what": "held-out loss, nats per token; lower is better",
        "low": "0", "high": _text(top),
        "marks": _marks(0, top, ("before", before, "base"), ("after", after, "main")), "seconds": _seconds(sft),
    }  # fmt: skip


def _reward_box(results: Results) -> dict[str, Any]:
    reward = _section(results, "reward")
    accuracy, others, ceiling, vader = (
        _number(reward.get(key)) for key in ("accuracy", "accuracy_held_out_raters", "human_ceiling", "vader_accuracy")
    )
    return {
        "name": "Reward model", "id": "reward", "figure": _percent(accuracy),
        "what": "held-out pairs ranked as people do",
        "low": "50% (a coin)", "high": "100%",
        "marks": _marks(
            0.5, 1, ("reward model", accuracy, "main"), ("raters it never saw", others, "second"),
            ("VADER", vader, "base"), ("human ceiling", ceiling, "ceiling"), text=_percent,
        ),
        "seconds": _seconds(reward),
    }  # fmt: skip


def _ppo_box(results: Results) -> dict[str, Any]:
    """On the user's own data there is no judge that PPO never saw; then the reward model's score has to do."""
    ppo = _section(results, "ppo")
    before, after = _number(ppo.get("gold_positive_before")), _number(ppo.get("gold_positive_after"))
    box = {"name": "PPO", "id": "ppo", "seconds": _seconds(ppo)}
    if after is not None:
        marks = _marks(0, 1, ("SFT", before, "base"), ("PPO", after, "main"), text=_percent)
        what = "of answers are positive, says VADER"
        return {**box, "figure": _percent(after), "what": what, "low": "0%", "high": "100%", "marks": marks}
    before, after = _number(ppo.get("score_before")), _number(ppo.get("score_after"))
    known = [value for value in (before, after, 0.0) if value is not None]
    low, high = min(known), max([*known, min(known) + 1e-9])
    marks = _marks(low, high, ("SFT", before, "base"), ("PPO", after, "main"))
    what = "reward model's score on held-out prompts"
    return {**box, "figure": _text(after), "what": what, "low": _text(low), "high": _text(high), "marks": marks}


def _marks(low: float, high: float, *marks: tuple[str, float | None, str], text: Any = None) -> list[dict[str, Any]]:
    """Where each known value sits on a scale from `low` to `high`, in percent of its width."""
    return [
        {"label": label, "text": (text or _text)(value), "kind": kind,
         "at": round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 1)}
        for label, value, kind in marks if value is not None
    ]  # fmt: skip


def _comparison_rows(ppo: Results) -> list[dict[str, str]]:
    """The table of before (SFT) and after (PPO). Changes are called good or bad only where that is known."""
    rows = []
    for key, label, percent, better, note in COMPARED:
        before, after = _number(ppo.get(f"{key}_before")), _number(ppo.get(f"{key}_after"))
        if before is None and after is None:
            continue
        text = _percent if percent else _text
        change, verdict = "", ""
        if before is not None and after is not None:
            change = f"{100 * (after - before):+.1f} pts" if percent else f"{after - before:+.3g}"
            verdict = "" if not better or after == before else "good" if (after > before) == (better > 0) else "bad"
        rows.append({"label": label, "before": text(before), "after": text(after), "change": change.replace("-", MINUS),
                     "verdict": verdict, "note": note})  # fmt: skip
    kl = _number(ppo.get("kl"))
    if kl is not None:
        note = "How far PPO went from the SFT model, in nats per answer."
        rows.append({"label": "KL", "before": "0", "after": _text(kl), "change": "", "verdict": "", "note": note})
    return rows


def health(output_dir: Path) -> list[dict[str, Any]]:
    """What the doctor finds in the stages' logs; nothing of a stage without any."""
    from rlhf.doctor.diagnosis import diagnose

    try:
        diagnoses = diagnose(output_dir)
    except UserError:
        return []  # what is missing is said at the top of the page
    return [
        {
            "stage": one.stage,
            "checks": one.checks,
            "updates": one.updates,
            "findings": [
                {
                    "name": finding.check.name.replace("_", " "),
                    "severity": finding.check.severity,
                    "updates": f"{finding.first}"
                    if finding.first == finding.last
                    else f"{finding.first} to {finding.last}",
                    "evidence": finding.evidence,
                    "cause": finding.check.cause,
                    "action": finding.check.action,
                }
                for finding in one.findings
            ],
        }
        for one in diagnoses
    ]


def _table_rows(results: Results) -> list[tuple[str, str, str, str]]:
    sft, reward, ppo = (_section(results, stage) for stage in STAGES)
    bits = _number(_section(results, "pretrain").get("eval_bits_per_character"))
    rows = [
        ("pretraining", "held-out bits per character", "", _text(bits)),
        (
            "SFT",
            "held-out loss",
            _text(_number(sft.get("eval_loss_before"))),
            _text(_number(sft.get("eval_loss_after"))),
        ),
    ]
    for key, label in (
        ("accuracy", "held-out accuracy"), ("accuracy_held_out_raters", "  raters it never saw"),
        ("vader_accuracy", "  VADER, for comparison"), ("human_ceiling", "  human ceiling"),
    ):  # fmt: skip
        rows.append(("reward", label, "", _percent(_number(reward.get(key)))))
    rows += [("PPO", row["label"], row["before"], row["after"]) for row in _comparison_rows(ppo)]
    return [row for row in rows if row[2] not in ("", NO_FIGURE) or row[3] not in ("", NO_FIGURE)]


def _pick_samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Evenly spaced over the file: a choice by score would show the best and hide the rest."""
    count = min(SAMPLES_SHOWN, len(rows))
    picked = []
    for index in range(count):
        row = rows[index * len(rows) // count]
        before, after = _number(row.get("sft_score")), _number(row.get("ppo_score"))
        gain = after - before if before is not None and after is not None else None
        picked.append({
            "prompt": str(row.get("prompt") or ""), "sft": str(row.get("sft_response") or "").strip(),
            "ppo": str(row.get("ppo_response") or "").strip(), "sft_score": before, "ppo_score": after, "gain": gain,
        })  # fmt: skip
    return picked


# --- The reward model's report card ---------------------------------------------------------------------------------


def _card_section(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a report card, numbers as text and plots as traces; nothing of a card that is not there."""
    if not card:
        return {}
    probes = [
        {
            **probe,
            **_section(probe, "example"),
            "gain": _number(probe.get("gain")),
            "raised": _percent(_number(probe.get("raised"))),
        }
        for probe in _list(card, "probes")
    ]
    left_out = [
        f"{split}: {entry.get('count')} {reason} (rows {', '.join(map(str, entry.get('rows', [])[:5]))})"
        for split, reasons in _section(card, "left_out").items()
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
        "flags": _list(card, "flags"),
        "notes": card.get("notes") or [],
        "facts": _card_facts(card),
        "probes": probes,
        "examples": _list(_section(card, "samples"), "examples"),
        "left_out": left_out,
        "charts": [chart for chart in charts if chart],
    }


def _card_facts(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    calibration, length, samples = (_section(card, name) for name in ("calibration", "length", "samples"))
    facts = [
        ("Calibration error", _percent(_number(calibration.get("ece"))),
         "Distance of its probabilities from how often it is right."),
        ("Temperature", _text(_number(calibration.get("temperature"))),
         "1 is calibrated. Above 1: it is too sure of itself."),
        ("Length and score", _text(_number(length.get("correlation"))), "Rank correlation within a prompt."),
        ("Length and rating", _text(_number(length.get("label_correlation"))), "The same of what people think."),
        ("Responses outside", _percent(_number(samples.get("outside"))),
         "Of the SFT policy's own: beyond the scores of 98% of the training responses."),
    ]  # fmt: skip
    return [fact for fact in facts if fact[1] != NO_FIGURE]


def _accuracy_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    length = _section(card, "length")
    lines = [
        ("held-out pairs", card.get("accuracy")),
        ("new prompts", card.get("accuracy_held_out_prompts")),
        ("raters it never saw", card.get("accuracy_held_out_raters")),
        ("human ceiling", card.get("human_ceiling")),
        ("balanced by length", length.get("balanced_accuracy")),
        ("independent scorer", card.get("gold_accuracy")),
        *((str(line.get("name")), line.get("accuracy")) for line in _list(card, "rivals")),
    ]
    return _intervals(
        "Accuracy, and what to hold it against", lines, "The bar is the 95% interval over prompts. 0.5 is a coin."
    )


def _slices_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    lines = [(f"{line.get('slice')}: {line.get('kind')}", line) for line in _list(card, "slices")]
    return _intervals("Accuracy by kind of pair", lines, "Where it is right, and where it guesses.")


def _intervals(title: str, lines: Sequence[tuple[str, Any]], note: str) -> dict[str, Any] | None:
    """Shares with their intervals, one below the other."""
    known = [
        (label, line) for label, line in lines if isinstance(line, Mapping) and _number(line.get("value")) is not None
    ]
    if not known:
        return None

    def reach(line: Mapping[str, Any], end: str) -> float:
        value, bound = float(line["value"]), _number(line.get(end))
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
    bins = _list(_section(card, "calibration"), "bins")
    if not bins:
        return None
    traces = [
        {"name": "model", "x": [b["confidence"] for b in bins], "y": [b["right"] for b in bins]},
        {"name": "calibrated", "x": [0.5, 1.0], "y": [0.5, 1.0]},
    ]
    note = "Across: the probability it gives the answer it prefers. Up: how often people prefer it. Below the line: too sure."
    return {"title": "Reliability", "unit": "", "note": note, "kind": "lines", "traces": traces}


def _length_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    curve = _list(_section(card, "length"), "curve")
    if not curve:
        return None
    lengths = [point["length"] for point in curve]
    traces = [{"name": name, "x": lengths, "y": [point[name] for point in curve]} for name in ("score", "rating")]
    note = "Across: tokens. Up: standard deviations. A score that climbs where ratings do not is a taste for length."
    return {"title": "Score and rating by length", "unit": "", "note": note, "kind": "lines", "traces": traces}


def _samples_chart(card: Mapping[str, Any]) -> dict[str, Any] | None:
    histogram = _section(_section(card, "samples"), "histogram")
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


def _list(tree: Mapping[str, Any], name: str) -> list[Any]:
    entry = tree.get(name)
    return entry if isinstance(entry, list) else []


# --- Plots ----------------------------------------------------------------------------------------------------------


def _draw(chart: Chart, metrics: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    traces = []
    for stage, metric, label in chart.curves:
        rows = metrics.get(stage, [])
        points = [(row.get("step"), value) for row in rows if (value := _number(row.get(metric))) is not None]
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
            if (value := _number(row.get(key))) is not None
        ]
        if bars:
            trace = {"name": title, "x": [value for _, value in bars], "y": [label for label, _ in bars]}
            charts.append({"title": title, "unit": unit, "note": "", "kind": "bars", "traces": [trace]})
    return charts


@cache
def _plotly_gzip_base64() -> str:
    """plotly.js, 4.8 MB, as 2 MB of text, which the page inflates itself (`DecompressionStream`)."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), compresslevel=9, mtime=0)).decode("ascii")


# --- Small things ---------------------------------------------------------------------------------------------------


def template(name: str) -> Any:
    """A page's template, which can show figures, scores and durations."""
    from jinja2 import Environment, PackageLoader

    # autoescape is what keeps a <script> in a model's answer from running; no value is ever marked safe
    environment = Environment(loader=PackageLoader("rlhf"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(text=_text, score=_score, duration=_duration)
    return environment.get_template(name)


def _section(results: Results, name: str) -> dict[str, Any]:
    section = results.get(name)
    return section if isinstance(section, dict) else {}


def _number(value: Any) -> float | None:
    """The value if it is a finite number, else None; figures may be null, absent, or NaN in a run that diverged."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(value: float | None) -> str:
    if value is None:
        return NO_FIGURE
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", MINUS)


def _score(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:.2f}".replace("-", MINUS)


def _percent(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:.1%}"


def _duration(value: Any) -> str:
    seconds = _number(value)
    return NO_FIGURE if seconds is None else format_seconds(seconds)


def _seconds(section: Results) -> str:
    return _duration(section.get("seconds"))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as lines for a table: `{"prompts": {"train": 900}}` -> `[("prompts · train", "900")]`."""
    lines: list[tuple[str, str]] = []
    for name, value in tree.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{label} · ")
        elif isinstance(value, bool | str):
            lines.append((label, str(value)))
        elif isinstance(value, int | float):
            lines.append((label, f"{value:,}" if isinstance(value, int) else _text(_number(value))))
        elif isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
            lines.append((label, ", ".join(str(entry) for entry in value)))
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m rlhf.report --help)")


def main() -> None:
    """`python -m rlhf.report RUN` or `python -m rlhf.report RUN RUN ... -o FILE`"""
    parser = _Parser(prog="python -m rlhf.report", description="Reports of one run or of several.", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that a run wrote, with results.json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="compare the runs on one page, written here")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="where manifests are, if not in the runs' folders")
    parser.add_argument(
        "--force", action="store_true", help="compare runs with other prompts or reward models; the page says so"
    )
    arguments = parser.parse_args()
    if arguments.output is None and len(arguments.runs) == 1:
        print(write_report(arguments.runs[0]))
        return
    if arguments.output is None:
        raise UserError("say where the page goes that compares the runs: -o FILE, e.g. -o comparison.html")
    from rlhf.comparison import write_comparison  # which builds on this module

    print(write_comparison(arguments.runs, arguments.output, registry=arguments.registry, force=arguments.force))


if __name__ == "__main__":
    run_command(main)
