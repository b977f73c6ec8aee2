"""One page about several runs: how they differ, which is better, at what cost, and where each figure comes from.

`python -m rlhf.report RUN [RUN ...] -o report.html`. A RUN is the folder that a pipeline or a single stage wrote. As in
`rlhf.report`, the page opens from disk without a network, nothing is measured here, and what is missing or half-written is
named while the rest is shown. Every figure stands under the run that it comes from, and each run is listed with its W&B run
id and the hash of its manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import UserError, did_you_mean
from rlhf.lineage_chart import Edge, Node, draw_lineage
from rlhf.report import (
    COMPARED,
    NO_FIGURE,
    STAGES,
    _card_facts,
    _list,
    _number,
    _percent,
    _plotly_gzip_base64,
    _section,
    _text,
    _thin,
    _write_page,
    read_jsonl,
    template,
)

#: Options that say where a run is kept, not what it does.
WHERE = {"registry", "output_dir", "resume", "name", "wandb_mode", "wandb_project", "wandb_group"}
SAMPLES_SHOWN = 40
LONGEST_TEXT = 1200
"""Characters of a sample; ten runs with answers of 1,000 tokens would make a page of many megabytes."""


class Curve(NamedTuple):
    """A plot with a line a run."""

    stage: str
    metrics: tuple[str, ...]
    """The first of these that a run has logged."""
    title: str
    unit: str
    note: str


CURVES = (
    Curve("ppo", ("objective/score",), "Reward score", "", "Should rise, then flatten."),
    Curve("ppo", ("objective/rlhf_reward",), "Score less KL cost", "", "What PPO maximises."),
    Curve(
        "ppo",
        ("objective/kl_full", "objective/kl"),
        "KL from the SFT model",
        "nats a response",
        "A jump means that the policy leaves the language it knew.",
    ),
    Curve("ppo", ("objective/entropy",), "Entropy", "nats a token", "Near 0 the policy says one thing only."),
    Curve("ppo", ("response/length",), "Response length", "tokens", "A steady climb or fall can be a trick."),
    Curve("ppo", ("response/stop_rate",), "Stop rate", "", "Share of responses that end by themselves."),
    Curve("ppo", ("response/distinct_2",), "Distinct word pairs", "", "Falls when answers grow alike."),
    Curve("ppo", ("ppo/explained_variance",), "Explained variance", "", "How well values foresee the reward; 1 is best."),
    Curve("ppo", ("ppo/clipfrac",), "Clipped tokens", "share", "High: steps are too large."),
    Curve("ppo", ("ppo/value_loss",), "Value loss", "", "Should fall."),
    Curve("sft", ("sft/loss",), "SFT loss, training", "nats a token", ""),
    Curve("sft", ("sft/eval_loss",), "SFT loss, held out", "nats a token", "If it turns up, that is overfitting."),
    Curve("reward", ("reward/loss",), "Reward model's loss, training", "", ""),
    Curve("reward", ("reward/eval_accuracy", "reward/accuracy"), "Reward model's accuracy", "", "0.5 is a coin."),
)

#: What the health table reads off the PPO log: label, metric, how its values become one, what it warns of.
HEALTH: tuple[tuple[str, str, Callable[[Sequence[float]], float], str], ...] = (
    ("Largest KL", "objective/kl", max, "Far from the SFT model, the reward model is out of its depth."),
    ("Lowest KL", "objective/kl", min, "Clearly below 0: the reference is not the model that PPO started from."),
    ("Lowest entropy", "objective/entropy", min, "Near 0 the policy has collapsed."),
    ("Spread of scores, last", "objective/score_std", lambda values: values[-1], "Near 0 there is nothing to learn from."),
    ("Stop rate, last", "response/stop_rate", lambda values: values[-1], "Answers that are cut off."),
    ("Distinct word pairs, last", "response/distinct_2", lambda values: values[-1], "Answers that grow alike."),
    ("Clipped tokens, most", "ppo/clipfrac", max, "Steps that are too large."),
    ("Largest ratio", "ppo/ratio_max", max, "One token that moved too far."),
    ("First ratio off 1 by", "ppo/first_ratio_error", max, "Stale log-probabilities, if more than rounding."),
    ("Explained variance, last", "ppo/explained_variance", lambda values: values[-1], "Below 0 the value model misleads."),
    ("Sampler off by", "rollout/logprob_gap", max, "Sampler and training forward disagree."),
)


@dataclass
class RunFolder:
    """What one folder holds, as far as it can be read."""

    folder: Path
    label: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: the manifest's fields, its `hash`, and the `file` it was read from."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: `tracking.json`."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    reward_card: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[str]:
        """The stages of which anything is known."""
        return [s for s in STAGES if self.metrics.get(s) or self.manifests.get(s) or self.records.get(s)]

    def config(self, stage: str) -> dict[str, Any]:
        """The resolved options of a stage."""
        return _section(self.manifests.get(stage, {}), "config") or _section(self.records.get(stage, {}), "config")

    def figures(self, stage: str) -> dict[str, Any]:
        """The final figures of a stage."""
        return _section(self.results, stage) or _section(self.manifests.get(stage, {}), "metrics")

    def phases(self) -> list[dict[str, Any]]:
        """Seconds and peak memory of the phases, with their stage."""
        listed = [row for row in self.results.get("phases") or [] if isinstance(row, dict)]
        return listed or [
            {"stage": stage, **row}
            for stage, manifest in self.manifests.items()
            for row in _section(manifest, "metrics").get("phases") or []
        ]

    def run_id(self, stage: str) -> str:
        """The W&B run id, or an empty string."""
        return str(self.records.get(stage, {}).get("run_id") or self.manifests.get(stage, {}).get("wandb_run_id") or "")

    def parents(self, stage: str) -> dict[str, str]:
        """Reference -> hash of what a stage started from."""
        if stage in self.manifests:
            listed = [p for p in self.manifests[stage].get("parents") or [] if isinstance(p, dict)]
            return {f"{p.get('stage')}/{p.get('name')}@{p.get('version')}": str(p.get("hash")) for p in listed}
        return {str(k): str(v) for k, v in _section(self.records.get(stage, {}), "inputs").items()}

    def source(self, stage: str) -> dict[str, str]:
        """Run id and manifest hash: where a figure of this stage comes from."""
        return {"run_id": self.run_id(stage), "manifest": str(self.manifests.get(stage, {}).get("hash", ""))}


def frontier(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The points (`step`, `sqrt_kl`, `score`) of a PPO run's log lines; KL in nats a response, exact where it was logged.

    An estimate of a KL near 0 can come out below it: those points have no root and are left out.
    """
    points = []
    for row in rows:
        kl = _number(row.get("objective/kl_full", row.get("objective/kl")))
        score = _number(row.get("objective/score"))
        if kl is not None and score is not None and kl >= 0:
            points.append({"step": float(row.get("step") or 0), "sqrt_kl": math.sqrt(kl), "score": score})
    return points


def write_comparison(
    folders: Sequence[Path], file: Path, *, registry: Path | None = None, force: bool = False
) -> Path:
    """Makes the page.

    Args:
        folders: run folders; one that is corrupt is named on the page, and the others are still compared.
        registry: where manifests are looked for when a run's folder has none.
        force: compare runs that cannot be compared, and say so on the page.

    Raises:
        UserError: no such folder, a folder that is no run, or runs that were not measured with the same prompts and reward
            model.
    """
    runs = [read_run(folder, registry) for folder in folders]
    for run, label in zip(runs, _labels([run.folder for run in runs]), strict=True):
        run.label = label
    marks = comparability(runs)
    if marks and not force:
        raise UserError(f"{marks[0]}; compare with --force, and the page will say so")
    charts = [*_curves(runs), *_frontier_chart(runs), *_time_charts(runs)]
    page = template("comparison.html.j2").render(
        runs=runs,
        marks=[*marks, *overlaps(runs)],
        incomparable=bool(marks),
        headings=[_heading(run) for run in runs],
        differences=differences(runs),
        common=_common(runs),
        outcome=_outcome(runs),
        cards=_card_table(runs),
        health=_health_table(runs),
        win_rates=_win_rates(runs),
        samples=_samples(runs),
        lineage=draw_lineage(*_lineage(runs)),
        memory=_memory_table(runs),
        sources=_sources(runs),
        problems=[(run.label, line) for run in runs for line in run.problems],
        charts=charts,
        plotly=_plotly_gzip_base64() if charts else "",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    return _write_page(page, file)


# --- Reading --------------------------------------------------------------------------------------------------------


def read_run(folder: Path, registry: Path | None = None) -> RunFolder:
    """Whatever can be read of a run.

    Raises:
        UserError: there is no such folder, or nothing in it was written by a run.
    """
    if not folder.is_dir():
        siblings = [str(p) for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"no run {folder}{did_you_mean(str(folder), siblings)}; give the folder that a run wrote")
    run = RunFolder(folder)
    places = {stage: folder / stage for stage in STAGES if (folder / stage).is_dir()}
    if (folder / "tracking.json").is_file() or (folder / "metrics.jsonl").is_file():
        record = _object(folder / "tracking.json", run)
        places = {record["stage"] if record.get("stage") in STAGES else folder.name: folder}
    run.results = _object(folder / "results.json", run)
    run.evaluation = _object(folder / "evaluation.json", run)
    if not places and not run.results and not run.evaluation and not run.problems:
        raise UserError(f"{folder} holds no run: no sft, reward or ppo folder and no results.json is in it")
    for stage, place in places.items():
        run.records[stage] = _object(place / "tracking.json", run)
        run.metrics[stage] = _rows(place / "metrics.jsonl", run, expected=True)
        manifest = _manifest(stage, place, run, registry)
        if manifest:
            run.manifests[stage] = manifest
    if "reward" in places:
        run.reward_card = _object(places["reward"] / "card.json", run)
    if "ppo" in places:
        run.samples = _rows(places["ppo"] / "comparison.jsonl", run, expected=False)
    return run


def _object(file: Path, run: RunFolder) -> dict[str, Any]:
    """A JSON object; {} where there is none, with a note where there is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        run.problems.append(f"{file.relative_to(run.folder)} cannot be read ({str(error).splitlines()[0]})")
        return {}
    if not isinstance(content, dict):
        run.problems.append(f"{file.relative_to(run.folder)} holds a {type(content).__name__}, not an object")
        return {}
    return content


def _rows(file: Path, run: RunFolder, *, expected: bool) -> list[dict[str, Any]]:
    name = file.relative_to(run.folder)
    try:
        rows, bad = read_jsonl(file)
    except FileNotFoundError:
        rows, bad = [], 0
        if expected:
            run.problems.append(f"{name} is not there")
    except OSError as error:
        run.problems.append(f"{name} cannot be read ({error.strerror})")
        return []
    if bad:
        run.problems.append(f"{name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    return rows


def _manifest(stage: str, place: Path, run: RunFolder, registry: Path | None) -> dict[str, Any]:
    """The manifest that the run left beside its log, or that a registry has of what its results name."""
    made = _section(_section(run.results, "artifacts"), stage)
    name, _, version = str(made.get("reference", "")).partition("@")
    candidates = [place / "manifest.json"]
    if version:
        roots = [run.folder / "registry", *([registry] if registry else [])]
        candidates += [root / name / f"v{version}" / "manifest.json" for root in roots]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        run.problems.append(f"no manifest of its {stage} stage: options and parents are known only as far as it logged them")
        return {}
    try:
        raw = file.read_bytes()
        content = json.loads(raw)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        run.problems.append(f"{file.name} of its {stage} stage is corrupt")
        return {}
    digest = hashlib.sha256(raw).hexdigest()
    if made.get("hash") not in (None, digest):
        run.problems.append(f"{file.name} of its {stage} stage is not the one that results.json names")
    return {**content, "hash": digest, "file": str(file)}


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a folder that is given twice gets a number."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, 1)]


# --- Can they be compared? ------------------------------------------------------------------------------------------


def comparability(runs: Sequence[RunFolder]) -> list[str]:
    """Why figures of these runs must not be held against each other; empty when they may."""
    marks = []
    for what, identity in (("reward models", _scored_by), ("held-out prompts", _asked)):
        known = {run.label: value for run in runs if (value := identity(run)) is not None}
        if len({key for key, _ in known.values()}) > 1:
            named = ", ".join(f"{label}: {name}" for label, (_, name) in known.items())
            marks.append(f"the runs have different {what}, so that their scores cannot be compared ({named})")
    return marks


def _scored_by(run: RunFolder) -> tuple[str, str] | None:
    """The rewards of PPO: a key that is equal for equal ones, and what to call them; None where nothing is known."""
    adapters = {ref: digest for ref, digest in run.parents("ppo").items() if ref.startswith("reward/")}
    made = _section(_section(run.results, "artifacts"), "reward")
    if not adapters and not run.parents("ppo") and made.get("hash"):
        adapters = {str(made.get("reference")): str(made["hash"])}
    configured = run.config("ppo").get("reward") or []
    rewards = [configured] if isinstance(configured, str) else configured
    others = [str(reward) for reward in rewards if not str(reward).startswith("reward/")]
    if not adapters and not others:
        return None
    names = [*(f"{ref} {digest[:8]}" for ref, digest in adapters.items()), *others]
    return json.dumps([sorted(adapters.values()), sorted(others)]), " + ".join(names)


def _asked(run: RunFolder) -> tuple[str, str] | None:
    """The held-out prompts that were answered, as above."""
    prompts = [str(row.get("prompt")) for row in run.samples]
    if not prompts:
        return None
    digest = hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()
    return digest, f"{len(prompts)} prompts {digest[:8]}"


def overlaps(runs: Sequence[RunFolder]) -> list[str]:
    """Runs whose held-out prompts are among the prompts that they, or the models they come from, were trained on."""
    marks = []
    for run in runs:
        for stage, manifest in run.manifests.items():
            overlap = _section(_section(manifest, "data"), "overlap")
            for trained_on, count in _section(overlap, "in_training").items():
                if count:
                    held_out = overlap.get("held_out")
                    marks.append(
                        f"{run.label}: {count} of the {held_out} held-out prompts of its {stage} stage are among the training "
                        f"prompts of {trained_on}, so that its figures are better than those on new prompts would be"
                    )
    return marks


# --- Tables ---------------------------------------------------------------------------------------------------------


def _heading(run: RunFolder) -> dict[str, Any]:
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
        data = _section(manifest, "data")
        if data:
            settings[f"{stage} · data"] = str(data.get("fingerprint", ""))[:12]
            settings[f"{stage} · rows"] = json.dumps(data.get("rows"))
        for name in ("base_model", "base_model_revision", "code_commit"):
            if manifest.get(name):
                settings[f"{stage} · {name.replace('_', ' ')}"] = str(manifest[name])
        for library, version in _section(manifest, "library_versions").items():
            settings[f"{stage} · {library}"] = str(version)
    for name, value in _section(run.results, "machine").items():
        settings[f"machine · {name}"] = str(value)
    return settings


def differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, each with its value in every run."""
    return [(name, values) for name, values in _all_settings(runs) if len(set(values)) > 1]


def _common(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    return [(name, values[0]) for name, values in _all_settings(runs) if len(set(values)) == 1]


def _all_settings(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    tables = [_settings(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(tables))
    return [(name, [table.get(name, NO_FIGURE) for table in tables]) for name in names]


class Row(NamedTuple):
    """A line of a table with a column a run."""

    label: str
    note: str
    cells: list[str]


def _row(label: str, note: str, values: Sequence[float | None], text: Callable[[float | None], str]) -> list[Row]:
    """No line where no run has the figure."""
    return [Row(label, note, [text(value) for value in values])] if any(v is not None for v in values) else []


def _outcome(runs: Sequence[RunFolder]) -> list[Row]:
    """The final figures of all stages."""

    def of(stage: str, name: str) -> list[float | None]:
        return [_number(run.figures(stage).get(name)) for run in runs]

    rows = _row("SFT: held-out loss", "nats a token", of("sft", "eval_loss_after"), _text)
    rows += _row("Reward model: held-out accuracy", "", of("reward", "accuracy"), _percent)
    rows += _row("Reward model: human ceiling", "", of("reward", "human_ceiling"), _percent)
    for name, label, percent, _, note in COMPARED:
        text = _percent if percent else _text
        rows += _row(f"{label}, SFT", note, of("ppo", f"{name}_before"), text)
        rows += _row(f"{label}, PPO", note, of("ppo", f"{name}_after"), text)
    rows += _row("KL to the SFT model", "nats a response", of("ppo", "kl"), _text)
    rows += _row("Episodes", "", of("ppo", "episodes"), _text)
    rows += _row("Seconds in all", "", [_number(run.results.get("total_seconds")) for run in runs], _text)
    return rows


def _card_table(runs: Sequence[RunFolder]) -> list[Row]:
    """The reward models' report cards side by side."""
    if not any(run.reward_card for run in runs):
        return []
    rows = [
        Row(label, "95% interval over prompts", [_interval(run.reward_card.get(name)) for run in runs])
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
    flags = ["; ".join(str(flag.get("name")) for flag in _list(run.reward_card, "flags")) or "none" for run in runs]
    cells = [flag if run.reward_card else NO_FIGURE for run, flag in zip(runs, flags, strict=True)]
    rows = [row for row in rows if set(row.cells) != {NO_FIGURE}]
    return [*rows, Row("Flagged", "Each is explained in the run's own report.", cells)]


def _interval(figure: Any) -> str:
    """`71.3% (69.0–73.6)`; without an interval the value alone."""
    if not isinstance(figure, Mapping) or (value := _number(figure.get("value"))) is None:
        return NO_FIGURE
    low, high = _number(figure.get("low")), _number(figure.get("high"))
    return _percent(value) + (f" ({100 * low:.1f}–{100 * high:.1f})" if low is not None and high is not None else "")


def _health_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Signs of trouble in the PPO log."""
    rows: list[Row] = []
    for label, metric, summary, note in HEALTH:
        series = [[v for row in run.metrics.get("ppo", []) if (v := _number(row.get(metric))) is not None] for run in runs]
        rows += _row(label, note, [summary(values) if values else None for values in series], _text)
    return rows


def _memory_table(runs: Sequence[RunFolder]) -> list[Row]:
    rows: list[Row] = []
    for key, what in (("peak_rss_gb", "memory"), ("peak_cuda_gb", "GPU memory")):
        for stage in STAGES:
            peaks = [
                max((v for p in run.phases() if p.get("stage") == stage and (v := _number(p.get(key))) is not None), default=None)
                for run in runs
            ]
            rows += _row(f"{stage}: peak {what}", "GB", peaks, _text)
    return rows


def _win_rates(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The win rates that `rlhf.evaluation` left in the runs' folders, one line a model and judge."""
    lines = []
    for run in runs:
        for line in _list(run.evaluation, "win_rates"):
            if isinstance(line, Mapping):
                lines.append({"run": run.label, **line, "text": _interval(line.get("win_rate"))})
    return lines


def _sources(runs: Sequence[RunFolder]) -> list[dict[str, str]]:
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


# --- Samples --------------------------------------------------------------------------------------------------------


def _samples(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Prompts that any run answered, with the answers of all of them; evenly spaced, not picked by score."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for row in run.samples:
            by_prompt.setdefault(str(row.get("prompt") or ""), []).append({"run": number, **row})
    prompts = list(by_prompt)
    count = min(SAMPLES_SHOWN, len(prompts))
    shown = []
    for prompt in (prompts[i * len(prompts) // count] for i in range(count)):
        answers = [_answer(row) for row in by_prompt[prompt]]
        gains = [answer["gain"] for answer in answers if answer["gain"] is not None]
        scores = [answer["score"] for answer in answers if answer["score"] is not None]
        shown.append({
            "prompt": _cut(prompt), "before": _before(by_prompt[prompt]), "answers": answers,
            "gain": max(gains, default=None), "loss": min(gains, default=None),
            "spread": max(scores) - min(scores) if scores else None,
        })  # fmt: skip
    return shown


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    before, after = _number(row.get("sft_score")), _number(row.get("ppo_score"))
    gain = after - before if before is not None and after is not None else None
    return {"run": row["run"], "text": _cut(row.get("ppo_response")), "score": after, "gain": gain}


def _before(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The SFT answers; runs on the same SFT model share one."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(_cut(row.get("sft_response")), []).append(row["run"])
    scores = {_cut(row.get("sft_response")): _number(row.get("sft_score")) for row in rows}
    return [{"text": text, "runs": numbers, "score": scores[text]} for text, numbers in found.items()]


def _cut(text: Any) -> str:
    plain = str(text or "").strip()
    return plain if len(plain) <= LONGEST_TEXT else plain[:LONGEST_TEXT].rstrip() + " […]"


# --- Plots ----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    charts = []
    for curve in CURVES:
        traces = [trace for number, run in enumerate(runs) if (trace := _trace(number, run, curve))]
        if traces:
            axis = "updates" if curve.stage == "ppo" else "optimiser updates"
            charts.append({
                "kind": "lines", "section": "curves", "stage": curve.stage, "title": curve.title, "unit": curve.unit,
                "note": curve.note, "axis": axis, "traces": traces, "source": f"{curve.stage}/metrics.jsonl",
            })  # fmt: skip
    return charts


def _trace(number: int, run: RunFolder, curve: Curve) -> dict[str, Any] | None:
    """One run's line. `episodes` is what an update's number is multiplied with to count responses."""
    rows = run.metrics.get(curve.stage, [])
    for metric in curve.metrics:
        points = [(row.get("step"), v) for row in rows if (v := _number(row.get(metric))) is not None]
        if points:
            points = _thin(points)
            episodes = next((row["episodes"] / row["step"] for row in rows if row.get("episodes") and row.get("step")), None)
            return {
                "run": number, "x": [x for x, _ in points], "y": [float(f"{y:.5g}") for _, y in points],
                "episodes": episodes, **run.source(curve.stage),
            }  # fmt: skip
    return None


def _frontier_chart(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Score over the root of KL, a point an update (Gao et al. 2022)."""
    traces = []
    for number, run in enumerate(runs):
        points = _thin(frontier(run.metrics.get("ppo", [])))
        if points:
            xs, ys = ([float(f"{p[key]:.5g}") for p in points] for key in ("sqrt_kl", "score"))
            labels = [f"update {p['step']:.0f}" for p in points]
            traces.append({"run": number, "x": xs, "y": ys, "labels": labels, **run.source("ppo")})
    traces += _evaluated_frontier(runs)
    if not traces:
        return []
    note = "Left is cheap, up is good: at equal KL the higher curve is the better run. Where it bends down, PPO goes too far."
    return [{
        "kind": "frontier", "section": "frontier", "title": "Score over the square root of KL", "unit": "", "note": note,
        "axis": "square root of KL, nats", "traces": traces, "source": "ppo/metrics.jsonl",
    }]  # fmt: skip


def _evaluated_frontier(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The frontiers that `rlhf.evaluation` measured on held-out prompts: proxy, gold and best-of-n."""
    traces = []
    for number, run in enumerate(runs):
        for series in _list(run.evaluation, "frontier"):
            points = [p for p in series.get("points", []) if _number(p.get("kl")) is not None]
            xs = [math.sqrt(max(p["kl"], 0.0)) for p in points]
            for name in dict.fromkeys(itertools.chain.from_iterable(p.get("scores", {}) for p in points)):
                ys = [_number(p.get("scores", {}).get(name)) for p in points]
                title = f"{series.get('name', '')} {name}".strip()
                traces.append({"run": number, "x": xs, "y": ys, "name": title, "dash": "dot", **run.source("ppo")})
    return traces


def _time_charts(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Seconds of each phase, a bar a run."""
    names = dict.fromkeys((p.get("stage"), p.get("phase")) for run in runs for p in run.phases())
    traces = []
    for stage, phase in names:
        seconds = [
            next((_number(p.get("seconds")) for p in run.phases() if (p.get("stage"), p.get("phase")) == (stage, phase)), None)
            for run in runs
        ]
        sources = [run.source(str(stage)) for run in runs]
        traces.append({"name": f"{stage} · {phase}", "x": seconds, "y": [run.label for run in runs], "sources": sources})
    return [
        {"kind": "bars", "section": "time", "title": "Time by phase", "unit": "seconds", "note": "", "axis": "seconds",
         "traces": traces, "source": "results.json"}
    ] if traces else []  # fmt: skip


# --- Lineage --------------------------------------------------------------------------------------------------------


def _lineage(runs: Sequence[RunFolder]) -> tuple[list[Node], list[Edge]]:
    """Data, base models and artefacts of all runs, each once, and what was made from what."""
    nodes: dict[str, Node] = {}
    edges: dict[Edge, None] = {}
    for run in runs:
        for stage in run.stages:
            manifest = run.manifests.get(stage, {})
            key = str(manifest.get("hash") or f"{run.label}/{stage}")
            title = f"{stage}/{manifest['name']}@{manifest['version']}" if manifest.get("name") else f"{stage} of {run.label}"
            detail = f"{key[:10]} · {run.label}" if manifest else "not registered"
            nodes[key] = Node(key, stage, title, detail)
            for source, column, name, text in _inputs(run, stage):
                nodes.setdefault(source, Node(source, column, name, text))
                edges[Edge(source, key)] = None
    return list(nodes.values()), list(edges)


def _inputs(run: RunFolder, stage: str) -> list[tuple[str, str, str, str]]:
    """What a stage was made from: key, kind, title and detail of each."""
    manifest, inputs = run.manifests.get(stage, {}), []
    data = _section(manifest, "data")
    if data.get("fingerprint"):
        place = Path(str(run.config(stage).get("dataset", "data"))).name
        rows = _section(data, "rows")
        counts = ", ".join(f"{name} {_text(_number(count))}" for name, count in rows.items())
        inputs.append((str(data["fingerprint"]), "data", f"{place} for {stage}", counts))
    if stage == "sft" and manifest.get("base_model"):
        name = str(manifest["base_model"])
        inputs.append((f"base {name}", "data", Path(name).name, "base model"))
    inputs += [(digest, reference.split("/")[0], reference, digest[:10]) for reference, digest in run.parents(stage).items()]
    return inputs
