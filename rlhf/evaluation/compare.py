"""Comparison of policies: `rlhf evaluate --models sft/A ppo/B ppo/C --dataset DATA`

Writes two files into `output_dir`, for readers and for other programs. A *figure* is `{"value", "low", "high"}` with a 95%
bootstrap interval over prompts, `low` and `high` null where there is a single prompt, or null in place of all three where
there is nothing to measure. KL and entropy are in nats, lengths in tokens, scores in units of the scorer.

`evaluation.json`:

    format             1; a change that breaks readers raises it
    created, seconds, code_commit, config
    prompts            source, split, count, fingerprint (of all prompts of the split)
    sampling           samples_per_prompt, temperature, response_length, seed
    reference          the SFT policy that KL is against; baseline: the policy that win rates are against
    reward             the proxy, as `--reward` takes it; gold: {name: as `--gold` takes it}
    marks              warnings about the whole: compared by force, a run or snapshot left out
    models             for each: name, stage, hash, run_id (W&B), marks, overlap {artefact: prompts it was trained on, or null
                       where its data is gone or changed}, and figures {name: figure}:
                         score                  by the proxy
                         gold/NAME              by each gold scorer
                         kl, kl_k3, kl_full     to the reference, a response: k1 and k3 on sampled tokens, exact over the
                                                vocabulary at each sampled prefix; at the sampling temperature
                         entropy                a token
                         length, stop_rate      stop token included; share of answers that end in it
                         distinct_1, _2, _3     distinct n-grams of words over all, of the samples of one prompt, mean over
                                                prompts: how much the answers to one prompt differ
                         distinct_2_all         distinct pairs of words over all answers; without interval, as a prompt that
                                                is drawn twice repeats itself
                         repetition             share of 4-grams of words that occur earlier in the answer
                         base_perplexity        of the answers, without their stop token, under the untuned base model
                         check/FILE/FIGURE      of each task check (`rlhf.evaluation.checks`); intervals over its rows
    win_rates          for each model but the baseline, and judge: model, baseline, judge (name), kind (reward | gold | chat |
                       people), value, low, high, pairs, wins, ties, losses, unjudged, sign_test {wins, losses, ties, p},
                       length_controlled (figure), length_difference (mean, tokens)
    chat_judge         model, asked (requests made now), tokens [asked, answered] of all verdicts, cost (null without prices),
                       split {model: pairs whose verdict went with the position}; null without one
    best_of_n          model, prompts, samples, curve [{n, kl, score, gold {name: figure}}], fits; null if left out
    frontier           points [{model, run, update, kl, sqrt_kl, score, score_gain, gold {}, gold_gain {}}], gains over the
                       reference, paired by prompt; fits; recommended {model, run, update, kl, gold, gain, smoothed_gain} or null
    fits               [{run, scorer ("score" or "gold/NAME"), form, formula, a, b, a_error, b_error, rmse, points, peak_kl}]
    tax                texts {source, tokens, models {name: figure}} (perplexity), tasks {task: {metric: {model: {value, error}}}}

`samples.jsonl`, a line for each prompt and sample: `number` and `prompt` (last question), `sample`, and `models` {name:
`response`, `tokens`, `stopped`, `kl`, `scores` {`score`, `gold/NAME`}}.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.base import intervals
from rlhf.base.intervals import Array
from rlhf.base.redaction import redact
from rlhf.base.storage import write_text
from rlhf.base.text import distinct_n, repetition
from rlhf.config import EvaluationConfig
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.evaluation import frontier, people
from rlhf.evaluation.bench import Bench
from rlhf.evaluation.judges import win_rates
from rlhf.evaluation.measure import Measured, Measurements
from rlhf.evaluation.scores import all_scores, base_logprobs
from rlhf.evaluation.tax import perplexity
from rlhf.models.responses import Answers
from rlhf.models.tokenization import last_user_text
from rlhf.registry import code_commit
from rlhf.run.tracker import Tracker

FORMAT = 1
Figures = dict[str, Any]


def run(config: EvaluationConfig) -> Figures:
    """Measure and compare policies; write and return the content of `evaluation.json`."""
    started = time.perf_counter()
    bench = Bench(config)
    verdicts = people.read_verdicts([Path(file) for file in config.verdicts])
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    comparison = bench.comparison
    policies = Measurements(bench)
    raw = {candidate.name: policies.measure(candidate) for candidate in comparison.models}
    snapshots, broken = policies.measure_snapshots(comparison.snapshots)
    checks = {candidate.name: policies.check(candidate) for candidate in comparison.models}
    best_of = policies.best_of() if config.best_of else None
    del policies  # the scorers need the memory of the reference
    answered = [*zip(comparison.models, (answers for answers, _, _ in raw.values()), strict=True), *snapshots]
    scores = all_scores(bench, [*(answers for _, answers in answered), *([best_of] if best_of else [])])
    base = base_logprobs(bench, [answers for answers, _, _ in raw.values()])
    measured = [Measured(*one, scores[i]) for i, one in enumerate(answered)]
    models = measured[: len(raw)]
    lines, chat_judge = win_rates(bench, models, verdicts, folder)
    result = {
        **_setting(bench, broken),
        "models": _models(bench, models, base, checks),
        "win_rates": lines,
        "chat_judge": chat_judge,
        "best_of_n": None if best_of is None else _best_of_n(bench, best_of, scores[-1]),
        "frontier": _frontier(bench, measured),
        "tax": _tax(bench, {name: (texts, tasks) for name, (_, texts, tasks) in raw.items()}),
        "seconds": round(time.perf_counter() - started, 1),
    }
    _track(bench, result)
    _write(folder, result, _samples(bench, models))
    return result


def _setting(bench: Bench, broken: list[str]) -> Figures:
    c, comparison = bench.config, bench.comparison
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_commit": code_commit(),
        "config": redact(dataclasses.asdict(c)),
        "prompts": {"source": c.dataset, "split": c.split, "count": len(bench.rows), "fingerprint": bench.fingerprint},
        "sampling": {
            "samples_per_prompt": c.samples_per_prompt,
            "temperature": c.temperature,
            "response_length": c.response_length,
            "seed": c.seed,
        },
        "reference": comparison.reference.reference,
        "baseline": comparison.baseline,
        "reward": redact(comparison.reward),
        "gold": redact(bench.gold),
        "marks": redact([*comparison.marks, *broken]),
    }


# Models


def _models(
    bench: Bench, models: Sequence[Measured], base: Sequence[tuple[Array, Array]], checks: Mapping[str, Figures]
) -> list[Figures]:
    training, prompts = TrainingPrompts(bench.registry), [row["prompt"] for row in bench.rows]
    lines = []
    for one, (logprobs, tokens) in zip(models, base, strict=True):
        artifact = one.candidate.artifact
        assert artifact is not None
        overlap = training.overlap(artifact, prompts)
        seed = bench.config.seed
        lines.append(
            {
                "name": one.candidate.name,
                "stage": artifact.stage,
                "hash": artifact.hash,
                "run_id": artifact.manifest.wandb_run_id,
                "overlap": overlap,
                "marks": [
                    f"{count} of {len(prompts)} prompts are among those that {name} was trained on"
                    for name, count in overlap.items()
                    if count
                ],
                "figures": {
                    **figures(one.answers, one.scores, seed),
                    "base_perplexity": perplexity(logprobs, tokens, one.answers.prompt, seed),
                    **checks[one.candidate.name],
                },
            }
        )
    return lines


def figures(answers: Answers, scores: Mapping[str, Array], seed: int = 0) -> Figures:
    """Return a policy's own figures, each with its interval over prompts."""
    prompt, lengths = answers.prompt, answers.lengths
    result = {name: intervals.mean(values, prompt, seed) for name, values in scores.items()}
    for name in ("kl", "kl_k3", "kl_full"):
        result[name] = intervals.mean(np.array(answers.sums[name]), prompt, seed)
    entropy = np.array(answers.sums["entropy"]) / lengths
    result["entropy"] = intervals.mean(entropy, prompt, seed, weights=lengths.astype(float))
    result["length"] = intervals.mean(lengths.astype(float), prompt, seed)
    result["stop_rate"] = intervals.mean(np.array(answers.stopped, dtype=float), prompt, seed)
    own = [answers.texts[i : i + answers.samples] for i in range(0, len(answers.texts), answers.samples)]
    for n in (1, 2, 3):
        long_enough = [texts for texts in own if any(len(text.split()) >= n for text in texts)]
        distinct = np.array([distinct_n(texts, n) for texts in long_enough])
        result[f"distinct_{n}"] = intervals.mean(distinct, np.arange(len(distinct)), seed)
    result["distinct_2_all"] = {"value": distinct_n(answers.texts, 2), "low": None, "high": None}
    result["repetition"] = intervals.mean(np.array([repetition(text) for text in answers.texts]), prompt, seed)
    return result


# Best-of-n and the frontier


def _best_of_n(bench: Bench, answers: Answers, scores: Mapping[str, Array]) -> Figures:
    table = {name: values.reshape(-1, answers.samples) for name, values in scores.items()}
    gold = {name.removeprefix("gold/"): values for name, values in table.items() if name != "score"}
    curve = frontier.best_of_n_curve(table["score"], gold, bench.config.seed)
    fits = []
    for name in table:
        values = [(line["score"] if name == "score" else line["gold"][name.removeprefix("gold/")]) for line in curve]
        gains = [value["value"] - values[0]["value"] for value in values]
        fit = frontier.fit("best_of_n", [line["kl"] for line in curve], gains)
        fits += [{"run": None, "scorer": name, **fit}] if fit else []
    return {
        "model": bench.comparison.reference.reference,
        "prompts": len(table["score"]),
        "samples": answers.samples,
        "curve": curve,
        "fits": fits,
    }


def _frontier(bench: Bench, measured: Sequence[Measured]) -> Figures:
    """Return every PPO policy and snapshot by its KL, the fits of each run, and the recommended checkpoint."""
    reference = next(one for one in measured if one.candidate.name == bench.comparison.reference.reference)
    policies = [one for one in measured if one.candidate.artifact is None or one.candidate.artifact.stage == "ppo"]
    points = [_point(one, reference, bench.config.seed) for one in policies]
    fits: list[Figures] = []
    for run in dict.fromkeys(point["run"] for point in points if point["run"]):
        own = [point for point in points if point["run"] == run]
        for scorer in reference.scores:
            gains = [_gain(point, scorer)["value"] for point in own]
            fit = frontier.fit("ppo", [point["kl"]["value"] for point in own], gains)
            fits += [{"run": run, "scorer": scorer, **fit}] if fit else []
    recommended = None
    if bench.gold:
        scorer = f"gold/{next(iter(bench.gold))}"
        recommended = frontier.recommend(
            [{**point, "kl": point["kl"]["value"], "gain": _gain(point, scorer)} for point in points],
            {fit["run"]: fit for fit in fits if fit["scorer"] == scorer},
            scorer.removeprefix("gold/"),
        )
    return {"points": points, "fits": fits, "recommended": recommended}


def _point(one: Measured, reference: Measured, seed: int) -> Figures:
    """Return a policy as a point of the frontier; its gains are paired by prompt, also in the bootstrap."""
    prompt = one.answers.prompt
    kl = intervals.mean(np.array(one.answers.sums["kl_full"]), prompt, seed)
    assert kl is not None and kl["value"] is not None
    own = {name: intervals.mean(values, prompt, seed) for name, values in one.scores.items()}
    gains = {name: intervals.mean(values - reference.scores[name], prompt, seed) for name, values in one.scores.items()}
    return {
        "model": one.candidate.name,
        "run": one.candidate.run,
        "update": one.candidate.update,
        "kl": kl,
        "sqrt_kl": math.sqrt(max(kl["value"], 0.0)),
        "score": own["score"],
        "score_gain": gains["score"],
        "gold": {name.removeprefix("gold/"): own[name] for name in own if name != "score"},
        "gold_gain": {name.removeprefix("gold/"): gains[name] for name in gains if name != "score"},
    }


def _gain(point: Mapping[str, Any], scorer: str) -> Figures:
    gain: Figures = point["score_gain"] if scorer == "score" else point["gold_gain"][scorer.removeprefix("gold/")]
    return gain


# Alignment tax


def _tax(bench: Bench, measured: Mapping[str, tuple[list[float], dict[str, Any]]]) -> Figures:
    """Return the part `tax`; `measured` holds for each model the texts' log-likelihoods and the tasks' figures."""
    tokens = np.array([len(row) - 1 for row in bench.windows])
    tasks: Figures = {}
    for name, (_, results) in measured.items():
        for task, metrics in results.items():
            for metric, value in metrics.items():
                tasks.setdefault(task, {}).setdefault(metric, {})[name] = value
    return {
        "texts": {
            "source": bench.text.name,
            "tokens": int(tokens.sum()),
            "models": {
                name: perplexity(np.array(logprobs), tokens, np.arange(len(tokens)), bench.config.seed)
                for name, (logprobs, _) in measured.items()
            },
        },
        "tasks": tasks,
    }


# Output


def _samples(bench: Bench, models: Sequence[Measured]) -> list[Figures]:
    return [
        {
            "number": number,
            "prompt": last_user_text(row["prompt"]),
            "sample": sample,
            "models": {one.candidate.name: _sample(one, number * one.answers.samples + sample) for one in models},
        }
        for number, row in enumerate(bench.rows)
        for sample in range(bench.config.samples_per_prompt)
    ]


def _sample(one: Measured, i: int) -> Figures:
    return {
        "response": one.answers.texts[i],
        "tokens": len(one.answers.tokens[i]),
        "stopped": one.answers.stopped[i],
        "kl": one.answers.sums["kl"][i],
        "scores": {name: float(values[i]) for name, values in one.scores.items()},
    }


def _write(folder: Path, result: Figures, samples: Sequence[Figures]) -> None:
    """Write both files, each whole or not at all; the result last, so that its samples always exist."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples)
    content = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("samples.jsonl", lines), ("evaluation.json", content)):
        write_text(folder / name, text)


def _track(bench: Bench, result: Figures) -> None:
    """Log figures as tables and metrics, in W&B and in the local record, with edges from every model."""
    c = bench.config
    with Tracker(
        Path(c.output_dir) / "tracking",
        stage="evaluation",
        name=f"{Path(c.output_dir).name}-evaluation",
        group=bench.comparison.reference.name,
        config=dataclasses.asdict(c),
        **c.tracking,
    ) as tracker:
        for line in result["models"]:
            tracker.use_artifact(line["name"], line["hash"])
        numbers = {
            f"evaluation/{line['name']}/{name}": figure["value"]
            for line in result["models"]
            for name, figure in line["figures"].items()
            if figure is not None
        }
        tracker.log(numbers, 0)
        tracker.log_table("evaluation/figures", figure_lines(result), 0)
        tracker.log_table("evaluation/win_rates", [_flat(line) for line in result["win_rates"]], 0)


def figure_lines(result: Figures) -> list[Figures]:
    """Return every figure of every model as a row `model`, `figure`, `value`, `low`, `high`."""
    return [
        {"model": line["name"], "figure": name, **figure}
        for line in result["models"]
        for name, figure in line["figures"].items()
        if figure is not None
    ]


def _flat(line: Figures) -> Figures:
    """Return a line of the win-rate table without nesting."""
    controlled = line["length_controlled"]
    plain = {key: value for key, value in line.items() if not isinstance(value, dict)}
    plain.pop("length_controlled", None)
    return {**plain, "p": line["sign_test"]["p"], "length_controlled": controlled and controlled["value"]}
