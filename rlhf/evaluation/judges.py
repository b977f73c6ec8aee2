"""Win rates of policies against the baseline, by every judge: reward, gold scorers, people, and a chat model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.base.intervals import Array
from rlhf.base.redaction import redact
from rlhf.evaluation import people
from rlhf.evaluation.bench import Bench
from rlhf.evaluation.chat import ChatJudge, Pair, cost
from rlhf.evaluation.measure import Measured
from rlhf.evaluation.winrate import Preferences, by_scores, win_rate

Figures = dict[str, Any]


def win_rates(
    bench: Bench, models: Sequence[Measured], verdicts: dict[str, list[float]], folder: Path
) -> tuple[list[Figures], Figures | None]:
    """Return the lines of the win-rate table, and the figures of the chat judge; None without one.

    Args:
        verdicts: people's verdicts by pair, as `people.read_verdicts` returns them.
        folder: where the chat judge's replies are saved.
    """
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
    people.check_pairs(every, c.seed, verdicts)
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
    judged = {name: judge(some) for name, some in pairs.items()}
    for one in rivals:
        won = judged[one.candidate.name].won
        lines.append(_line(bench, one, baseline, c.judge_model, "chat", _verdicts(won), chosen))
    tokens = (sum(v.tokens[0] for v in judged.values()), sum(v.tokens[1] for v in judged.values()))
    return lines, {
        "model": c.judge_model,
        "asked": sum(v.requests for v in judged.values()),
        "tokens": list(tokens),
        "cost": cost(tokens, c.judge_prices),
        "split": {name: v.split for name, v in judged.items()},
    }


def _judge(bench: Bench, scorer: str) -> tuple[str, str]:
    """Return name and kind of a scorer as a judge."""
    return (redact(bench.comparison.reward), "reward") if scorer == "score" else (scorer.removeprefix("gold/"), "gold")


def _judged_pairs(answers: int, samples: int, limit: int) -> Array:
    """Return the numbers of the answers for costly judges: the first sample of every prompt, then the second, ..."""
    numbers = np.arange(answers)
    return numbers[np.lexsort((numbers // samples, numbers % samples))][:limit]


def _pairs(bench: Bench, one: Measured, baseline: Measured, chosen: Array) -> list[Pair]:
    prompts = [conversation_text(row["prompt"]) for row in bench.rows]
    return [
        Pair(prompts[one.answers.prompt[i]], one.answers.texts[i], baseline.answers.texts[i]) for i in chosen.tolist()
    ]


def conversation_text(prompt: Sequence[Mapping[str, str]]) -> str:
    """Return a prompt as a judge reads it: a single message alone, several with their roles."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _verdicts(won: Sequence[float | None]) -> Array:
    """Return verdicts (n,), NaN where there is none."""
    return np.array([math.nan if value is None else value for value in won])


def _line(
    bench: Bench, one: Measured, baseline: Measured, judge: str, kind: str, won: Array, chosen: Array | None = None
) -> Figures:
    """Return a line of the win-rate table; `chosen` are the numbers of the judged answers, all if not given."""
    numbers = np.arange(len(won)) if chosen is None else chosen
    longer = (one.answers.lengths - baseline.answers.lengths)[numbers]
    judged = np.isfinite(won)
    preferences = Preferences(won=won[judged], prompt=one.answers.prompt[numbers][judged], longer=longer[judged])
    return {
        "model": one.candidate.name,
        "baseline": baseline.candidate.name,
        "judge": judge,
        "kind": kind,
        **win_rate(preferences, bench.config.seed),
        "unjudged": int((~judged).sum()),
    }
