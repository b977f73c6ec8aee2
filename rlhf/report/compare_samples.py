"""Answers to the same prompts side by side, from the runs themselves or, where there is one, from an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.base.json_files import finite_number, section
from rlhf.report.compare_runs import RunFolder, mappings

SAMPLES_SHOWN = 40
LONGEST_TEXT = 1200
"""Characters of a sample; ten runs with answers of 1,000 tokens would make a page of many megabytes."""


def of_runs(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The prompts that each PPO stage answered before and after training: `speakers` and `rows`; {} for none."""
    speakers = [{"label": run.label, **run.source("ppo")} for run in runs]
    by_prompt: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for index, run in enumerate(runs):
        for row in run.samples:
            by_prompt.setdefault(str(row.get("prompt") or ""), []).append((index, row))
    rows = [
        _row(
            prompt,
            _before((f"SFT of {runs[n].label}", row.get("sft_response"), row.get("sft_score")) for n, row in answered),
            [_answer(n, row.get("ppo_response"), row.get("ppo_score"), row.get("sft_score")) for n, row in answered],
        )
        for prompt, answered in _spread_out(list(by_prompt.items()))
    ]
    return {"speakers": speakers, "rows": rows, "before": "the run's SFT answer"} if rows else {}


def of_evaluation(found: RunFolder) -> dict[str, Any]:
    """The first sample of each model on each prompt of an evaluation, as above; the baseline's answer is what is gained on."""
    models = mappings(found.evaluation, "models")
    names, baseline = [str(m.get("name")) for m in models], str(found.evaluation.get("baseline"))
    speakers = [
        {"label": name, "run_id": str(m.get("run_id") or ""), "manifest": str(m.get("hash") or "")}
        for name, m in zip(names, models, strict=True)
    ]
    rows = []
    for line in _spread_out([line for line in found.evaluated if line.get("sample") == 0]):
        said = section(line, "models")
        first = section(said, baseline)
        score = section(first, "scores").get("score")
        answers = [
            _answer(n, section(said, name).get("response"), section(section(said, name), "scores").get("score"), score)
            for n, name in enumerate(names)
            if name in said and name != baseline
        ]
        rows.append(_row(str(line.get("prompt") or ""), _before([(baseline, first.get("response"), score)]), answers))
    return {"speakers": speakers, "rows": rows, "before": f"that of {baseline}"} if rows else {}


def _spread_out(lines: Sequence[Any]) -> list[Any]:
    """Evenly spaced: a choice by score would show the best and hide the rest."""
    count = min(SAMPLES_SHOWN, len(lines))
    return [lines[i * len(lines) // count] for i in range(count)]


def _row(prompt: str, before: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    gains = [answer["gain"] for answer in answers if answer["gain"] is not None]
    scores = [answer["score"] for answer in answers if answer["score"] is not None]
    return {
        "prompt": _cut(prompt),
        "before": before,
        "answers": answers,
        "gain": max(gains, default=None),
        "loss": min(gains, default=None),
        "spread": max(scores) - min(scores) if scores else None,
    }


def _answer(speaker: int, text: Any, score: Any, before: Any) -> dict[str, Any]:
    now, then = finite_number(score), finite_number(before)
    gain = now - then if now is not None and then is not None else None
    return {"speaker": speaker, "text": _cut(text), "score": now, "gain": gain}


def _before(answers: Iterable[tuple[str, Any, Any]]) -> list[dict[str, Any]]:
    """What the answers are gained on; runs on the same SFT model share one."""
    found: dict[str, dict[str, Any]] = {}
    for label, text, score in answers:
        entry = found.setdefault(_cut(text), {"labels": [], "text": _cut(text), "score": finite_number(score)})
        entry["labels"].append(label)
    return list(found.values())


def _cut(text: Any) -> str:
    plain = str(text or "").strip()
    return plain if len(plain) <= LONGEST_TEXT else plain[:LONGEST_TEXT].rstrip() + " […]"
