"""Tables of the page that compares runs: a line a setting or figure, a column a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.base.json_files import finite_number, section
from rlhf.config import TRACKING_OPTIONS
from rlhf.report.card_page import card_facts
from rlhf.report.figures import BEFORE_AND_AFTER, NO_FIGURE, number, number_interval, percent, percent_interval
from rlhf.report.run_folder import STAGES, RunFolder, judge_of, mappings, series
from rlhf.run.metrics import METRICS

_PLACES = {"registry", "output_dir", "resume", "name", "wandb_group", "log_report", *TRACKING_OPTIONS}
"""Options that decide where a run is stored, not what it computes."""


def heading(run: RunFolder) -> dict[str, str]:
    """Return a run's column head: its label, and the source of its last stage's figures."""
    return {"label": run.label, **run.source(run.stages[-1] if run.stages else "")}


def _settings(run: RunFolder) -> dict[str, str]:
    """Return options, inputs, data, code and machine of a run as text."""
    settings: dict[str, str] = {}
    for stage in run.stages:
        manifest = run.manifests.get(stage, {})
        for name, value in run.config(stage).items():
            if name not in _PLACES:
                settings[f"{stage} · {name}"] = value if isinstance(value, str) else json.dumps(value)
        for reference, digest in run.parents(stage).items():
            settings[f"{stage} · parent {reference.split('/')[0]}"] = f"{reference} {digest[:8]}"
        data = section(manifest, "data")
        if data:
            settings[f"{stage} · data"] = str(data.get("fingerprint", ""))[:12]
            settings[f"{stage} · rows"] = json.dumps(data.get("rows"))
        for name in ("base_model", "base_model_revision", "code_commit"):
            if manifest.get(name):
                settings[f"{stage} · {name.replace('_', ' ')}"] = str(manifest[name])
        for library, version in section(manifest, "library_versions").items():
            settings[f"{stage} · {library}"] = str(version)
    for name, value in section(run.results, "machine").items():
        settings[f"machine · {name}"] = str(value)
    return settings


def differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs, each with its value in every run.

    The cells of a run that left nothing about a stage are `unknown`; that alone is no difference.
    """
    return [
        (name, ["unknown" if value is None else value for value in values])
        for name, values in _all_settings(runs)
        if len(set(values) - {None}) > 1
    ]


def common(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """Return the settings that have one value in all runs that recorded them."""
    return [
        (name, next(filter(None, values))) for name, values in _all_settings(runs) if len(set(values) - {None}) == 1
    ]


def _all_settings(runs: Sequence[RunFolder]) -> list[tuple[str, list[str | None]]]:
    """Return every setting with its values: a dash in a run without such an option, None in one without the stage."""
    tables = [_settings(run) for run in runs]
    stages = [{name.split(" · ")[0] for name in table} for table in tables]
    return [
        (
            name,
            [
                table.get(name, NO_FIGURE if name.split(" · ")[0] in own else None)
                for table, own in zip(tables, stages, strict=True)
            ],
        )
        for name in dict.fromkeys(itertools.chain.from_iterable(tables))
    ]


class Row(NamedTuple):
    """A line of a table with a column a run."""

    label: str
    note: str
    cells: list[str]


def _row(label: str, note: str, values: Sequence[float | None], text: Callable[[Any], str] = number) -> list[Row]:
    """Return one row; none where no run has the figure."""
    return [Row(label, note, [text(value) for value in values])] if any(v is not None for v in values) else []


def outcome(runs: Sequence[RunFolder]) -> list[Row]:
    """Return the final figures of all stages."""

    def final(stage: str, name: str) -> list[float | None]:
        return [finite_number(run.figures(stage).get(name)) for run in runs]

    rows = _row("SFT: held-out loss", "nats a token", final("sft", "eval_loss_after"))
    rows += _row("Reward model: held-out accuracy", "", final("reward", "accuracy"), percent)
    rows += _row("Reward model: human ceiling", "", final("reward", "human_ceiling"), percent)
    judges = ", ".join(dict.fromkeys(map(judge_of, runs)))
    for name, label, is_share, _, note in BEFORE_AND_AFTER:
        text, note = percent if is_share else number, note.format(judge=judges)
        rows += _row(f"{label}, SFT", note, final("ppo", f"{name}_before"), text)
        rows += _row(f"{label}, PPO", note, final("ppo", f"{name}_after"), text)
    rows += _row("KL to the SFT model", "nats a response", final("ppo", "kl"))
    rows += _row("Episodes", "", final("ppo", "episodes"))
    return rows + _row("Seconds in all", "", [finite_number(run.results.get("total_seconds")) for run in runs])


def card_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Return the reward models' report cards side by side."""
    if not any(run.reward_card for run in runs):
        return []
    rows = [
        Row(label, "95% interval over prompts", [percent_interval(run.reward_card.get(name)) for run in runs])
        for label, name in (
            ("Held-out pairs", "accuracy"),
            ("New prompts", "accuracy_held_out_prompts"),
            ("Raters it never saw", "accuracy_held_out_raters"),
            ("Human ceiling", "human_ceiling"),
            ("Independent scorer", "gold_accuracy"),
        )
    ]
    facts = [{name: (value, note) for name, value, note in card_facts(run.reward_card)} for run in runs]
    for name in dict.fromkeys(itertools.chain.from_iterable(facts)):
        note = next(fact[name][1] for fact in facts if name in fact)
        rows.append(Row(name, note, [fact.get(name, (NO_FIGURE, ""))[0] for fact in facts]))
    flags = ["; ".join(str(flag.get("name")) for flag in mappings(run.reward_card, "flags")) or "none" for run in runs]
    cells = [flag if run.reward_card else NO_FIGURE for run, flag in zip(runs, flags, strict=True)]
    rows = [row for row in rows if set(row.cells) != {NO_FIGURE}]
    return [*rows, Row("Flagged", "Each is explained in the run's own report.", cells)]


def health_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Return the signs of trouble in the PPO logs."""
    rows: list[Row] = []
    for metric in METRICS.values():
        courses = [[value for _, value in series(run.metrics.get("ppo", []), metric.name)] for run in runs]
        for sign in metric.signs:
            rows += _row(sign.label, sign.note, [sign.summary(course) if course else None for course in courses])
    return rows


def memory_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Return the peak memory of each stage, the highest of its phases, in GB."""
    rows: list[Row] = []
    for key, kind in (("peak_rss_gb", "memory"), ("peak_cuda_gb", "GPU memory")):
        for stage in STAGES:
            peaks = [
                [v for p in run.phases() if p.get("stage") == stage and (v := finite_number(p.get(key))) is not None]
                for run in runs
            ]
            rows += _row(f"{stage}: peak {kind}", "GB", [max(values, default=None) for values in peaks])
    return rows


def win_rates(evaluations: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Return the measured win rates, a line a model and judge, with the model's run id and manifest."""
    lines = []
    for evaluation in evaluations:
        sources = {model["label"]: model for model in evaluation.evaluated_models()}
        for line in mappings(evaluation.evaluation, "win_rates"):
            source = sources.get(str(line.get("model")), {})
            p = finite_number(section(line, "sign_test").get("p"))
            lines.append({
                "evaluation": evaluation.label, **{key: str(line.get(key, "")) for key in ("model", "baseline", "judge")},
                "rate": percent_interval(line), "controlled": percent_interval(line.get("length_controlled")),
                "counts": " / ".join(str(line.get(key, NO_FIGURE)) for key in ("wins", "ties", "losses")),
                "p": NO_FIGURE if p is None else f"{p:.2g}",
                "run_id": source.get("run_id", ""), "manifest": source.get("manifest", ""),
            })  # fmt: skip
    return lines


def evaluated(evaluations: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return a table of the models' figures for each evaluation, and the checkpoint that it recommends."""
    tables = []
    for evaluation in evaluations:
        figures = [section(model, "figures") for model in mappings(evaluation.evaluation, "models")]
        rows = [
            Row(name.replace("_", " "), "", [number_interval(own.get(name)) for own in figures])
            for name in dict.fromkeys(itertools.chain.from_iterable(figures))
        ]
        tables.append({
            "label": evaluation.label, "heads": evaluation.evaluated_models(), "rows": rows,
            "recommended": _recommendation(evaluation.evaluation),
        })  # fmt: skip
    return tables


def _recommendation(evaluation: Mapping[str, Any]) -> str:
    choice = section(section(evaluation, "frontier"), "recommended")
    if not choice:
        return ""
    update = f", update {choice['update']}" if choice.get("update") is not None else ""
    return (
        f"Recommended: {choice.get('model')}{update}, KL {number(choice.get('kl'))} nats, "
        f"{number_interval(choice.get('gain'))} more than the SFT policy by {choice.get('gold')}."
    )


def sources(runs: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Return the origin of all figures of the page, a line for each stage of each run."""
    lines = []
    for run in runs:
        for stage in run.stages:
            manifest = run.manifests.get(stage, {})
            reference = f"{stage}/{manifest.get('name')}@{manifest.get('version')}" if manifest else ""
            lines.append({
                "run": run.label, "stage": stage, "artifact": reference, **run.source(stage),
                "created": str(manifest.get("created", "")), "commit": str(manifest.get("code_commit") or ""),
                "folder": str(run.folder / stage) if (run.folder / stage).is_dir() else str(run.folder),
            })  # fmt: skip
    return lines
