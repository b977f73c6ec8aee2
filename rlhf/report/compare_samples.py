"""Answers to the same prompts side by side, of the runs themselves or, where there is one, of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.base.json_files import finite_number, section
from rlhf.report.page import evenly_spaced
from rlhf.report.run_folder import RunFolder

SAMPLES_SHOWN = 40
LONGEST_TEXT = 1200
"""Characters of a sample; ten runs with answers of 1,000 tokens would make a page of many megabytes."""


def run_samples(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the prompts that each PPO stage answered before and after training: `speakers` and `rows`; {} for none."""
    speakers = [{"label": run.label, **run.source("ppo")} for run in runs]
    by_prompt: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for index, run in enumerate(runs):
        for row in run.samples:
            by_prompt.setdefault(str(row.get("prompt") or ""), []).append((index, row))
    rows = [
        _row(
            prompt,
            _baselines(
                (f"SFT of {runs[n].label}", row.get("sft_response"), row.get("sft_score")) for n, row in answers
            ),
            [_answer(n, row.get("ppo_response"), row.get("ppo_score"), row.get("sft_score")) for n, row in answers],
        )
        for prompt, answers in evenly_spaced(list(by_prompt.items()), SAMPLES_SHOWN)
    ]
    return {"speakers": speakers, "rows": rows, "before": "the run's SFT answer"} if rows else {}


def evaluation_samples(evaluation: RunFolder) -> dict[str, Any]:
    """Return the first sample of each model on each prompt of an evaluation, with gains over the baseline's answer."""
    speakers, baseline = evaluation.evaluated_models(), str(evaluation.evaluation.get("baseline"))
    rows = []
    for line in evenly_spaced([line for line in evaluation.evaluated if line.get("sample") == 0], SAMPLES_SHOWN):
        samples = section(line, "models")
        first = section(samples, baseline)
        score = _score(first)
        answers = [
            _answer(n, section(samples, name).get("response"), _score(section(samples, name)), score)
            for n, name in enumerate(speaker["label"] for speaker in speakers)
            if name in samples and name != baseline
        ]
        rows.append(
            _row(str(line.get("prompt") or ""), _baselines([(baseline, first.get("response"), score)]), answers)
        )
    return {"speakers": speakers, "rows": rows, "before": f"that of {baseline}"} if rows else {}


def _score(sample: Mapping[str, Any]) -> Any:
    return section(sample, "scores").get("score")


def _row(prompt: str, baselines: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    gains = [answer["gain"] for answer in answers if answer["gain"] is not None]
    scores = [answer["score"] for answer in answers if answer["score"] is not None]
    return {
        "prompt": _cut(prompt),
        "before": baselines,
        "answers": answers,
        "gain": max(gains, default=None),
        "loss": min(gains, default=None),
        "spread": max(scores) - min(scores) if scores else None,
    }


def _answer(speaker: int, text: Any, score: Any, baseline: Any) -> dict[str, Any]:
    return {"speaker": speaker, "text": _cut(text), "score": finite_number(score), "gain": gain(baseline, score)}


def gain(before: Any, after: Any) -> float | None:
    """Return the difference of two scores; None unless both are known."""
    first, last = finite_number(before), finite_number(after)
    return None if first is None or last is None else last - first


def _baselines(answers: Iterable[tuple[str, Any, Any]]) -> list[dict[str, Any]]:
    """Return the answers that gains are measured from; runs on one SFT model share theirs."""
    by_text: dict[str, dict[str, Any]] = {}
    for label, text, score in answers:
        answer = by_text.setdefault(_cut(text), {"labels": [], "text": _cut(text), "score": finite_number(score)})
        answer["labels"].append(label)
    return list(by_text.values())


def _cut(text: Any) -> str:
    plain = str(text or "").strip()
    return plain if len(plain) <= LONGEST_TEXT else plain[:LONGEST_TEXT].rstrip() + " […]"
