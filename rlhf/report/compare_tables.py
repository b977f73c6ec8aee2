"""The tables of the page: a line a setting or figure, a column a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.base.json_files import finite_number, section
from rlhf.report.card_page import _card_facts
from rlhf.report.compare_runs import RunFolder, mappings
from rlhf.report.figures import COMPARED, NO_FIGURE, STAGES, _percent, _text

#: Options that say where a run is kept, not what it does.
WHERE = {"registry", "output_dir", "resume", "name", "wandb_mode", "wandb_project", "wandb_group"}

#: What the health table reads off the PPO log: label, metric, how its values become one, what it warns of.
HEALTH: tuple[tuple[str, str, Callable[[Sequence[float]], float], str], ...] = (
    ("Largest KL", "objective/kl", max, "Far from the SFT model, the reward model is out of its depth."),
    ("Lowest KL", "objective/kl", min, "Clearly below 0: the reference is not the model that PPO started from."),
    ("Lowest entropy", "objective/entropy", min, "Near 0 the policy has collapsed."),
    (
        "Spread of scores, last",
        "objective/score_std",
        lambda values: values[-1],
        "Near 0 there is nothing to learn from.",
    ),
    ("Stop rate, last", "response/stop_rate", lambda values: values[-1], "Answers that are cut off."),
    ("Distinct word pairs, last", "response/distinct_2", lambda values: values[-1], "Answers that grow alike."),
    ("Clipped tokens, most", "ppo/clipfrac", max, "Steps that are too large."),
    ("Largest ratio", "ppo/ratio_max", max, "One token that moved too far."),
    ("First ratio off 1 by", "ppo/first_ratio_error", max, "Stale log-probabilities, if more than rounding."),
    (
        "Explained variance, last",
        "ppo/explained_variance",
        lambda values: values[-1],
        "Below 0 the value model misleads.",
    ),
    ("Sampler off by", "rollout/logprob_gap", max, "Sampler and training forward disagree."),
)


def heading(run: RunFolder) -> dict[str, Any]:
    """A run's column head: its label and where its figures come from, by stage."""
    last = run.stages[-1] if run.stages else ""
    return {"label": run.label, **run.source(last), "runs": " ".join(filter(None, map(run.run_id, run.stages)))}


def _settings(run: RunFolder) -> dict[str, str]:
    """Everything that was set, or that came with it, as text."""
    settings: dict[str, str] = {}
    for stage in run.stages:
        manifest = run.manifests.get(stage, {})
        for name, value in run.config(stage).items():
            if name not in WHERE:
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
    """Settings that are not the same in all runs, each with its value in every run.

    A run that left nothing about a stage does not differ in it: its cells say that nothing is known.
    """
    return [(name, _shown(values)) for name, values in _all_settings(runs) if len(set(values) - {None}) > 1]


def common(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """Settings that are the same in all runs of which they are known."""
    return [
        (name, next(filter(None, values))) for name, values in _all_settings(runs) if len(set(values) - {None}) == 1
    ]


def _shown(values: Sequence[str | None]) -> list[str]:
    return ["unknown" if value is None else value for value in values]


def _all_settings(runs: Sequence[RunFolder]) -> list[tuple[str, list[str | None]]]:
    """Every setting with its value in each run: a dash where the run has no such option, None where nothing is known."""
    tables = [_settings(run) for run in runs]
    known = [{name.split(" · ")[0] for name in table} for table in tables]
    names = dict.fromkeys(itertools.chain.from_iterable(tables))

    def value(name: str, table: dict[str, str], stages: set[str]) -> str | None:
        return table.get(name, NO_FIGURE if name.split(" · ")[0] in stages else None)

    return [(name, [value(name, *one) for one in zip(tables, known, strict=True)]) for name in names]


class Row(NamedTuple):
    """A line of a table with a column a run."""

    label: str
    note: str
    cells: list[str]


def _row(label: str, note: str, values: Sequence[float | None], text: Callable[[float | None], str]) -> list[Row]:
    """No line where no run has the figure."""
    return [Row(label, note, [text(value) for value in values])] if any(v is not None for v in values) else []


def outcome(runs: Sequence[RunFolder]) -> list[Row]:
    """The final figures of all stages."""

    def of(stage: str, name: str) -> list[float | None]:
        return [finite_number(run.figures(stage).get(name)) for run in runs]

    rows = _row("SFT: held-out loss", "nats a token", of("sft", "eval_loss_after"), _text)
    rows += _row("Reward model: held-out accuracy", "", of("reward", "accuracy"), _percent)
    rows += _row("Reward model: human ceiling", "", of("reward", "human_ceiling"), _percent)
    for name, label, percent, _, note in COMPARED:
        text = _percent if percent else _text
        rows += _row(f"{label}, SFT", note, of("ppo", f"{name}_before"), text)
        rows += _row(f"{label}, PPO", note, of("ppo", f"{name}_after"), text)
    rows += _row("KL to the SFT model", "nats a response", of("ppo", "kl"), _text)
    rows += _row("Episodes", "", of("ppo", "episodes"), _text)
    rows += _row("Seconds in all", "", [finite_number(run.results.get("total_seconds")) for run in runs], _text)
    return rows


def card_table(runs: Sequence[RunFolder]) -> list[Row]:
    """The reward models' report cards side by side."""
    if not any(run.reward_card for run in runs):
        return []
    rows = [
        Row(label, "95% interval over prompts", [interval(run.reward_card.get(name)) for run in runs])
        for label, name in (
            ("Held-out pairs", "accuracy"),
            ("New prompts", "accuracy_held_out_prompts"),
            ("Raters it never saw", "accuracy_held_out_raters"),
            ("Human ceiling", "human_ceiling"),
            ("Independent scorer", "gold_accuracy"),
        )
    ]
    facts = [{name: (value, note) for name, value, note in _card_facts(run.reward_card)} for run in runs]
    for name in dict.fromkeys(itertools.chain.from_iterable(facts)):
        note = next(fact[name][1] for fact in facts if name in fact)
        rows.append(Row(name, note, [fact.get(name, (NO_FIGURE, ""))[0] for fact in facts]))
    flags = ["; ".join(str(flag.get("name")) for flag in mappings(run.reward_card, "flags")) or "none" for run in runs]
    cells = [flag if run.reward_card else NO_FIGURE for run, flag in zip(runs, flags, strict=True)]
    rows = [row for row in rows if set(row.cells) != {NO_FIGURE}]
    return [*rows, Row("Flagged", "Each is explained in the run's own report.", cells)]


def interval(figure: Any, *, percent: bool = True) -> str:
    """`71.3% (69.0–73.6)`, or as plain numbers; without an interval the value alone."""
    if not isinstance(figure, Mapping) or (value := finite_number(figure.get("value"))) is None:
        return NO_FIGURE
    low, high = finite_number(figure.get("low")), finite_number(figure.get("high"))
    text = _percent(value) if percent else _text(value)
    if low is None or high is None:
        return text
    return text + (f" ({100 * low:.1f}–{100 * high:.1f})" if percent else f" ({_text(low)} to {_text(high)})")


def health_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Signs of trouble in the PPO log."""
    rows: list[Row] = []
    for label, metric, summary, note in HEALTH:
        series = [
            [v for row in run.metrics.get("ppo", []) if (v := finite_number(row.get(metric))) is not None]
            for run in runs
        ]
        rows += _row(label, note, [summary(values) if values else None for values in series], _text)
    return rows


def memory_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Peak memory of each stage, the highest of its phases, in GB."""
    rows: list[Row] = []
    for key, what in (("peak_rss_gb", "memory"), ("peak_cuda_gb", "GPU memory")):
        for stage in STAGES:
            peaks = [
                max(
                    (
                        v
                        for p in run.phases()
                        if p.get("stage") == stage and (v := finite_number(p.get(key))) is not None
                    ),
                    default=None,
                )
                for run in runs
            ]
            rows += _row(f"{stage}: peak {what}", "GB", peaks, _text)
    return rows


def win_rates(evaluations: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Win rates as `rlhf.evaluation` measured them, one line a model and judge, with the model's run id and manifest."""
    lines = []
    for found in evaluations:
        models = {str(m.get("name")): m for m in mappings(found.evaluation, "models")}
        for line in mappings(found.evaluation, "win_rates"):
            model = models.get(str(line.get("model")), {})
            p = finite_number(section(line, "sign_test").get("p"))
            lines.append({
                "evaluation": found.label, **{key: str(line.get(key, "")) for key in ("model", "baseline", "judge")},
                "rate": interval(line), "controlled": interval(line.get("length_controlled")),
                "counts": " / ".join(str(line.get(key, NO_FIGURE)) for key in ("wins", "ties", "losses")),
                "p": NO_FIGURE if p is None else f"{p:.2g}",
                "run_id": str(model.get("run_id") or ""), "manifest": str(model.get("hash") or ""),
            })  # fmt: skip
    return lines


def evaluated(evaluations: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """For each evaluation a table of its models' figures with their intervals, and the checkpoint that it recommends."""
    tables = []
    for found in evaluations:
        models = mappings(found.evaluation, "models")
        figures = [section(model, "figures") for model in models]
        rows = [
            Row(name.replace("_", " "), "", [interval(own.get(name), percent=False) for own in figures])
            for name in dict.fromkeys(itertools.chain.from_iterable(figures))
        ]
        heads = [
            {"label": str(m.get("name")), "run_id": str(m.get("run_id") or ""), "manifest": str(m.get("hash") or "")}
            for m in models
        ]
        tables.append(
            {"label": found.label, "heads": heads, "rows": rows, "recommended": _recommended(found.evaluation)}
        )
    return tables


def _recommended(evaluation: Mapping[str, Any]) -> str:
    chosen = section(section(evaluation, "frontier"), "recommended")
    if not chosen:
        return ""
    update = f", update {chosen['update']}" if chosen.get("update") is not None else ""
    return (
        f"Recommended: {chosen.get('model')}{update}, KL {_text(finite_number(chosen.get('kl')))} nats, "
        f"{interval(chosen.get('gain'), percent=False)} more than the SFT policy by {chosen.get('gold')}."
    )


def sources(runs: Sequence[RunFolder]) -> list[dict[str, str]]:
    """A line for each stage of each run: what every figure of the page can be traced back to."""
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
