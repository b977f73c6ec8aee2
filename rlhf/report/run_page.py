"""One page about a run, whole or half, or about a single stage: the first screen, and all that stands behind it.

`rlhf report RUN` writes `RUN/report.html` from the files that the stages left there; with several folders, or with `-o FILE`, it
compares them (`compare_page`). Nothing is measured here. Files that are missing or half-written are named on the page, and the
rest is still shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.errors import UserError
from rlhf.base.json_files import finite_number, section
from rlhf.registry.outcome import outcome
from rlhf.report import first_screen, kinds, samples
from rlhf.report.card_page import card_section
from rlhf.report.charts import phase_charts, run_charts
from rlhf.report.compare_tables import evaluated
from rlhf.report.figures import duration, flatten, number, percent
from rlhf.report.first_screen import before_after
from rlhf.report.page import diagnoses, evenly_spaced, write_page
from rlhf.report.run_folder import TITLES, RunFolder, judge_of, overlaps, read_parents, read_run, series
from rlhf.run.progress import format_seconds

Results = Mapping[str, Any]


def write_report(output_dir: str | Path, registry: Path | None = None) -> Path:
    """Write `output_dir/report.html` from the files of a run or of a stage there, and return its path.

    Args:
        registry: where the stages are looked up that this one was made from; default: that of its options.

    Raises:
        UserError: there is no file of a run in the folder, or none that can be read.
    """
    run = read_run(Path(output_dir), registry)
    if not run.stages and not run.results:
        problem = next(
            (line for line in run.problems if line.startswith("results.json")), "no stage has logged anything"
        )
        raise UserError(f"{run.folder}: {problem}; give the folder of a run, or run its last stage again")
    read_parents(run, registry)
    data_card = _data_card(run)
    findings, answers = diagnoses(run), samples.own_samples(run)
    reward_card = card_section(run.reward_card)
    charts = [*run_charts(run.metrics), *phase_charts(run.phases()), *reward_card.pop("charts", [])]
    machine = {**section(run.results, "machine"), **_seed(run)}
    return write_page(
        run.folder / "report.html",
        "report.html.j2",
        title=_title(run),
        facts=_facts(run),
        task=first_screen.task(run),
        data=first_screen.data_name(run, data_card),
        base_model=first_screen.base_model(run),
        verdict=first_screen.verdict(run, findings),
        tiles=first_screen.tiles(run),
        examples=samples.examples(answers),
        rule=samples.example_rule(answers),
        stages=_boxes(run, data_card),
        compared=first_screen.compared(run),
        ppo=run.figures("ppo"),
        judge=judge_of(run) if run.figures("ppo").get("gold_positive_after") is not None else "",
        health=findings,
        samples=evenly_spaced(answers, samples.RUN_SHOWN),
        samples_total=len(answers),
        data_card=flatten(data_card),
        machine=flatten(machine),
        artifacts=[
            (stage, reference, run.source(stage)) for stage in run.stages if (reference := _reference(run, stage))
        ],
        charts=charts,
        reward_card=reward_card,
        missing=_missing(run),
        evaluated=evaluated([run]) if run.evaluation else [],
        marks=overlaps([run]),
    )


def _title(run: RunFolder) -> str:
    """Return the artefact of the last stage, or else the folder's name."""
    return next((ref for stage in reversed(run.stages) if (ref := _reference(run, stage))), run.folder.absolute().name)


def _reference(run: RunFolder, stage: str) -> str:
    manifest = run.manifests.get(stage, {})
    registered = f"{stage}/{manifest['name']}@{manifest.get('version')}" if manifest.get("name") else ""
    return str(run.artifact(stage).get("reference") or registered)


def _facts(run: RunFolder) -> list[str]:
    """Return date, time and memory of the run for the line above its title."""
    dates = [str(manifest["created"]) for manifest in run.manifests.values() if manifest.get("created")]
    created = str(run.results.get("created") or max(dates, default=""))
    own = finite_number(run.results.get("total_seconds"))
    seconds = own or sum(finite_number(run.figures(stage).get("seconds")) or 0 for stage in run.stages)
    memory = max(
        (peak for row in run.phases() if (peak := finite_number(row.get("peak_rss_gb"))) is not None), default=None
    )
    facts = [created.replace("T", " ").replace("+00:00", " UTC"), f"{duration(seconds)} in all" if seconds else ""]
    return [*filter(None, facts), *([f"{number(memory)} GB of memory"] if memory is not None else [])]


def _seed(run: RunFolder) -> dict[str, Any]:
    seeds = [run.results.get("seed"), *(run.config(stage).get("seed") for stage in reversed(run.stages))]
    return next(({"seed": seed} for seed in seeds if isinstance(seed, int)), {})


def _data_card(run: RunFolder) -> dict[str, Any]:
    """Return the card of the prepared data: of the run's folder, or else of the folder that its options name."""
    if card := run.read_object("data/card.json", kinds.DataCard):
        return card
    datasets = [str(value) for stage in reversed(run.stages) if (value := run.config(stage).get("dataset"))]
    folders = [Path(dataset) for dataset in datasets if Path(dataset, "card.json").is_file()]
    return RunFolder(folders[0]).read_object("card.json", kinds.DataCard) if folders else {}


def _missing(run: RunFolder) -> list[str]:
    """Return the problems of a run's files, and the files and figures that a whole run has and this one lacks."""
    absent = [f"{TITLES[stage]}: no folder {stage}" for stage in run.expected if stage not in run.places]
    if "ppo" in run.places and not (run.places["ppo"] / "comparison.jsonl").is_file():
        absent.append("ppo/comparison.jsonl is not there")
    silent = [f"results.json has nothing about {stage}" for stage in dict.fromkeys([*run.expected, *run.places])
              if run.results and not section(run.results, stage)]  # fmt: skip
    return list(dict.fromkeys([*run.problems, *absent, *silent]))


def print_results(results: Results) -> None:
    """Print the closing table on the terminal: each stage beside what it is to be compared with."""
    from rich.table import Table

    table = Table(title="Results", title_justify="left", caption_justify="left", show_edge=False, pad_edge=False)
    for column in ("stage", "measure", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for stage, title in TITLES.items():
        figures = section(results, stage)
        for row in outcome(stage, {**figures, "gold_accuracy": figures.get("vader_accuracy")}):
            table.add_row(title, *row)
    seconds, memory = finite_number(results.get("total_seconds")), finite_number(results.get("peak_rss_gb"))
    total = f"{format_seconds(seconds)} in all" if seconds is not None else ""
    table.caption = ", ".join(filter(None, (total, f"{memory:.1f} GB of memory" if memory is not None else "")))
    screen.console().print(table)


# The chain: a box for each stage, with its figure on a scale beside the marks that it is to be read against.


def _boxes(run: RunFolder, data_card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the boxes data -> (pretraining ->) SFT -> reward model -> PPO of the stages that ran or are to come."""
    makers = {"pretrain": _pretrain_box, "sft": _sft_box, "reward": _reward_box, "ppo": _ppo_box}
    boxes = [_data_box(run, data_card)]
    for stage, maker in makers.items():
        if stage in run.stages or stage in run.expected or section(run.results, stage):
            place = run.places.get(stage)
            note = "" if place and place.is_relative_to(run.folder) else _reference(run, stage)
            logged = len({row.get("step") for row in run.metrics.get(stage, [])})
            state = "" if run.figures(stage) else f"no result yet, {logged} updates logged" if logged else "not there"
            seconds = duration(run.figures(stage).get("seconds"))
            boxes.append(
                {"name": TITLES[stage], "id": stage, "seconds": seconds, "from": note, "state": state, **maker(run)}
            )
    return boxes


def _data_box(run: RunFolder, card: Mapping[str, Any]) -> dict[str, Any]:
    rows = {str(name): finite_number(count) for name, count in section(card, "rows").items()}
    counts = [(name.removesuffix("/train"), f"{n:,.0f}") for name, n in rows.items() if name.endswith("/train") and n]
    counts = counts or [(name, value) for name, value in flatten(card) if value.replace(",", "").isdigit()][:4]
    used = [(TITLES[stage], finite_number(section(section(manifest, "data"), "rows").get("train")))
            for stage, manifest in run.manifests.items()]  # fmt: skip
    counts = counts or [(f"rows for {name}", f"{count:,.0f}") for name, count in used if count]
    pairs = finite_number(run.figures("reward").get("pairs"))
    if not counts and pairs is not None:
        counts = [("preference pairs", f"{pairs:,.0f}")]
    return {"name": "Data", "id": "data", "counts": counts}


def _pretrain_box(run: RunFolder) -> dict[str, Any]:
    """Return the box of pretraining; the figure of the fresh model is the first one logged."""
    logged = series(run.metrics.get("pretrain", []), "pretrain/eval_bits_per_character")
    last = finite_number(run.figures("pretrain").get("eval_bits_per_character"))
    return {"what": "held-out bits per character; lower is better", **_fall(logged[0][1] if logged else None, last)}


def _sft_box(run: RunFolder) -> dict[str, Any]:
    what = "held-out loss, nats per token; lower is better"
    return {"what": what, **_fall(*before_after(run.figures("sft"), "eval_loss"))}


def _fall(old: float | None, new: float | None) -> dict[str, Any]:
    """Return figure, ends and marks of a loss, on a scale from 0 to the larger of the two values."""
    top = max([value for value in (old, new) if value is not None] + [1e-9])
    marks = _marks(0, top, ("before", old, "base"), ("after", new, "main"))
    return {"figure": number(new), "low": "0", "high": number(top), "marks": marks}


def _reward_box(run: RunFolder) -> dict[str, Any]:
    reward = run.figures("reward")
    marks = _marks(
        0.5, 1, ("reward model", finite_number(reward.get("accuracy")), "main"),
        ("raters it never saw", finite_number(reward.get("accuracy_held_out_raters")), "second"),
        (judge_of(run), finite_number(reward.get("vader_accuracy", reward.get("gold_accuracy"))), "base"),
        ("human ceiling", finite_number(reward.get("human_ceiling")), "ceiling"), text=percent,
    )  # fmt: skip
    what, accuracy = "held-out pairs ranked as people do", percent(reward.get("accuracy"))
    return {"figure": accuracy, "what": what, "low": "50% (a coin)", "high": "100%", "marks": marks}


def _ppo_box(run: RunFolder) -> dict[str, Any]:
    """Return the box of PPO: positive answers by a judge it never saw, or else the reward model's score."""
    ppo = run.figures("ppo")
    old, new = before_after(ppo, "gold_positive")
    if new is not None:
        marks = _marks(0, 1, ("SFT", old, "base"), ("PPO", new, "main"), text=percent)
        what = f"of answers are positive, by {judge_of(run)}"
        return {"figure": percent(new), "what": what, "low": "0%", "high": "100%", "marks": marks}
    old, new = before_after(ppo, "score")
    values = [value for value in (old, new, 0.0) if value is not None]
    low, high = min(values), max([*values, min(values) + 1e-9])
    marks = _marks(low, high, ("SFT", old, "base"), ("PPO", new, "main"))
    what = "reward model's score on held-out prompts"
    return {"figure": number(new), "what": what, "low": number(low), "high": number(high), "marks": marks}


def _marks(low: float, high: float, *marks: tuple[str, float | None, str], text: Any = number) -> list[dict[str, Any]]:
    """Return the place of each value on a scale from `low` to `high`, in percent of its width; missing values have none."""
    return [
        {"label": label, "text": text(value), "kind": kind,
         "at": round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 1)}
        for label, value, kind in marks if value is not None
    ]  # fmt: skip
