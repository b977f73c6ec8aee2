"""The review of a stage: facts of its data and options, and statements on them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.config import TrainingConfig
from rlhf.data_prep.load import Loaded
from rlhf.doctor.plan.twin import read_shape
from rlhf.doctor.review import preferences, texts
from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.limits import judge
from rlhf.doctor.review.tables import INPUT_LIMITS
from rlhf.doctor.review.texts import Figures
from rlhf.doctor.statements import Statement
from rlhf.reward.functions import load_gold


def read_width(base_model: str, config: TrainingConfig) -> int | None:
    """Return the hidden size of a base model, from its config alone; None where that cannot be read."""
    if (width := getattr(config, "hidden_size", None)) is not None:
        return int(width)
    try:
        shape = read_shape(base_model, config.registry, trust_remote_code=getattr(config, "trust_remote_code", False))
        return int(shape.get_text_config().hidden_size)
    except (UserError, AttributeError):
        return None


def figures_of(
    stage: str,
    config: Any,
    sets: Mapping[str, Loaded],
    tokenizer: PreTrainedTokenizerBase | None,
    demonstrations: Loaded | None = None,
) -> Figures:
    """Return the figures of a stage's data.

    Args:
        tokenizer: counts tokens; None leaves out what needs them.
        demonstrations: those that the SFT model of a PPO run was trained on, if they are still in place.
    """
    figures = Figures()
    if stage == "pretrain" or not sets:
        return figures
    texts.left_out(sets["train"], figures)
    train = texts.spread_rows(sets["train"], texts.READ)
    if stage == "ppo":
        texts.of_prompts(train, figures)
    else:
        held_out, other = texts.spread_rows(sets["validation"], texts.READ), Figures()
        measure = texts.of_demonstrations if stage == "sft" else preferences.of_comparisons
        measure(train, figures)
        measure(held_out, other)
        _splits_differ(figures, other, min(len(train), len(held_out)))
        if stage == "reward":
            gold = load_gold(config.gold) if config.gold else None
            preferences.of_labels(train, held_out, config.min_rating_difference, figures, gold)
    if tokenizer is not None:
        _tokens(stage, config, sets["train"], tokenizer, demonstrations, figures)
    return figures


#: Shares of rows that training and held-out rows have in common.
_COMPARED = ("echoes", "rendered", "garbled", "commonest_answer", "cut_answers", "same_responses", "longer_wins")


def _splits_differ(train: Figures, held_out: Figures, rows: int) -> None:
    """Add the largest difference of the shares of two splits, less two standard errors, and whose it is."""
    names = [name for name in _COMPARED if name in train.values and name in held_out.values]
    error = 2 * (0.5 / rows) ** 0.5
    gaps = {name: abs(train.values[name] - held_out.values[name]) - error for name in names}
    if train.values.get("related", 9) < 2 and held_out.values.get("related", 0) > 4.5:
        gaps["related"] = 1.0
    if gaps and rows >= texts.ENOUGH:
        name = max(gaps, key=lambda key: gaps[key])
        words = f"{name}: {train.values[name]:.3g} in training rows, {held_out.values[name]:.3g} in held-out ones"
        train.add("splits_differ", max(gaps[name], 0.0), words)


def _tokens(
    stage: str,
    config: Any,
    data: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Loaded | None,
    figures: Figures,
) -> None:
    """Add figures of lengths in tokens, of a sample of the rows."""
    rows = texts.spread_rows(data, texts.TOKENISED)
    prompts, answers = texts.lengths(rows, tokenizer)
    if stage != "ppo":
        long = [p + max(own) > config.max_length for p, own in zip(prompts, answers, strict=True)]
        figures.add("too_long", sum(long) / len(long), f"of {len(long):,} rows")
    elif demonstrations is not None:
        shown = texts.spread_rows(demonstrations, texts.TOKENISED)
        theirs, answers = texts.lengths(shown, tokenizer)
        sizes = [own[0] for own in answers]
        figures.add("answer_tokens", sum(sizes) / len(sizes))
        figures.add("longer_than_response", sum(size > config.response_length for size in sizes) / len(sizes))
        figures.add("prompt_shift", sum(prompts) / len(prompts) / (sum(theirs) / len(theirs)))
        known = Figures()
        texts.of_prompts(texts.spread_rows(demonstrations, texts.READ), known)
        if known.values["distinct_prompts"] >= 50:
            figures.add("few_prompts", figures.values["distinct_prompts"] / known.values["distinct_prompts"])


def review_inputs(
    stage: str,
    config: TrainingConfig,
    base_model: str,
    sets: Mapping[str, Loaded],
    tokenizer: PreTrainedTokenizerBase | None,
    demonstrations: Loaded | None = None,
    rows: int | None = None,
) -> tuple[Facts, list[Statement]]:
    """Return the facts of a stage's data and options, and the statements on them.

    Args:
        sets: data sets by split; empty where they are not at hand.
        rows: training rows, where they are not those of `sets`.
    """
    try:
        figures = figures_of(stage, config, sets, tokenizer, demonstrations)
    except Exception as error:  # what is wrong with the data, the stage itself says best
        words = str(error).splitlines()
        print(f"the data is not reviewed: {words[0] if words else type(error).__name__}", file=sys.stderr, flush=True)
        figures = Figures()
    facts = Facts(
        stage=stage,
        config=config,
        width=read_width(base_model, config),
        rows=rows if rows is not None or not sets else len(sets["train"].rows),
        figures=figures.values,
        details=figures.details,
    )
    return facts, judge(INPUT_LIMITS, facts)


def with_figures(facts: Facts, figures: Figures) -> Facts:
    """Return facts with more figures."""
    return dataclasses.replace(
        facts, figures={**facts.figures, **figures.values}, details={**facts.details, **figures.details}
    )
