"""Scores of answers after all policies are closed: by rewards and independent scorers, and by the untuned base model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.base.intervals import Array
from rlhf.evaluation.answers import score_answers
from rlhf.evaluation.bench import Bench
from rlhf.models.base import fit_vocabulary, load_base
from rlhf.models.inputs import require_same_base
from rlhf.models.likelihood import mean_logprobs
from rlhf.models.responses import Answers
from rlhf.reward.sources import Opening, kind_of


def all_scores(bench: Bench, sets: Sequence[Answers]) -> list[dict[str, Array]]:
    """Return for each set of answers its scores (M,) by scorer: `score`, `gold/LABEL`."""
    by_scorer = {"score": _scores(bench, bench.comparison.reward, sets, gold=False)}
    for label, name in bench.gold.items():
        by_scorer[f"gold/{label}"] = _scores(bench, name, sets, gold=True)
    return [{scorer: scores[i] for scorer, scores in by_scorer.items()} for i in range(len(sets))]


def _scores(bench: Bench, name: str, sets: Sequence[Answers], *, gold: bool) -> list[Array]:
    """Return the scores (M,) of each set of answers by one scorer, which is in memory only here."""
    config = bench.config
    opening = Opening(
        config=config,
        compute=bench.compute,
        batch_size=config.per_device_eval_batch_size,
        timeout=config.judge_timeout,
        gold=gold,
        policy=bench.comparison.reference.manifest,
    )
    source = kind_of(name).open(name, opening)
    return [
        score_answers(
            source,
            answers,
            bench.prompts,
            bench.rows,
            pad_token_id=bench.options.pad_token_id,
            batch_size=config.per_device_eval_batch_size,
            device=bench.compute.device,
        )
        for answers in sets
    ]


def base_logprobs(bench: Bench, sets: Sequence[Answers]) -> list[tuple[Array, Array]]:
    """Return for each set of answers the mean log-likelihoods a token under the base model, nats, and token counts, (M,) each.

    The stop token does not count: when to stop is what SFT teaches, and an untuned model cannot know it.
    """
    manifest, base = bench.comparison.reference.manifest, None
    figures = []
    for answers in sets:
        key = {
            "base": [manifest.base_model, manifest.base_model_revision],
            "dtype": str(bench.compute.dtype),
            "prompts": bench.prompts,
            "responses": answers.tokens,
        }
        result = bench.results.read(key)
        if result is None:
            base = _untuned_base(bench) if base is None else base
            result = bench.results.write(key, _response_logprobs(bench, base, answers))
        figures.append((np.array(result), np.array([len(text) for text in _without_stop(answers)])))
    return figures


def _untuned_base(bench: Bench) -> PreTrainedModel:
    reference = bench.comparison.reference
    manifest = reference.manifest
    require_same_base(reference, bench.config.registry)
    base = load_base(manifest.base_model, bench.config, bench.compute, revision=manifest.base_model_revision)
    fit_vocabulary(base.requires_grad_(False), reference.path)
    return base


def _without_stop(answers: Answers) -> list[list[int]]:
    return [row[:-1] if end else row for row, end in zip(answers.tokens, answers.stopped, strict=True)]


def _response_logprobs(bench: Bench, base: PreTrainedModel, answers: Answers) -> list[float]:
    """Return the mean log-likelihood a token (M,) of each answer under the base model; 0 where an answer is empty."""
    texts = _without_stop(answers)
    rows = [i for i, text in enumerate(texts) if text]
    means = np.zeros(len(texts))
    if rows:
        prompts = [bench.prompts[int(answers.prompt[i])] for i in rows]
        means[rows] = mean_logprobs(
            base,
            [[*prompt, *texts[i]] for prompt, i in zip(prompts, rows, strict=True)],
            list(map(len, prompts)),
            torch.from_numpy(answers.prompt[rows]),
            pad_token_id=bench.options.pad_token_id,
            compute=bench.compute,
            batch_size=bench.config.per_device_eval_batch_size,
        ).numpy()
    return [float(mean) for mean in means]
