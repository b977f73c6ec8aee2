"""A look at data before anything is trained: what its rows can become, how many there are, and how long they are.

The rows go through the preparation that `rlhf data` would give them, in a temporary folder, so that the recipe that is written
is one that works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.data_prep import DataConfig, Source, prepare
from rlhf.data_prep.formats.files import LONGEST_ROW, read_source
from rlhf.data_prep.formats.rows import Messages
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.prepare.folder import CARD
from rlhf.data_prep.prepare.recipe import KINDS, local
from rlhf.models.tokenization import encode_prompt, encode_response

#: Rows of a source that are looked at; the rest is counted.
LARGEST_SAMPLE = 20_000
#: Rows of a kind whose tokens are counted.
MEASURED_ROWS = 1000
#: Prompts that each stage must have of its own before stages stop sharing them.
ENOUGH_PROMPTS = 2000
#: Held-out prompts that an evaluation should have, and the shares of a small data set that they may take.
HELD_OUT, SMALLEST_SHARE, LARGEST_SHARE = 150, 0.05, 0.2
#: Fewest prompts of which a test set is set aside.
TEST_FROM = 5000
#: Bytes a token where no tokenizer is at hand: English has about 4, Chinese about 3; and the tokens of a chat template.
BYTES_PER_TOKEN, TEMPLATE_TOKENS = 3.5, 12


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths in tokens of the rows that a preparation gave."""

    prompts: np.ndarray
    """With the chat template's tokens."""
    answers: np.ndarray
    estimated: bool


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Rows, lengths and recipe of data that was looked at."""

    recipe: DataConfig
    """The preparation that works."""
    sources: list[dict[str, Any]]
    """As on the data card: `name`, `reader`, `evidence`, `rows`, `malformed`, `unused_columns`."""
    rows: dict[str, int]
    """Rows by set, as `comparisons/train`; of the whole data, where a sample was looked at."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    sampled: bool
    lengths: Lengths
    responses: float
    """Mean number of responses of a comparison; 0 without comparisons."""
    rating_difference: float
    """Three in four held-out pairs differ by this much in their ratings, or by more."""

    def count(self, kind: str, split: str = "train") -> int:
        """Return the number of rows of a set."""
        return self.rows.get(f"{kind}/{split}", 0)


def survey(
    sources: Sequence[Source],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Callable[[Lengths], dict[str, Any]],
) -> Survey:
    """Read the sources, find a preparation that works for them, and measure what comes of it.

    Args:
        folder: temporary; gets samples and prepared rows.
        tokenizer: counts the tokens; without one they are estimated.
        limits: returns the recipe's options about lengths, from the lengths before any limit.

    Raises:
        UserError: a source cannot be read, or nothing can be made of its rows.
    """
    samples, shares = zip(*(_sample(source, folder / f"source-{i}") for i, source in enumerate(sources)), strict=True)
    scale = max(shares)
    # The first try shows how many prompts there are, and how long: the rest depends on both.
    config = DataConfig(sources=list(samples), stages="shared", validation_share=LARGEST_SHARE, test_share=0.0)
    config, card = _prepared(config, folder / "first")
    prompts = scale * sum(count for name, count in card["rows"].items() if name.startswith("prompts/"))
    share = min(max(HELD_OUT / max(prompts, 1), SMALLEST_SHARE), config.validation_share)
    smallest = prompts * min(config.stage_weights) / sum(config.stage_weights)
    options = limits(_lengths(_load(folder / "first"), tokenizer))
    config = dataclasses.replace(
        config,
        stages="disjoint" if smallest >= ENOUGH_PROMPTS else "shared",
        validation_share=round(share, 2),
        test_share=0.05 if prompts >= TEST_FROM else 0.0,
        **(options if tokenizer else {}),
    )
    config, card = _prepared(config, folder / "second")
    data = _load(folder / "second")
    comparisons = data.get("comparisons/train", []), data.get("comparisons/validation", [])
    return Survey(
        recipe=dataclasses.replace(config, sources=list(sources), **options),
        sources=[
            {**entry, "name": source.name, "rows": round(entry["rows"] * share)}
            for entry, source, share in zip(card["sources"], sources, shares, strict=True)
        ],
        rows={name: round(count * scale) for name, count in card["rows"].items()},
        dropped={
            reason: round(of["count"] * scale)
            for step in card["steps"].values()
            for reason, of in step["dropped"].items()
        },
        sampled=scale > 1,
        lengths=_lengths(data, tokenizer),
        responses=float(np.mean([len(row["responses"]) for row in comparisons[0]])) if comparisons[0] else 0.0,
        rating_difference=_rating_difference(comparisons[1]),
    )


def _sample(source: Source, folder: Path) -> tuple[Source, float]:
    """Return a source of at most `LARGEST_SAMPLE` rows, and how many rows of the whole one of them stands for.

    A longer source, and one on the hub, is read once and copied in part.
    """
    count = 0
    folder.mkdir()
    file = folder / "sample.jsonl"
    with file.open("w", encoding="utf-8") as copy:
        for line in read_source(source, LONGEST_ROW):
            count += 1
            if count <= LARGEST_SAMPLE:
                copy.write((line.raw if line.problem else json.dumps(line.value, default=str)) + "\n")
            elif local(source) is None:
                break  # what is streamed costs a download
    if count <= LARGEST_SAMPLE and local(source):
        return source, 1.0
    sample = dataclasses.replace(source, path=str(file), split=None, subset=None, revision=None)
    return sample, max(count / LARGEST_SAMPLE, 1.0)


def _prepared(config: DataConfig, folder: Path) -> tuple[DataConfig, dict[str, Any]]:
    """Prepare the data in a folder, and return the recipe with which it worked, and the card.

    Where a recipe finds too few prompts to hold some out, or too many that are alike, the next one is tried; long prompts are
    cut only where nothing else works.

    Raises:
        UserError: of the first try, where none works.
    """
    changes: list[dict[str, Any]] = [{}, {"similarity": 1.0}, {"validation_share": 0.35}]
    changes += [{**changes[1], **changes[2]}, {**changes[1], "validation_share": 0.5}]
    if config.max_prompt_length:
        changes += [{**change, "long_prompts": "truncate_left"} for change in changes]
    errors: list[UserError] = []
    for change in changes:
        tried = dataclasses.replace(config, output_dir=str(folder), **change)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the survey has its own report
                prepare(tried)
        except UserError as error:
            # The rows left out are in the temporary folder, which nobody will find.
            errors.append(UserError(str(error).split("; the rows left out are in")[0]))
            continue
        return dataclasses.replace(tried, output_dir=config.output_dir), read_object(folder / CARD)
    raise errors[0]


def _load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the stages, by set."""
    with contextlib.redirect_stderr(io.StringIO()):
        return {
            f"{kind}/{split}": list(load_rows(folder, split, kind=kind).rows)  # type: ignore[arg-type]
            for kind in KINDS
            for split in ("train", "validation")
            if (folder / kind).is_dir()
        }


def _lengths(data: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase | None) -> Lengths:
    """Return the lengths of prompts and answers, of some rows of each kind."""
    prompts, answers = [], []
    for name, rows in data.items():
        for row in rows[:MEASURED_ROWS] if name.endswith("/train") else ():
            prompts.append(len(encode_prompt(tokenizer, row["prompt"])) if tokenizer else _estimate(row["prompt"]))
            for answer in [row["completion"]] if "completion" in row else row.get("responses", []):
                length = len(encode_response(tokenizer, row["prompt"], answer)) if tokenizer else _estimate(answer)
                answers.append(length)
    return Lengths(prompts=np.array(prompts), answers=np.array(answers), estimated=tokenizer is None)


def _estimate(messages: Messages) -> int:
    size = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    return round(size / BYTES_PER_TOKEN) + TEMPLATE_TOKENS * len(messages)


def _rating_difference(rows: Sequence[Mapping[str, Any]]) -> float:
    differences = [abs(a - b) for row in rows for a, b in itertools.combinations(row["ratings"], 2) if a != b]
    return float(np.quantile(differences, 0.25, method="lower")) if differences else 0.0
