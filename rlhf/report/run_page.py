"""One page about a whole run: the gains of each stage, the course of PPO, the policy's answers, and how to read them.

`python -m rlhf.report RUN` writes `RUN/report.html` from the files that the stages left there; with several folders, or with
`-o FILE`, it compares them (`compare_page`). Nothing is measured here. Files that are missing or half-written are named on the
page, and the rest is still shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.errors import UserError
from rlhf.base.json_files import finite_number, section
from rlhf.report import kinds
from rlhf.report.card_page import card_section
from rlhf.report.charts import phase_charts, run_charts
from rlhf.report.compare_samples import gain
from rlhf.report.compare_tables import evaluated
from rlhf.report.figures import BEFORE_AND_AFTER, MINUS, NO_FIGURE, duration, flatten, number, percent
from rlhf.report.page import diagnoses, evenly_spaced, write_page
from rlhf.report.run_folder import STAGES, RunFolder, overlaps, read_run, series
from rlhf.run.metrics import LogRow
from rlhf.run.progress import format_seconds

SAMPLES_SHOWN = 20

Results = Mapping[str, Any]


def write_report(output_dir: str | Path) -> Path:
    """Write `output_dir/report.html` from the files of a run there, and return its path.

    Raises:
        UserError: there is no `results.json`, or it is not JSON.
    """
    run = read_run(Path(output_dir))
    results = run.results
    if not results:
        problem = next(
            (line for line in run.problems if line.startswith("results.json")), "results.json is missing or empty"
        )
        raise UserError(f"{run.folder}: {problem}; give the folder of a finished run, or run its last stage again")
    if (run.folder / "pretrain").is_dir():
        run.metrics = {"pretrain": run.read_rows("pretrain/metrics.jsonl", LogRow), **run.metrics}
    data_card = run.read_object("data/card.json", kinds.DataCard)
    charts, timing = run_charts(run.metrics), phase_charts(run.phases())
    reward_card = card_section(run.reward_card)
    plots = charts + timing + reward_card.get("charts", [])
    return write_page(
        run.folder / "report.html",
        "report.html.j2",
        plotted=bool(plots or reward_card),
        title="RLHF report",
        results={**dict.fromkeys(STAGES), **results},
        headline=_headline(results),
        stages=_boxes(run, data_card),
        compared=_comparison(section(results, "ppo")),
        health=diagnoses(run.folder),
        samples=[_sample(row) for row in evenly_spaced(run.samples, SAMPLES_SHOWN)],
        samples_total=len(run.samples),
        card=flatten(data_card),
        machine=flatten(section(results, "machine")),
        artifacts=section(results, "artifacts"),
        charts=charts,
        timing=timing,
        reward_card=reward_card,
        plots=plots,
        missing=_missing(run),
        evaluated=evaluated([run]) if run.evaluation else [],
        marks=overlaps([run]),
    )


def _missing(run: RunFolder) -> list[str]:
    """Return the problems of a run's files, and the files and figures that a whole run has and this one lacks."""
    files = [*(f"{stage}/metrics.jsonl" for stage in STAGES), "ppo/comparison.jsonl"]
    absent = [f"{name} is not there" for name in files if not (run.folder / name).is_file()]
    stages = [*(["pretrain"] if "pretrain" in run.metrics else []), *STAGES]
    silent = [f"results.json has nothing about {stage}" for stage in stages if not section(run.results, stage)]
    return list(dict.fromkeys([*run.problems, *absent, *silent]))


def print_results(results: Results) -> None:
    """Print the closing table on the terminal: each stage beside what it is to be compared with."""
    from rich.table import Table

    table = Table(title="Results", title_justify="left", caption_justify="left", show_edge=False, pad_edge=False)
    for column in ("stage", "measure", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for row in _table_rows(results):
        table.add_row(*row)
    seconds, memory = finite_number(results.get("total_seconds")), finite_number(results.get("peak_rss_gb"))
    total = f"{format_seconds(seconds)} in all" if seconds is not None else ""
    table.caption = ", ".join(filter(None, (total, f"{memory:.1f} GB of memory" if memory is not None else "")))
    screen.console().print(table)


def _table_rows(results: Results) -> list[tuple[str, str, str, str]]:
    """Return stage, measure, before and after; no rows without figures."""
    sft, reward, ppo = (section(results, stage) for stage in STAGES)
    bits = number(section(results, "pretrain").get("eval_bits_per_character"))
    rows = [
        ("pretraining", "held-out bits per character", "", bits),
        ("SFT", "held-out loss", number(sft.get("eval_loss_before")), number(sft.get("eval_loss_after"))),
        ("reward", "held-out accuracy", "", percent(reward.get("accuracy"))),
        ("reward", "  raters it never saw", "", percent(reward.get("accuracy_held_out_raters"))),
        ("reward", "  VADER, for comparison", "", percent(reward.get("vader_accuracy"))),
        ("reward", "  human ceiling", "", percent(reward.get("human_ceiling"))),
    ]
    rows += [("PPO", row["label"], row["before"], row["after"]) for row in _comparison(ppo)]
    return [row for row in rows if {row[2], row[3]} - {"", NO_FIGURE}]


def _headline(results: Results) -> str:
    """Return the outcome in a sentence or two; a judge that PPO never saw has the last word, where there is one."""
    ppo = section(results, "ppo")
    (old, new), kl = _before_after(ppo, "score"), finite_number(ppo.get("kl"))
    if old is None or new is None:
        return ""
    change = "raised" if new > old else "lowered" if new < old else "kept"
    text = f"PPO {change} the reward model's score on held-out prompts from {number(old)} to {number(new)}"
    text += f", {kl:.1f} nats away from the SFT model." if kl is not None else "."
    gold_old, gold_new = _before_after(ppo, "gold_positive")
    if gold_old is None or gold_new is None:
        return text
    judge = f" VADER, a judge it never saw, finds {gold_new:.0%} of the answers positive ({gold_old:.0%} before)."
    if new > old and gold_new <= gold_old:
        judge += " The score rose without the thing it stands for, which is over-optimisation."
    return text + judge


# The chain: a box for each stage, with its figure on a scale beside the marks that it is to be read against.


def _boxes(run: RunFolder, data_card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the boxes data -> (pretraining ->) SFT -> reward model -> PPO."""
    results = run.results
    pretrain = [_pretrain_box(results, run.metrics["pretrain"])] if "pretrain" in run.metrics else []
    return [_data_box(data_card, results), *pretrain, _sft_box(results), _reward_box(results), _ppo_box(results)]


def _data_box(card: Mapping[str, Any], results: Results) -> dict[str, Any]:
    rows = {str(name): finite_number(count) for name, count in section(card, "rows").items()}
    counts = [(name.removesuffix("/train"), f"{n:,.0f}") for name, n in rows.items() if name.endswith("/train") and n]
    counts = counts or [(name, value) for name, value in flatten(card) if value.replace(",", "").isdigit()][:4]
    pairs = finite_number(section(results, "reward").get("pairs"))
    if not counts and pairs is not None:
        counts = [("preference pairs", f"{pairs:,.0f}")]
    return {"name": "Data", "id": "data", "counts": counts}


def _pretrain_box(results: Results, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the box of pretraining; the figure of the fresh model is the first one logged."""
    pretrain = section(results, "pretrain")
    logged = series(log, "pretrain/eval_bits_per_character")
    box = _fall(logged[0][1] if logged else None, finite_number(pretrain.get("eval_bits_per_character")))
    what = "held-out bits per character; lower is better"
    return {"name": "Pretraining", "id": "pretrain", "what": what, "seconds": duration(pretrain.get("seconds")), **box}


def _sft_box(results: Results) -> dict[str, Any]:
    sft = section(results, "sft")
    box = _fall(*_before_after(sft, "eval_loss"))
    what = "held-out loss, nats per token; lower is better"
    return {"name": "SFT", "id": "sft", "what": what, "seconds": duration(sft.get("seconds")), **box}


def _fall(old: float | None, new: float | None) -> dict[str, Any]:
    """Return figure, ends and marks of a loss, on a scale from 0 to the larger of the two values."""
    top = max([value for value in (old, new) if value is not None] + [1e-9])
    marks = _marks(0, top, ("before", old, "base"), ("after", new, "main"))
    return {"figure": number(new), "low": "0", "high": number(top), "marks": marks}


def _reward_box(results: Results) -> dict[str, Any]:
    reward = section(results, "reward")
    marks = _marks(
        0.5, 1, ("reward model", finite_number(reward.get("accuracy")), "main"),
        ("raters it never saw", finite_number(reward.get("accuracy_held_out_raters")), "second"),
        ("VADER", finite_number(reward.get("vader_accuracy")), "base"),
        ("human ceiling", finite_number(reward.get("human_ceiling")), "ceiling"), text=percent,
    )  # fmt: skip
    return {
        "name": "Reward model", "id": "reward", "figure": percent(reward.get("accuracy")),
        "what": "held-out pairs ranked as people do", "low": "50% (a coin)", "high": "100%", "marks": marks,
        "seconds": duration(reward.get("seconds")),
    }  # fmt: skip


def _ppo_box(results: Results) -> dict[str, Any]:
    """Return the box of PPO: positive answers by a judge it never saw, or else the reward model's score."""
    ppo = section(results, "ppo")
    old, new = _before_after(ppo, "gold_positive")
    box = {"name": "PPO", "id": "ppo", "seconds": duration(ppo.get("seconds"))}
    if new is not None:
        marks = _marks(0, 1, ("SFT", old, "base"), ("PPO", new, "main"), text=percent)
        what = "of answers are positive, by VADER"
        return {**box, "figure": percent(new), "what": what, "low": "0%", "high": "100%", "marks": marks}
    old, new = _before_after(ppo, "score")
    values = [value for value in (old, new, 0.0) if value is not None]
    low, high = min(values), max([*values, min(values) + 1e-9])
    marks = _marks(low, high, ("SFT", old, "base"), ("PPO", new, "main"))
    what = "reward model's score on held-out prompts"
    return {**box, "figure": number(new), "what": what, "low": number(low), "high": number(high), "marks": marks}


def _marks(low: float, high: float, *marks: tuple[str, float | None, str], text: Any = number) -> list[dict[str, Any]]:
    """Return the place of each value on a scale from `low` to `high`, in percent of its width; missing values have none."""
    return [
        {"label": label, "text": text(value), "kind": kind,
         "at": round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 1)}
        for label, value, kind in marks if value is not None
    ]  # fmt: skip


def _before_after(stage: Results, name: str) -> tuple[float | None, float | None]:
    """Return a figure of the results before and after training."""
    return finite_number(stage.get(f"{name}_before")), finite_number(stage.get(f"{name}_after"))


def _comparison(ppo: Results) -> list[dict[str, str]]:
    """Return the table of SFT and PPO; a change has a verdict where one direction is known to be better."""
    rows = []
    for key, label, is_share, better, note in BEFORE_AND_AFTER:
        old, new = _before_after(ppo, key)
        if old is None and new is None:
            continue
        text = percent if is_share else number
        change, verdict = "", ""
        if old is not None and new is not None:
            change = f"{100 * (new - old):+.1f} pts" if is_share else f"{new - old:+.3g}"
            verdict = "" if not better or new == old else "good" if (new > old) == (better > 0) else "bad"
        rows.append({"label": label, "before": text(old), "after": text(new), "change": change.replace("-", MINUS),
                     "verdict": verdict, "note": note})  # fmt: skip
    if finite_number(ppo.get("kl")) is not None:
        note = "How far PPO went from the SFT model, in nats per answer."
        rows.append(
            {"label": "KL", "before": "0", "after": number(ppo["kl"]), "change": "", "verdict": "", "note": note}
        )
    return rows


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt with the answers of SFT and PPO, their scores and the gain."""
    sft, ppo = row.get("sft_score"), row.get("ppo_score")
    return {
        "prompt": str(row.get("prompt") or ""), "sft": str(row.get("sft_response") or "").strip(),
        "ppo": str(row.get("ppo_response") or "").strip(), "sft_score": finite_number(sft),
        "ppo_score": finite_number(ppo), "gain": gain(sft, ppo),
    }  # fmt: skip
