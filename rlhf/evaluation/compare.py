"""What policies are worth, side by side: `python -m rlhf.evaluation --models sft/A ppo/B ppo/C --prompts DATA`

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
    marks              what a reader of the whole has to know: compared by force, a run or snapshot left out
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
                         distinct_2_all         the same over all answers; without interval, as a prompt that is drawn twice
                                                repeats itself
                         repetition             share of 4-grams of words that an answer has had before
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.base import intervals
from rlhf.base.intervals import Array
from rlhf.base.redaction import redact
from rlhf.base.text import distinct_n, repetition
from rlhf.config import EvaluationConfig
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.evaluation import frontier, people
from rlhf.evaluation.answers import Answers
from rlhf.evaluation.bench import Bench, measured_or_left_out
from rlhf.evaluation.candidates import Candidate
from rlhf.evaluation.chat import ChatJudge, Pair, cost
from rlhf.evaluation.tax import perplexity
from rlhf.evaluation.winrate import Preferences, by_scores, win_rate
from rlhf.models.tokenization import last_user_text
from rlhf.registry import code_commit
from rlhf.run.tracker import Tracker

FORMAT = 1
Figures = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A policy with its answers and their scores, (M,) by scorer: `score`, `gold/NAME`."""

    candidate: Candidate
    answers: Answers
    scores: dict[str, Array]


def run(config: EvaluationConfig) -> Figures:
    """Measures, judges and compares; writes, prints and returns the content of `evaluation.json`."""
    started = time.perf_counter()
    bench = Bench(config)
    verdicts = people.read_verdicts([Path(file) for file in config.verdicts])
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    comparison = bench.comparison
    raw = {candidate.name: bench.measure(candidate) for candidate in comparison.models}
    snapshots, broken = measured_or_left_out(bench, comparison.snapshots)
    checks = {candidate.name: bench.checked(candidate) for candidate in comparison.models}
    best_of = bench.best_of() if config.best_of else None
    answered = [*zip(comparison.models, (answers for answers, _, _ in raw.values()), strict=True), *snapshots]
    scores = _all_scores(bench, [*(answers for _, answers in answered), *([best_of] if best_of else [])])
    base = bench.base_logprobs([answers for answers, _, _ in raw.values()])
    measured = [Measured(*one, scores[i]) for i, one in enumerate(answered)]
    models = measured[: len(raw)]
    win_rates, chat_judge = _win_rates(bench, models, verdicts, folder)
    result = {
        **_setting(bench, broken),
        "models": _models(bench, models, base, checks),
        "win_rates": win_rates,
        "chat_judge": chat_judge,
        "best_of_n": None if best_of is None else _best_of_n(bench, best_of, scores[-1]),
        "frontier": _frontier(bench, measured),
        "tax": _tax(bench, {name: (texts, tasks) for name, (_, texts, tasks) in raw.items()}),
        "seconds": round(time.perf_counter() - started, 1),
    }
    _track(bench, result)
    _write(folder, result, _samples(bench, models))
    return result


def _all_scores(bench: Bench, sets: Sequence[Answers]) -> list[dict[str, Array]]:
    """For each set of answers its scores by scorer."""
    by_scorer = {"score": bench.scores(bench.comparison.reward, sets, gold=False)}
    for name, reference in bench.gold.items():
        by_scorer[f"gold/{name}"] = bench.scores(reference, sets, gold=True)
    return [{name: found[i] for name, found in by_scorer.items()} for i in range(len(sets))]


def _setting(bench: Bench, broken: list[str]) -> Figures:
    c, comparison = bench.config, bench.comparison
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_commit": code_commit(),
        "config": redact(dataclasses.asdict(c)),
        "prompts": {"source": c.prompts, "split": c.split, "count": len(bench.rows), "fingerprint": bench.fingerprint},
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
    bench: Bench,
    models: Sequence[Measured],
    base: Sequence[tuple[Array, Array]],
    checks: Mapping[str, Figures],
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
    """A policy's own figures, each with its interval over prompts."""
    prompt, lengths = answers.prompt, answers.lengths
    found = {name: intervals.mean(values, prompt, seed) for name, values in scores.items()}
    for name in ("kl", "kl_k3", "kl_full"):
        found[name] = intervals.mean(np.array(answers.sums[name]), prompt, seed)
    entropy = np.array(answers.sums["entropy"]) / lengths
    found["entropy"] = intervals.mean(entropy, prompt, seed, weights=lengths.astype(float))
    found["length"] = intervals.mean(lengths.astype(float), prompt, seed)
    found["stop_rate"] = intervals.mean(np.array(answers.stopped, dtype=float), prompt, seed)
    own = [answers.texts[i : i + answers.samples] for i in range(0, len(answers.texts), answers.samples)]
    for n in (1, 2, 3):
        long_enough = [texts for texts in own if any(len(text.split()) >= n for text in texts)]
        distinct = np.array([distinct_n(texts, n) for texts in long_enough])
        found[f"distinct_{n}"] = intervals.mean(distinct, np.arange(len(distinct)), seed)
    found["distinct_2_all"] = {"value": distinct_n(answers.texts, 2), "low": None, "high": None}
    found["repetition"] = intervals.mean(np.array([repetition(text) for text in answers.texts]), prompt, seed)
    return found


# Win rates


def _win_rates(
    bench: Bench, models: Sequence[Measured], verdicts: dict[str, list[float]], folder: Path
) -> tuple[list[Figures], Figures | None]:
    c, comparison = bench.config, bench.comparison
    baseline = next(one for one in models if one.candidate.name == comparison.baseline)
    rivals = [one for one in models if one is not baseline]
    lines = [
        _line(bench, one, baseline, *_judge(bench, name), by_scores(scores, baseline.scores[name]))
        for one in rivals
        for name, scores in one.scores.items()
    ]
    chosen = _judged_pairs(len(baseline.answers.texts), baseline.answers.samples, c.judge_pairs)
    pairs = {one.candidate.name: _pairs(bench, one, baseline, chosen) for one in rivals}
    every = [pair for some in pairs.values() for pair in some]
    people.check_known(every, c.seed, verdicts)
    if c.export_comparison:
        count = people.export(Path(c.export_comparison), every, c.seed)
        print(
            f"{count} pairs for people in {c.export_comparison}: write A, B or tie as verdict, then add --verdicts FILE"
        )
    if verdicts:
        for one in rivals:
            won = people.unblind(pairs[one.candidate.name], c.seed, verdicts)
            lines.append(_line(bench, one, baseline, "people", "people", _verdicts(won), chosen))
    if c.judge_url is None or c.judge_model is None:
        return lines, None
    judge = ChatJudge(
        c.judge_url, c.judge_model, folder / "judge.jsonl", parallel=c.judge_parallel, timeout=c.judge_timeout
    )
    told = {name: judge(some) for name, some in pairs.items()}
    for one in rivals:
        won = told[one.candidate.name].won
        lines.append(_line(bench, one, baseline, c.judge_model, "chat", _verdicts(won), chosen))
    tokens = (sum(t.tokens[0] for t in told.values()), sum(t.tokens[1] for t in told.values()))
    return lines, {
        "model": c.judge_model,
        "asked": sum(t.asked for t in told.values()),
        "tokens": list(tokens),
        "cost": cost(tokens, c.judge_prices),
        "split": {name: t.split for name, t in told.items()},
    }


def _judge(bench: Bench, scorer: str) -> tuple[str, str]:
    """Name and kind of a scorer as a judge."""
    return (redact(bench.comparison.reward), "reward") if scorer == "score" else (scorer.removeprefix("gold/"), "gold")


def _judged_pairs(answers: int, samples: int, limit: int) -> Array:
    """Numbers of the answers that cost something to judge: the first sample of every prompt, then the second, ..."""
    numbers = np.arange(answers)
    return numbers[np.lexsort((numbers // samples, numbers % samples))][:limit]


def _pairs(bench: Bench, one: Measured, baseline: Measured, chosen: Array) -> list[Pair]:
    prompts = [_conversation(row["prompt"]) for row in bench.rows]
    return [
        Pair(prompts[one.answers.prompt[i]], one.answers.texts[i], baseline.answers.texts[i]) for i in chosen.tolist()
    ]


def _conversation(prompt: Sequence[Mapping[str, str]]) -> str:
    """What a judge reads: the question alone, or who said what where more was said."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _verdicts(won: Sequence[float | None]) -> Array:
    """(n,) with NaN where there is no verdict."""
    return np.array([math.nan if value is None else value for value in won])


def _line(
    bench: Bench, one: Measured, baseline: Measured, judge: str, kind: str, won: Array, chosen: Array | None = None
) -> Figures:
    """A line of the win-rate table; `chosen` are the numbers of the answers that were judged, all if not given."""
    numbers = np.arange(len(won)) if chosen is None else chosen
    longer = (one.answers.lengths - baseline.answers.lengths)[numbers]
    known = np.isfinite(won)
    preferences = Preferences(won=won[known], prompt=one.answers.prompt[numbers][known], longer=longer[known])
    return {
        "model": one.candidate.name,
        "baseline": baseline.candidate.name,
        "judge": judge,
        "kind": kind,
        **win_rate(preferences, bench.config.seed),
        "unjudged": int((~known).sum()),
    }


# Best-of-n and the frontier


def _best_of_n(bench: Bench, answers: Answers, scores: Mapping[str, Array]) -> Figures:
    table = {name: values.reshape(-1, answers.samples) for name, values in scores.items()}
    gold = {name.removeprefix("gold/"): values for name, values in table.items() if name != "score"}
    curve = frontier.best_of_n_curve(table["score"], gold, bench.config.seed)
    fits = []
    for name in table:
        values = [(line["score"] if name == "score" else line["gold"][name.removeprefix("gold/")]) for line in curve]
        gains = [value["value"] - values[0]["value"] for value in values]
        found = frontier.fit("best_of_n", [line["kl"] for line in curve], gains)
        fits += [{"run": None, "scorer": name, **found}] if found else []
    return {
        "model": bench.comparison.reference.reference,
        "prompts": len(table["score"]),
        "samples": answers.samples,
        "curve": curve,
        "fits": fits,
    }


def _frontier(bench: Bench, measured: Sequence[Measured]) -> Figures:
    """Every PPO policy and snapshot by its KL, the fits of each run, and the checkpoint to use."""
    reference = next(one for one in measured if one.candidate.name == bench.comparison.reference.reference)
    policies = [one for one in measured if one.candidate.artifact is None or one.candidate.artifact.stage == "ppo"]
    points = [_point(one, reference, bench.config.seed) for one in policies]
    fits: list[Figures] = []
    for run in dict.fromkeys(point["run"] for point in points if point["run"]):
        own = [point for point in points if point["run"] == run]
        for scorer in reference.scores:
            gains = [_gain(point, scorer)["value"] for point in own]
            found = frontier.fit("ppo", [point["kl"]["value"] for point in own], gains)
            fits += [{"run": run, "scorer": scorer, **found}] if found else []
    recommended = None
    if bench.gold:
        scorer = f"gold/{next(iter(bench.gold))}"
        recommended = frontier.recommend(
            [{**point, "kl": point["kl"]["value"], "gain": _gain(point, scorer)} for point in points],
            {found["run"]: found for found in fits if found["scorer"] == scorer},
            scorer.removeprefix("gold/"),
        )
    return {"points": points, "fits": fits, "recommended": recommended}


def _point(one: Measured, reference: Measured, seed: int) -> Figures:
    """A policy on the frontier. Its gains are paired: the same prompts, drawn together in the bootstrap."""
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
    found: Figures = point["score_gain"] if scorer == "score" else point["gold_gain"][scorer.removeprefix("gold/")]
    return found


# Alignment tax


def _tax(bench: Bench, found: Mapping[str, tuple[list[float], dict[str, Any]]]) -> Figures:
    tokens = np.array([len(row) - 1 for row in bench.windows])
    tasks: Figures = {}
    for name, (_, judged) in found.items():
        for task, metrics in judged.items():
            for metric, value in metrics.items():
                tasks.setdefault(task, {}).setdefault(metric, {})[name] = value
    return {
        "texts": {
            "source": bench.text.name,
            "tokens": int(tokens.sum()),
            "models": {
                name: perplexity(np.array(logprobs), tokens, np.arange(len(tokens)), bench.config.seed)
                for name, (logprobs, _) in found.items()
            },
        },
        "tasks": tasks,
    }


# What becomes of it


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
    """Both files whole or not at all; the result last, so that it never speaks of samples that are not there."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples)
    content = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("samples.jsonl", lines), ("evaluation.json", content)):
        partial = folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _track(bench: Bench, result: Figures) -> None:
    """Figures as tables and metrics, in W&B and in the local record, with edges from every model."""
    c = bench.config
    with Tracker(
        Path(c.output_dir) / "tracking",
        stage="evaluation",
        name=f"{Path(c.output_dir).name}-evaluation",
        group=bench.comparison.reference.name,
        config=dataclasses.asdict(c),
        wandb_mode=c.wandb_mode,
        wandb_project=c.wandb_project,
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
    """Every figure of every model as a line `model`, `figure`, `value`, `low`, `high`."""
    return [
        {"model": line["name"], "figure": name, **figure}
        for line in result["models"]
        for name, figure in line["figures"].items()
        if figure is not None
    ]


def _flat(line: Figures) -> Figures:
    """A win rate in columns."""
    controlled = line["length_controlled"]
    plain = {key: value for key, value in line.items() if not isinstance(value, dict)}
    plain.pop("length_controlled", None)
    return {**plain, "p": line["sign_test"]["p"], "length_controlled": controlled and controlled["value"]}
