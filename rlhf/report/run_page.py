"""One page about a whole run: what each stage gained, how PPO moved, what the policy says now, and how to read it.

`python -m rlhf.report RUN` makes `RUN/report.html` again from the files that the stages left there; with several folders, or
with `-o FILE`, it makes a page that compares them (`compare_page`). The page is a single file that opens from disk without a
network. It shows only what those files say: nothing is measured here. Parts that are missing or half-written are named on the
page, and the rest is still shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base.json_files import finite_number, section
from rlhf.report.card_page import _card_section
from rlhf.report.charts import CHARTS, _draw, _timing_charts
from rlhf.report.compare_runs import overlaps, read_run
from rlhf.report.compare_tables import evaluated
from rlhf.report.figures import (
    COMPARED,
    MINUS,
    NO_FIGURE,
    STAGES,
    Results,
    _flatten,
    _percent,
    _read_card,
    _read_rows,
    _seconds,
    _text,
    read_results,
)
from rlhf.report.health import health
from rlhf.report.page import _plotly_gzip_base64, _write_page, template
from rlhf.run.progress import format_seconds

SAMPLES_SHOWN = 20


def write_report(output_dir: str | Path) -> Path:
    """Makes `output_dir/report.html` from `results.json` and whatever else is there, and returns its path.

    Raises:
        UserError: there is no `results.json`, or it is not JSON.
    """
    output_dir = Path(output_dir)

    results, run = read_results(output_dir), read_run(output_dir)
    missing = [problem for problem in run.problems if problem.startswith("evaluation.json")]
    stages = ("pretrain", *STAGES) if (output_dir / "pretrain").is_dir() else STAGES
    metrics = {stage: _read_rows(output_dir / stage / "metrics.jsonl", missing) for stage in stages}
    samples = _read_rows(output_dir / "ppo" / "comparison.jsonl", missing)
    card = _read_card(output_dir / "data" / "card.json", missing)
    for stage in stages:
        if not section(results, stage):
            missing.append(f"results.json has nothing about {stage}")
    charts = [drawn for chart in CHARTS if (drawn := _draw(chart, metrics))]
    timing = _timing_charts(results)
    reward_card = _card_section(_read_card(output_dir / "reward" / "card.json", missing))
    page = template("report.html.j2").render(
        title="RLHF report",
        results=results,
        headline=_headline(results),
        stages=_stage_cards(results, card, metrics),
        compared=_comparison_rows(section(results, "ppo")),
        health=health(output_dir),
        samples=_pick_samples(samples),
        samples_total=len(samples),
        card=_flatten(card),
        machine=_flatten(section(results, "machine")),
        artifacts=section(results, "artifacts"),
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


def print_results(results: Results) -> None:
    """The closing table on the terminal: each stage against what it is to be compared with."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Results", title_justify="left", caption_justify="left", show_edge=False, pad_edge=False)
    for column in ("stage", "measure", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for row in _table_rows(results):
        table.add_row(*row)
    seconds, memory = finite_number(results.get("total_seconds")), finite_number(results.get("peak_rss_gb"))
    total = f"{format_seconds(seconds)} in all" if seconds is not None else ""
    table.caption = ", ".join(
        part for part in (total, f"{memory:.1f} GB of memory" if memory is not None else "") if part
    )
    Console().print(table)


def _headline(results: Results) -> str:
    """The outcome in a sentence or two. The judge that PPO never saw has the last word, when there is one."""
    ppo = section(results, "ppo")
    before, after, kl = (finite_number(ppo.get(key)) for key in ("score_before", "score_after", "kl"))
    if before is None or after is None:
        return ""
    change = "raised" if after > before else "lowered" if after < before else "kept"
    text = f"PPO {change} the reward model's score on held-out prompts from {_text(before)} to {_text(after)}"
    text += f", {kl:.1f} nats away from the SFT model." if kl is not None else "."
    gold_before, gold_after = (finite_number(ppo.get(f"gold_positive_{when}")) for when in ("before", "after"))
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
    rows = {str(name): finite_number(count) for name, count in section(card, "rows").items()}
    counts = [(name.removesuffix("/train"), f"{n:,.0f}") for name, n in rows.items() if name.endswith("/train") and n]
    counts = counts or [(name, value) for name, value in _flatten(card) if value.replace(",", "").isdigit()][:4]
    pairs = finite_number(section(results, "reward").get("pairs"))
    if not counts and pairs is not None:
        counts = [("preference pairs", f"{pairs:,.0f}")]
    return {"name": "Data", "id": "data", "counts": counts}


def _pretrain_box(results: Results, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The log tells what a fresh model begins at."""
    pretrain, name = section(results, "pretrain"), "eval_bits_per_character"
    before = next((bits for row in log if (bits := finite_number(row.get(f"pretrain/{name}"))) is not None), None)
    after = finite_number(pretrain.get(name))
    top = max([value for value in (before, after) if value is not None] + [1e-9])
    return {
        "name": "Pretraining", "id": "pretrain", "figure": _text(after),
        "what": "held-out bits per character; lower is better", "low": "0", "high": _text(top),
        "marks": _marks(0, top, ("before", before, "base"), ("after", after, "main")), "seconds": _seconds(pretrain),
    }  # fmt: skip


def _sft_box(results: Results) -> dict[str, Any]:
    sft = section(results, "sft")
    before, after = finite_number(sft.get("eval_loss_before")), finite_number(sft.get("eval_loss_after"))
    top = max([value for value in (before, after) if value is not None] + [1e-9])
    return {
        "name": "SFT", "id": "sft", "figure": _text(after), "what": "held-out loss, nats per token; lower is better",
        "low": "0", "high": _text(top),
        "marks": _marks(0, top, ("before", before, "base"), ("after", after, "main")), "seconds": _seconds(sft),
    }  # fmt: skip


def _reward_box(results: Results) -> dict[str, Any]:
    reward = section(results, "reward")
    accuracy, others, ceiling, vader = (
        finite_number(reward.get(key))
        for key in ("accuracy", "accuracy_held_out_raters", "human_ceiling", "vader_accuracy")
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
    ppo = section(results, "ppo")
    before, after = finite_number(ppo.get("gold_positive_before")), finite_number(ppo.get("gold_positive_after"))
    box = {"name": "PPO", "id": "ppo", "seconds": _seconds(ppo)}
    if after is not None:
        marks = _marks(0, 1, ("SFT", before, "base"), ("PPO", after, "main"), text=_percent)
        what = "of answers are positive, says VADER"
        return {**box, "figure": _percent(after), "what": what, "low": "0%", "high": "100%", "marks": marks}
    before, after = finite_number(ppo.get("score_before")), finite_number(ppo.get("score_after"))
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
        before, after = finite_number(ppo.get(f"{key}_before")), finite_number(ppo.get(f"{key}_after"))
        if before is None and after is None:
            continue
        text = _percent if percent else _text
        change, verdict = "", ""
        if before is not None and after is not None:
            change = f"{100 * (after - before):+.1f} pts" if percent else f"{after - before:+.3g}"
            verdict = "" if not better or after == before else "good" if (after > before) == (better > 0) else "bad"
        rows.append({"label": label, "before": text(before), "after": text(after), "change": change.replace("-", MINUS),
                     "verdict": verdict, "note": note})  # fmt: skip
    kl = finite_number(ppo.get("kl"))
    if kl is not None:
        note = "How far PPO went from the SFT model, in nats per answer."
        rows.append({"label": "KL", "before": "0", "after": _text(kl), "change": "", "verdict": "", "note": note})
    return rows


def _pick_samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Evenly spaced over the file: a choice by score would show the best and hide the rest."""
    count = min(SAMPLES_SHOWN, len(rows))
    picked = []
    for index in range(count):
        row = rows[index * len(rows) // count]
        before, after = finite_number(row.get("sft_score")), finite_number(row.get("ppo_score"))
        gain = after - before if before is not None and after is not None else None
        picked.append({
            "prompt": str(row.get("prompt") or ""), "sft": str(row.get("sft_response") or "").strip(),
            "ppo": str(row.get("ppo_response") or "").strip(), "sft_score": before, "ppo_score": after, "gain": gain,
        })  # fmt: skip
    return picked


def _table_rows(results: Results) -> list[tuple[str, str, str, str]]:
    sft, reward, ppo = (section(results, stage) for stage in STAGES)
    bits = finite_number(section(results, "pretrain").get("eval_bits_per_character"))
    rows = [
        ("pretraining", "held-out bits per character", "", _text(bits)),
        (
            "SFT",
            "held-out loss",
            _text(finite_number(sft.get("eval_loss_before"))),
            _text(finite_number(sft.get("eval_loss_after"))),
        ),
    ]
    for key, label in (
        ("accuracy", "held-out accuracy"), ("accuracy_held_out_raters", "  raters it never saw"),
        ("vader_accuracy", "  VADER, for comparison"), ("human_ceiling", "  human ceiling"),
    ):  # fmt: skip
        rows.append(("reward", label, "", _percent(finite_number(reward.get(key)))))
    rows += [("PPO", row["label"], row["before"], row["after"]) for row in _comparison_rows(ppo)]
    return [row for row in rows if row[2] not in ("", NO_FIGURE) or row[3] not in ("", NO_FIGURE)]
