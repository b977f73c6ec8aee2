"""The report card of a reward model: is it good, and good for PPO?

`python -m rlhf.evaluation.reward --model reward/NAME --data FOLDER` judges a registered model on any comparisons and writes
`card.json`, `scores.jsonl` and `report.html`; the reward stage makes the same card of its own held-out comparisons.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.errors import run_command
from rlhf.base.functions import GoldFunction, load_function
from rlhf.config import RewardCardConfig, RewardConfig, parse_config
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.evaluation.card import hack_probes
from rlhf.evaluation.card import statistics as statistics
from rlhf.evaluation.card.statistics import Array, Judged, RatedPairs, rated_pairs
from rlhf.models.base import context_length, load_policy
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.models.responses import answerable, own_responses
from rlhf.models.sequences import prompt_numbers
from rlhf.models.tokenization import decode_response, last_user_text, load_tokenizer
from rlhf.registry import Registry
from rlhf.report.card_page import write_card_page
from rlhf.reward.rankings import Encoded, encode_rankings
from rlhf.reward.scorer import Scorer, open_scorer
from rlhf.run.tracker import Tracker

RIVALS_LEARN_FROM = 20_000
"""Training rankings that length and bag of words learn from, at most: more take long and change little."""

Options = RewardConfig | RewardCardConfig
Card = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PolicyEvidence:
    """What only the SFT policy can tell. It is taken first, because the policy then becomes the reward model."""

    samples: list[list[int]]
    """Token rows: training prompts with responses of the policy's own."""
    sample_texts: list[tuple[str, str]]
    """The same as texts (prompt, response)."""
    logprobs: Array
    """(m,) mean log-likelihood a token of the first m held-out responses, nats."""


def policy_evidence(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    compute: Compute,
    options: Options,
    training: Encoded,
    held_out: Encoded,
) -> PolicyEvidence:
    """Samples from the SFT policy, and its likelihoods of held-out responses."""
    first = [row["prompt"] for row in _first(training.rows, options.card_policy_samples)]
    prompts = answerable(first, tokenizer, context_length(policy), options.response_length)
    prompts = [prompts[i % len(prompts)] for i in range(options.card_policy_samples)]
    answers = own_responses(policy, tokenizer, prompts, response_length=options.response_length, seed=options.seed)
    texts = [decode_response(tokenizer, response) for _, response in answers]
    rows = _rankings_of(held_out.rows, options.card_likelihood_responses)
    logprobs = mean_logprobs(
        policy,
        [ids for row in rows for ids in row["input_ids"]],
        [row["prompt_length"] for row in rows for _ in row["input_ids"]],
        prompt_numbers([row["input_ids"] for row in rows]),
        pad_token_id=int(tokenizer.pad_token_id),
        compute=compute,
        batch_size=options.per_device_eval_batch_size,
    )
    return PolicyEvidence(
        samples=[prompt + response for prompt, response in answers],
        sample_texts=[(last_user_text(p), text) for p, text in zip(prompts, texts, strict=True)],
        logprobs=logprobs.double().numpy(),
    )


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
    """The card, as plain data, and a row for each held-out response with its scores.

    Args:
        name: of the model, for the first line.
        evidence: of the policy that the model was trained on.
        max_length: longest prompt and response together, tokens.
        seen: keys of the prompts of the comparisons that the model was trained on; None where nobody knows.
    """
    judged = judge_rows(held_out.rows, seen, options.slice_columns)
    rows = [ids for row in held_out.rows["input_ids"] for ids in row]
    raw = scorer.raw(rows, torch.from_numpy(judged.ranking)).double().numpy()
    scores = (raw - scorer.mean) / scorer.std
    minimum, seed = options.eval_rating_difference, options.seed
    pairs = rated_pairs(judged.ratings, judged, minimum)
    new = None if judged.seen is None else pairs.where(~judged.seen[pairs.better])
    others, ceiling = statistics.raters(scores, judged, minimum, seed)
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
        "accuracy_held_out_raters": others,
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
    card["flags"] = statistics.flags(card)
    card["verdict"] = statistics.verdict(card)
    return card, _score_rows(held_out.rows, judged, scores, rivals)


def judge_rows(rows: Dataset, seen: Set[str] | None, columns: Sequence[str]) -> Judged:
    """The columns of tokenised rankings as flat arrays; `seen` as `make_card` takes it."""
    table = rows.remove_columns("input_ids").to_list()
    sizes = [len(row["lengths"]) for row in table]
    keys = [prompt_key(row["prompt"]) for row in table]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}

    def flat(name: str) -> Array:
        return np.array([value for row in table for value in row[name]], dtype=float)

    def repeated(values: Sequence[Any]) -> Array:
        return np.repeat(np.array(values), sizes)

    others = [row.get("ratings_held_out") or [np.nan] * size for row, size in zip(table, sizes, strict=True)]
    held_out = np.array([value for row in others for value in row], dtype=float)
    return Judged(
        ranking=repeated(range(len(table))),
        prompt=repeated([number[key] for key in keys]),
        ratings=flat("ratings"),
        held_out=None if np.isnan(held_out).all() else held_out,
        lengths=flat("lengths").astype(int),
        texts=[response[-1]["content"] for row in table for response in row["responses"]],
        seen=None if seen is None else repeated([key in seen for key in keys]),
        columns={
            name: list(repeated([str(row[name]) for row in table])) for name in columns if name in rows.column_names
        },
    )


def _notes(rows: Dataset, judged: Judged) -> list[str]:
    """Why figures are missing that the data could have given."""
    notes = []
    raters = rows["rater_ratings"] if "rater_ratings" in rows.column_names else []
    if judged.held_out is None and any(
        min(map(len, of_responses), default=0) > 1 for of_responses in raters if of_responses
    ):
        notes.append(
            "no human ceiling: several raters rated these responses and none is held out; prepare the data with "
            "held_out_raters (python -m rlhf.data_prep), or leave out the column 'ratings'"
        )
    if judged.seen is None:
        notes.append(
            "no accuracy on new prompts: the comparisons that the model was trained on are gone, or have changed since"
        )
    return notes


def _first(rows: Dataset, count: int) -> list[dict[str, Any]]:
    return rows.select(range(min(count, len(rows)))).to_list()


def _rankings_of(rows: Dataset, responses: int) -> list[dict[str, Any]]:
    """The first rankings, one at least, with no more than so many responses together."""
    chosen: list[dict[str, Any]] = []
    for row in _first(rows, responses):
        responses -= len(row["input_ids"])
        if responses < 0 and chosen:
            break
        chosen.append(row)
    return chosen


# Parts of the card


def _rivals(judged: Judged, rows: Dataset, evidence: PolicyEvidence, seed: int) -> dict[str, Array]:
    """Scores of the scorers that cost nothing, from training rankings; likelihoods are of the first responses only."""
    training = judge_rows(rows.select(range(min(len(rows), RIVALS_LEARN_FROM))), set(), [])
    words = statistics.bag_of_words_scores(training, judged, seed)
    rivals = {"length": statistics.length_scores(training, judged), "bag of words": words}
    known = {name: scores for name, scores in rivals.items() if scores is not None}
    return {**known, "likelihood of the SFT model": evidence.logprobs}


def _compare(rivals: Mapping[str, Array], scores: Array, pairs: RatedPairs, seed: int) -> list[Card]:
    lines = []
    for name, theirs in rivals.items():
        known = (pairs.better < len(theirs)) & (pairs.worse < len(theirs))
        line = statistics.rival(name, theirs, scores, pairs.where(known), seed)
        lines += [line] if line else []
    return lines


def _gold(gold: str | None, texts: Sequence[str]) -> Array | None:
    if gold is None:
        return None
    function: GoldFunction = load_function(gold)
    return np.array(function(list(texts)), dtype=float)


def _probe(scorer: Scorer, rows: Dataset, scores: Array, judged: Judged, count: int, max_length: int) -> list[Card]:
    """The probes on the best-rated answer of each of the first rankings; edits that get too long are left out."""
    chosen = _first(rows, count)
    best = [int(np.flatnonzero(judged.ranking == i)[np.argmax(row["ratings"])]) for i, row in enumerate(chosen)]
    average = np.array([scores[judged.ranking == i].mean() for i in range(len(chosen))])
    prompts = [last_user_text(row["prompt"]) for row in chosen]
    answers = [judged.texts[i] for i in best]
    tried = hack_probes.trials(prompts, answers)
    encoded = [scorer.encode(chosen[trial.number]["prompt"], trial.text) for trial in tried]
    short = [i for i, ids in enumerate(encoded) if len(ids) <= max_length]
    tried, encoded = [tried[i] for i in short], [encoded[i] for i in short]
    if not tried:
        return []
    return hack_probes.judge(
        tried,
        scorer(encoded).double().numpy(),
        scores[best],
        average,
        float(scores.std()),
        prompts,
        answers,
    )


def _samples(scorer: Scorer, rows: Dataset, evidence: PolicyEvidence, options: Options) -> Card:
    chosen = _rankings_of(rows, 2 * options.card_policy_samples)
    training = scorer([ids for row in chosen for ids in row["input_ids"]]).double().numpy()
    own = scorer(evidence.samples).double().numpy()
    shown = np.argsort(own)
    examples = [
        {"prompt": evidence.sample_texts[i][0], "response": evidence.sample_texts[i][1], "score": float(own[i])}
        for i in dict.fromkeys((int(shown[0]), int(shown[-1])))
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


# What becomes of it


def figures(card: Card) -> dict[str, Any]:
    """The card's main figures, flat, for a manifest."""

    def value(name: str, part: str = "value") -> float | None:
        return None if card[name] is None else card[name][part]

    calibration, balanced = card["calibration"] or {}, card["length"]["balanced_accuracy"]
    return {
        "accuracy": value("accuracy"),
        "accuracy_low": value("accuracy", "low"),
        "accuracy_high": value("accuracy", "high"),
        "pairs": 0 if card["accuracy"] is None else card["accuracy"]["pairs"],
        "accuracy_held_out_prompts": value("accuracy_held_out_prompts"),
        "accuracy_held_out_raters": value("accuracy_held_out_raters"),
        "human_ceiling": value("human_ceiling"),
        "gold_accuracy": value("gold_accuracy"),
        "calibration_error": calibration.get("ece"),
        "temperature": calibration.get("temperature"),
        "length_balanced_accuracy": None if balanced is None else balanced["value"],
        "length_correlation": card["length"]["correlation"],
        "samples_outside": card["samples"]["outside"],
        "rivals_beaten": sum(line["beaten"] for line in card["rivals"]),
        "rivals": len(card["rivals"]),
        "flags": [flag["name"] for flag in card["flags"]],
        "verdict": card["verdict"],
    }


def save_card(card: Card, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes `card.json` and `scores.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "scores.jsonl").write_text(lines, encoding="utf-8")
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def log_card(card: Card, tracker: Tracker, step: int) -> None:
    """The main figures as metrics and the long parts as tables, in W&B and in the local record."""
    numbers = {f"card/{name}": value for name, value in figures(card).items() if isinstance(value, int | float)}
    tracker.log(numbers, step)
    tracker.log_table("card/accuracies", accuracy_lines(card), step)
    tracker.log_table(
        "card/probes", [{k: v for k, v in p.items() if k != "example"} | p["example"] for p in card["probes"]], step
    )
    tracker.log_table("card/flags", card["flags"], step)
    bins = _reliability(card)
    tracker.log_scatter("card/reliability", bins, "confidence", "right", "Confidence and how often it is right", step)


def _reliability(card: Card) -> list[dict[str, float]]:
    """The points of the calibration plot; none where there was too little to calibrate."""
    return list((card["calibration"] or {}).get("bins", []))


def accuracy_lines(card: Card) -> list[dict[str, Any]]:
    """Every accuracy of the card as a line `what`, `value`, `low`, `high`, `pairs`."""
    named = [
        ("held-out pairs", card["accuracy"]),
        ("prompts that are not in training", card["accuracy_held_out_prompts"]),
        ("raters that it never saw", card["accuracy_held_out_raters"]),
        ("people, on those raters (ceiling)", card["human_ceiling"]),
        ("pairs balanced by length", card["length"]["balanced_accuracy"]),
        ("independent scorer", card["gold_accuracy"]),
        *((f"rival: {line['name']}", line["accuracy"]) for line in card["rivals"]),
        *((f"{line['slice']}: {line['kind']}", line) for line in card["slices"]),
    ]
    return [
        {"what": what, **{part: figure[part] for part in ("value", "low", "high", "pairs")}}
        for what, figure in named
        if figure
    ]


def print_card(card: Card) -> None:
    """The card on the terminal, its verdict first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(card["verdict"], style="bold", markup=False)
    for flag in card["flags"]:
        console.print(f"! {flag['message']}", markup=False)
    for note in card["notes"]:
        console.print(note, markup=False)
    table = Table("accuracy", "", "95% interval", "pairs", show_edge=False, pad_edge=False)
    for line in accuracy_lines(card):
        low, high = line["low"], line["high"]
        between = "" if low is None else f"{low:.1%} to {high:.1%}"
        table.add_row(line["what"], f"{line['value']:.1%}", between, f"{line['pairs']:,}")
    console.print(table)
    table = Table("probe", "change, std", "raised", "", show_edge=False, pad_edge=False)
    for probe in card["probes"]:
        table.add_row(
            probe["name"], f"{probe['gain']:+.2f}", f"{probe['raised']:.0%}", "FLAGGED" if probe["flagged"] else ""
        )
    console.print(table)
    calibration, length, samples = card["calibration"], card["length"], card["samples"]
    if calibration:
        temperature = calibration["temperature"]
        fitted = "no temperature helps" if temperature is None else f"temperature {temperature:.2f}"
        console.print(f"calibration: off by {calibration['ece']:.1%} on average, {fitted}")
    if length["correlation"] is not None and length["label_correlation"] is not None:
        console.print(
            f"length: correlation {length['correlation']:+.2f} with scores, {length['label_correlation']:+.2f} with ratings"
        )
    console.print(
        f"the policy's own responses: mean {samples['samples']['mean']:+.2f}, training responses "
        f"{samples['training']['mean']:+.2f}; {samples['outside']:.0%} outside"
    )


def run(config: RewardCardConfig) -> Card:
    """Judges a registered reward model, prints and saves its card."""
    registry = Registry(config.registry)
    artifact = registry.get(config.model, expect_stage="reward")
    if config.gold:
        load_function(config.gold)  # a slip in its name must not show at the end
    comparisons = load_rows(config.data, "train", kind="comparisons")
    validation = load_rows(config.data, "validation", kind="comparisons")
    compute = Compute.choose(config)
    tokenizer = load_tokenizer(str(artifact.path))
    parent = next(p for p in artifact.manifest.parents if p.stage == "sft")
    policy = load_policy(registry.get(parent.reference), config, compute)
    limit = min(config.max_length, context_length(policy))
    training, held_out = (encode_rankings(data, tokenizer, limit) for data in (comparisons, validation))
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
        wandb_mode=config.wandb_mode,
        wandb_project=config.wandb_project,
    ) as tracker:
        tracker.use_artifact(artifact.reference, artifact.hash, artifact.path)
        log_card(card, tracker, 0)
    print_card(card)
    print(f"card: {folder / 'card.json'}, report: {write_card_page(card, folder / 'report.html')}")
    return card


def main() -> None:
    """Command line."""
    run(parse_config(RewardCardConfig))


if __name__ == "__main__":
    run_command(main)
