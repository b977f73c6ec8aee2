"""The report card of a reward model: is it good, and good for PPO?

`rlhf card --model reward/NAME --dataset FOLDER` judges a registered model on any comparisons and writes
`card.json`, `scores.jsonl` and `report.html`; the reward stage makes the same card on its own held-out comparisons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlhf.base.errors import require, run_command
from rlhf.base.functions import load_function
from rlhf.base.intervals import Array
from rlhf.config import RewardCardConfig, parse_config
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.data_prep.writable import writable
from rlhf.evaluation.card import hack_probes, statistics
from rlhf.evaluation.card.evidence import Options, PolicyEvidence, first_rankings, first_rows, policy_evidence
from rlhf.evaluation.card.judged import Judged, RatedPairs, judge_rows, rated_pairs
from rlhf.evaluation.card.output import Card, log_card, print_card, save_card
from rlhf.evaluation.card.verdict import flags, verdict
from rlhf.models.base import context_length, load_policy
from rlhf.models.compute import Compute
from rlhf.models.tokenization import last_user_text, load_tokenizer
from rlhf.registry import Registry
from rlhf.report.card_page import write_card_page
from rlhf.reward.functions import load_gold
from rlhf.reward.rankings import Encoded, encode_rankings
from rlhf.reward.scorer import Scorer, open_scorer
from rlhf.run.tracker import Tracker

RIVALS_LEARN_FROM = 20_000
"""Training rankings that length and bag of words learn from, at most: more take long and change little."""


def make_card(
    scorer: Scorer,
    name: str,
    training: Encoded,
    held_out: Encoded,
    evidence: PolicyEvidence,
    options: Options,
    max_length: int,
    seen: Set[str] | None,
) -> tuple[Card, list[dict[str, Any]]]:
    """Return the card as plain data, and a row for each held-out response with its scores.

    Args:
        name: the model's name in the verdict.
        evidence: measurements of the policy that the model was trained on.
        max_length: longest prompt and response together, tokens.
        seen: keys of the training comparisons' prompts; None where these are not known.
    """
    judged = judge_rows(held_out.rows, seen, options.slice_columns)
    rows = [ids for row in held_out.rows["input_ids"] for ids in row]
    raw = scorer.raw(rows, torch.from_numpy(judged.ranking)).double().numpy()
    scores = (raw - scorer.mean) / scorer.std
    minimum, seed = options.eval_rating_difference, options.seed
    pairs = rated_pairs(judged.ratings, judged, minimum)
    new = None if judged.seen is None else pairs.where(~judged.seen[pairs.better])
    own, ceiling = statistics.raters(scores, judged, minimum, seed)
    rivals = _rivals(judged, training.rows, evidence, seed)
    gold = _gold(options.gold, judged.texts)
    card: Card = {
        "model": name,
        "rankings": len(held_out.rows),
        "responses": len(judged.texts),
        "left_out": {"train": training.left_out, "validation": held_out.left_out},
        "min_rating_difference": minimum,
        "accuracy": statistics.accuracy(scores, pairs, seed),
        "accuracy_held_out_prompts": None if new is None else statistics.accuracy(scores, new, seed),
        "accuracy_held_out_raters": own,
        "human_ceiling": ceiling,
        "gold_accuracy": None if gold is None else statistics.accuracy(gold, pairs, seed),
        "rivals": _compare(rivals, scores, pairs, seed),
        "calibration": statistics.calibration(raw, pairs),
        "slices": statistics.slices(scores, judged, minimum, seed),
        "length": statistics.length_bias(scores, judged, minimum, seed),
        "probes": _probe(scorer, held_out.rows, scores, judged, options.card_probe_answers, max_length),
        "samples": _samples(scorer, training.rows, evidence, options),
    }
    card["notes"] = _notes(held_out.rows, judged)
    card["flags"] = flags(card)
    card["verdict"] = verdict(card)
    return card, _score_rows(held_out.rows, judged, scores, rivals)


def _notes(rows: Dataset, judged: Judged) -> list[str]:
    """Return the reasons for figures that are missing although the data could have held them."""
    notes = []
    raters = rows["rater_ratings"] if "rater_ratings" in rows.column_names else []
    several = any(min(map(len, ranking), default=0) > 1 for ranking in raters if ranking)
    if judged.held_out is None and several:
        notes.append(
            "no human ceiling: several raters rated these responses and none is held out; prepare the data with "
            "held_out_raters (rlhf data), or leave out the column 'ratings'"
        )
    if judged.seen is None:
        notes.append(
            "no accuracy on new prompts: the comparisons that the model was trained on are gone, or have changed since"
        )
    return notes


# Parts of the card


def _rivals(judged: Judged, rows: Dataset, evidence: PolicyEvidence, seed: int) -> dict[str, Array]:
    """Return the scores of the trivial scorers; those of the SFT model's likelihood cover the first responses only."""
    training = judge_rows(rows.select(range(min(len(rows), RIVALS_LEARN_FROM))), set(), [])
    words = statistics.bag_of_words_scores(training, judged, seed)
    rivals = {"length": statistics.length_scores(training, judged), "bag of words": words}
    available = {name: scores for name, scores in rivals.items() if scores is not None}
    return {**available, "likelihood of the SFT model": evidence.logprobs}


def _compare(rivals: Mapping[str, Array], scores: Array, pairs: RatedPairs, seed: int) -> list[Card]:
    lines = []
    for name, theirs in rivals.items():
        scored = (pairs.better < len(theirs)) & (pairs.worse < len(theirs))
        line = statistics.rival(name, theirs, scores, pairs.where(scored), seed)
        lines += [line] if line else []
    return lines


def _gold(gold: str | None, texts: Sequence[str]) -> Array | None:
    if gold is None:
        return None
    return np.array(load_gold(gold)(texts), dtype=float)


def _probe(scorer: Scorer, rows: Dataset, scores: Array, judged: Judged, count: int, max_length: int) -> list[Card]:
    """Try the probes on the best-rated answer of each of the first rankings; edits that get too long are left out."""
    chosen = first_rows(rows, count)
    best = [int(np.flatnonzero(judged.ranking == i)[np.argmax(row["ratings"])]) for i, row in enumerate(chosen)]
    average = np.array([scores[judged.ranking == i].mean() for i in range(len(chosen))])
    prompts = [last_user_text(row["prompt"]) for row in chosen]
    answers = [judged.texts[i] for i in best]
    trials = hack_probes.trials(prompts, answers)
    encoded = [scorer.encode(chosen[trial.number]["prompt"], trial.text) for trial in trials]
    short = [i for i, ids in enumerate(encoded) if len(ids) <= max_length]
    if not short:
        return []
    trials, raised = [trials[i] for i in short], scorer([encoded[i] for i in short]).double().numpy()
    return hack_probes.judge(trials, raised, scores[best], average, float(scores.std()), prompts, answers)


def _samples(scorer: Scorer, rows: Dataset, evidence: PolicyEvidence, options: Options) -> Card:
    chosen = first_rankings(rows, 2 * options.card_policy_samples)
    training = scorer([ids for row in chosen for ids in row["input_ids"]]).double().numpy()
    own = scorer(evidence.samples).double().numpy()
    order = np.argsort(own)
    examples = [
        {"prompt": evidence.sample_texts[i][0], "response": evidence.sample_texts[i][1], "score": float(own[i])}
        for i in dict.fromkeys((int(order[0]), int(order[-1])))
    ]
    return {**statistics.compare_samples(own, training), "examples": examples}


def _score_rows(rows: Dataset, judged: Judged, scores: Array, rivals: Mapping[str, Array]) -> list[dict[str, Any]]:
    prompts = [last_user_text(prompt) for prompt in rows["prompt"]]
    others = np.full(len(scores), np.nan) if judged.held_out is None else judged.held_out
    return [
        {
            "ranking": int(judged.ranking[i]),
            "prompt": prompts[judged.ranking[i]],
            "response": text,
            "score": float(scores[i]),
            "rating": float(judged.ratings[i]),
            "rating_held_out": None if np.isnan(others[i]) else float(others[i]),
            "length": int(judged.lengths[i]),
            **{name: float(theirs[i]) if i < len(theirs) else None for name, theirs in rivals.items()},
        }
        for i, text in enumerate(judged.texts)
    ]


# The command


def run(config: RewardCardConfig) -> Card:
    """Judge a registered reward model; print and save its card."""
    registry = Registry(config.registry)
    artifact = registry.get(config.model, expect_stage="reward")
    if config.gold:
        load_function(config.gold)  # a misspelt name fails now, not at the end
    comparisons = load_rows(config.dataset, "train", kind="comparisons")
    validation = load_rows(config.dataset, "validation", kind="comparisons")
    compute = Compute.choose(config)
    tokenizer = load_tokenizer(str(artifact.path))
    parent = next(p for p in artifact.manifest.parents if p.stage == "sft")
    sft = registry.get(parent.reference)
    require(
        sft.manifest.tokenizer_hash == artifact.manifest.tokenizer_hash,
        f"{artifact.reference} has another tokenizer than {sft.reference}, with which the card compares it; "
        "rlhf evaluate scores texts by it",
    )
    policy = load_policy(sft, config, compute)
    limit = min(config.max_length, context_length(policy))
    training, held_out = (
        encode_rankings(writable(data, tokenizer)[0], tokenizer, limit) for data in (comparisons, validation)
    )
    evidence = policy_evidence(policy, tokenizer, compute, config, training, held_out)
    del policy
    scorer = open_scorer(artifact, registry, config, compute, config.per_device_eval_batch_size)
    seen = TrainingPrompts(registry).of(artifact)
    card, rows = make_card(scorer, artifact.reference, training, held_out, evidence, config, limit, seen)
    folder = Path(config.output_dir)
    save_card(card, rows, folder)
    with Tracker(
        folder,
        stage="reward_card",
        name=f"{artifact.name}-card",
        group=artifact.name,
        config=dataclasses.asdict(config),
        **config.tracking,
    ) as tracker:
        tracker.use_artifact(artifact.reference, artifact.hash, artifact.path)
        log_card(card, tracker, 0)
    print_card(card)
    print(f"card: {folder / 'card.json'}, report: {write_card_page(card, folder / 'report.html')}")
    return card


def main() -> None:
    """Run the command line."""
    run(parse_config(RewardCardConfig))


if __name__ == "__main__":
    run_command(main)
