"""The data card of the demo: the source, the sets, and every drop with its reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import mean, median
from typing import Any

from rlhf.data_prep.demo.sentiment import Parsed, Row, Tables
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.prepare.card import table

_SHARED = "held_out_rows_with_a_prompt_of_training"
PAIR_DIFFERENCE = 1.0
"""Pairs are counted when their mean ratings (all raters) differ by at least this; closer ones are mostly noise."""


def rows_fingerprint(tables: Mapping[str, Iterable[Row]], recipe: Mapping[str, Any]) -> str:
    """Return the sha256 of recipe and rows, which is the same on every machine."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, rows in sorted(tables.items()):
        digest.update(f"\n{name}\n".encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def make_card(
    parsed: Parsed, tables: Tables, *, source: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `card.json`, less the sha256 of the files."""
    comparisons = {split: tables.rows[f"comparisons/{split}"] for split in ("train", "validation")}
    return {
        "source": dict(source),
        "sentences_read": parsed.rows_in,
        "rows": {name: len(rows) for name, rows in tables.rows.items()},
        "sentences_used": {name: len(texts) for name, texts in _texts(tables).items()},
        "pairs_rated_at_least_1_apart": {split: sum(map(_clear_pairs, rows)) for split, rows in comparisons.items()},
        "held_out_sentences_in_training": _sentences_in_training(tables),
        _SHARED: _shared_prompts(tables),
        "dropped": {
            "sentences": {**parsed.dropped.as_dict(), **tables.dropped_sentences.as_dict()},
            "ratings": parsed.dropped_ratings.as_dict(),
            "prompts": tables.dropped_prompts.as_dict(),
        },
        "words_per_sentence": {
            name: _spread([len(t.split()) for t in texts]) for name, texts in _texts(tables).items()
        },
        "raters_per_sentence": _spread([len(s.ratings) for s in parsed.sentences]),
        "sentences_by_rounded_mean_rating": _histogram(round(mean(s.ratings)) for s in parsed.sentences),
        "comparisons_by_number_of_responses": {
            split: _histogram(len(row["responses"]) for row in rows) for split, rows in comparisons.items()
        },
        "recipe": dict(recipe),
        "fingerprint": rows_fingerprint(tables.rows, recipe),
    }


def render(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    source = card["source"]
    sets = []
    for name, count in card["rows"].items():
        words = card["words_per_sentence"].get(name)
        length = f"{words['median']:g}, {words['max']}" if words else ""
        sets.append([name, f"{count:,}", str(card["sentences_used"].get(name, "")), length])
    drops = [
        [what, reason, f"{entry['count']:,}", "; ".join(entry["examples"])]
        for what, reasons in card["dropped"].items()
        for reason, entry in reasons.items()
    ]
    lines = [
        "# Data card: movie reviews",
        "",
        f"Made from {source['data']} in {source['package']}; {source['licence']}; sha256 {source['sha256']}.",
        f"Please cite: {source['cite']}",
        "",
        f"{card['sentences_read']:,} rated sentences read. Fingerprint {card['fingerprint']}.",
        "",
        *table(["set", "rows", "sentences", "words (median, max)"], sets),
        "",
        f"Pairs whose mean ratings differ by at least 1: {_inline(card['pairs_rated_at_least_1_apart'])}.",
        *(
            f"Responses per comparison ({split}): {_inline(histogram)}."
            for split, histogram in card["comparisons_by_number_of_responses"].items()
        ),
        f"Raters per sentence: {_inline(card['raters_per_sentence'])}.",
        f"Sentences by rounded mean rating: {_inline(card['sentences_by_rounded_mean_rating'])}.",
        "",
        "## What is held out",
        "",
        "A prompt is the first word of a sentence, so prompts are few and sentences share them: "
        + ", ".join(f"{shared:,} of {card['rows'][name]:,} rows of {name}" for name, shared in card[_SHARED].items())
        + " have a prompt that training has. Held out are the sentences: "
        f"{card['held_out_sentences_in_training']} of them are in a training set.",
        "",
        "## Left out",
        "",
        *table(["what", "why", "count", "examples"], drops),
    ]
    return "\n".join(lines) + "\n"


def _texts(tables: Tables) -> dict[str, list[str]]:
    """Return the sentences in each set of demonstrations and comparisons."""
    return {
        name: [
            message["content"]
            for row in rows
            for answer in (row["responses"] if "responses" in row else [row["completion"]])
            for message in answer
        ]
        for name, rows in tables.rows.items()
        if not name.startswith("prompts")
    }


def _sentences_in_training(tables: Tables) -> int:
    """Return the number of held-out sentences that are in a training set as well."""
    texts = _texts(tables)
    sides = {
        split: {t for name, of in texts.items() if name.endswith(split) for t in of}
        for split in ("train", "validation")
    }
    return len(sides["train"] & sides["validation"])


def _shared_prompts(tables: Tables) -> dict[str, int]:
    """Return for each validation set the number of its rows whose prompt is in the training set of its kind."""
    shared = {}
    for kind in ("demonstrations", "comparisons", "prompts"):
        training = {prompt_key(row["prompt"]) for row in tables.rows[f"{kind}/train"]}
        held_out = tables.rows[f"{kind}/validation"]
        shared[f"{kind}/validation"] = sum(prompt_key(row["prompt"]) in training for row in held_out)
    return shared


def _clear_pairs(row: Row) -> int:
    return sum(abs(a - b) >= PAIR_DIFFERENCE for a, b in combinations(row["ratings_all"], 2))


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "mean": round(mean(values), 2), "median": median(values), "max": max(values)}


def _histogram(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _inline(mapping: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value:,}" for key, value in mapping.items())
