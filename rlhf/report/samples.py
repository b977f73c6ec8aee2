"""Answers to the same prompts side by side: of a run before and after PPO, of several runs, or of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.base.json_files import finite_number, section
from rlhf.report.page import evenly_spaced
from rlhf.report.run_folder import RunFolder

COMPARED_SHOWN, RUN_SHOWN = 40, 20
"""Prompts on the page of several runs, and on that of one."""
LONGEST_TEXT = 1200
"""Characters of a sample; ten runs with answers of 1,000 tokens would make a page of many megabytes."""
LONGEST_EXAMPLE = 400
"""Characters of a text on the first screen; it stands below as a whole."""


class Answer(NamedTuple):
    """An answer with its score."""

    label: str
    text: str
    score: float | None
    gain: float | None
    """Over the answer before; None for that one itself."""
    color: str
    run_id: str = ""


class Sample(NamedTuple):
    """A prompt with its answers."""

    prompt: str
    answers: list[Answer]
    orders: dict[str, float]
    """What samples are sorted by."""

    @property
    def mean_gain(self) -> float | None:
        """The mean gain of its answers, None where no score is known."""
        gains = [answer.gain for answer in self.answers if answer.gain is not None]
        return sum(gains) / len(gains) if gains else None


def own_samples(run: RunFolder) -> list[Sample]:
    """Return all prompts that a run's PPO stage answered before and after training."""
    samples = []
    for row in run.samples:
        before, score = row.get("sft_score"), row.get("ppo_score")
        answers = [
            Answer("SFT", cut(row.get("sft_response")), finite_number(before), None, "base"),
            Answer("PPO", cut(row.get("ppo_response")), finite_number(score), gain(before, score), "main"),
        ]
        orders = {"gain": gain(before, score), "ppo": finite_number(score)}
        samples.append(Sample(cut(row.get("prompt")), answers, _numbers(orders)))
    return samples


def examples(samples: Sequence[Sample], answers: int = 4) -> list[Sample]:
    """Return the prompts at the lower quartile, the median and the upper quartile of the gain in score, with short texts."""
    scored = sorted(((sample.mean_gain, index) for index, sample in enumerate(samples) if sample.mean_gain is not None))
    last = len(scored) - 1
    chosen = scored if last < 3 else [scored[round(last * share)] for share in (0.25, 0.5, 0.75)]
    return [
        Sample(
            cut(samples[index].prompt, LONGEST_EXAMPLE),
            [answer._replace(text=cut(answer.text, LONGEST_EXAMPLE)) for answer in samples[index].answers[:answers]],
            {},
        )
        for _, index in chosen
    ]


def example_rule(samples: Sequence[Sample], answers: int = 4) -> str:
    """Return how the examples of the first screen were chosen."""
    of = f"Of {len(samples)} held-out prompts those at the lower quartile, the median and the upper quartile of the gain."
    left = max((len(sample.answers) for sample in samples), default=0) - answers
    return (of if len(samples) > 3 else "") + (f" {left} more answers of each are below." if left > 0 else "")


def run_samples(runs: Sequence[RunFolder]) -> list[Sample]:
    """Return the prompts that the PPO stages answered before and after training, with the answers of all runs."""
    by_prompt: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for index, run in enumerate(runs):
        for row in run.samples:
            by_prompt.setdefault(str(row.get("prompt") or ""), []).append((index, row))
    return [
        _sample(
            prompt,
            _baselines([
                (f"SFT of {runs[n].label}", row.get("sft_response"), row.get("sft_score")) for n, row in answers
            ], "SFT"),
            {n: _answer(runs[n].label, n, row.get("ppo_response"), row.get("ppo_score"), row.get("sft_score"),
                        runs[n].source("ppo")["run_id"]) for n, row in answers},
        )
        for prompt, answers in by_prompt.items()
    ]  # fmt: skip


def evaluation_samples(evaluation: RunFolder) -> list[Sample]:
    """Return the first sample of each model on each prompt of an evaluation, with gains over the baseline's answer."""
    speakers, baseline = evaluation.evaluated_models(), str(evaluation.evaluation.get("baseline"))
    samples = []
    for line in evenly_spaced([line for line in evaluation.evaluated if line.get("sample") == 0], COMPARED_SHOWN):
        models = section(line, "models")
        first = section(models, baseline)
        score = _score(first)
        answers = {
            n: _answer(name, n, section(models, name).get("response"), _score(section(models, name)), score, run_id)
            for n, (name, run_id) in enumerate((speaker["label"], speaker["run_id"]) for speaker in speakers)
            if name in models and name != baseline
        }
        before = _baselines([(baseline, first.get("response"), score)])
        samples.append(_sample(str(line.get("prompt") or ""), before, answers))
    return samples


def orders(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return the orders in which the samples of several runs can be shown, as key and name."""
    general = [("-gain", "best gain first"), ("loss", "worst loss first"), ("-spread", "largest disagreement first")]
    own = [
        pair
        for number, label in enumerate(labels)
        for pair in ((f"-by{number}", f"best gain of {label} first"), (f"by{number}", f"worst loss of {label} first"))
    ]
    return [*general, *own]


def _score(sample: Mapping[str, Any]) -> Any:
    return section(sample, "scores").get("score")


def _sample(prompt: str, before: list[Answer], answers: Mapping[int, Answer]) -> Sample:
    gains = {n: answer.gain for n, answer in answers.items() if answer.gain is not None}
    scores = [answer.score for answer in answers.values() if answer.score is not None]
    values = {
        "gain": max(gains.values(), default=None), "loss": min(gains.values(), default=None),
        "spread": max(scores) - min(scores) if scores else None, **{f"by{n}": value for n, value in gains.items()},
    }  # fmt: skip
    return Sample(cut(prompt), [*before, *answers.values()], _numbers(values))


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _answer(label: str, number: int, text: Any, score: Any, before: Any, run_id: str) -> Answer:
    return Answer(label, cut(text), finite_number(score), gain(before, score), f"r{number % 10}", run_id)


def gain(before: Any, after: Any) -> float | None:
    """Return the difference of two scores; None unless both are known."""
    first, last = finite_number(before), finite_number(after)
    return None if first is None or last is None else last - first


def _baselines(answers: Sequence[tuple[str, Any, Any]], shared: str = "") -> list[Answer]:
    """Return the answers that gains are measured from; runs on one SFT model share theirs, under the name `shared`."""
    by_text: dict[str, Answer] = {}
    for label, text, score in answers:
        answer = by_text.get(cut(text))
        names = f"{answer.label}, {label}" if answer else label
        by_text[cut(text)] = Answer(names, cut(text), finite_number(score), None, "base")
    together = shared and len(by_text) < len(answers) and len(by_text) == 1
    return [answer._replace(label=shared) if together else answer for answer in by_text.values()]


def cut(text: Any, longest: int = LONGEST_TEXT) -> str:
    """Return a text, or the beginning of a long one."""
    plain = str(text or "").strip()
    return plain if len(plain) <= longest else plain[:longest].rstrip() + " […]"
