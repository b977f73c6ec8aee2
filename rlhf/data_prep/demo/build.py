"""Builds the demo's data folder, whole or not at all, and skips what is already there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from rlhf.base.assets import VADER_SDIST, extract_ratings, fetch
from rlhf.base.errors import UserError
from rlhf.base.storage import sha256_file
from rlhf.data_prep.demo import sentiment
from rlhf.data_prep.demo.card import make_card, render
from rlhf.data_prep.prepare.folder import make_once
from rlhf.data_prep.prepare.recipe import ReviewsConfig
from rlhf.data_prep.prepare.write import MESSAGES, NUMBER

_DATA = "movieReviewSnippets"
_COLUMNS: dict[str, dict[str, Any]] = {
    "demonstrations": {"prompt": MESSAGES, "completion": MESSAGES, "rating": NUMBER},
    "comparisons": {
        "prompt": MESSAGES,
        "responses": List(MESSAGES),
        "ratings": List(NUMBER),
        "ratings_held_out": List(NUMBER),
        "ratings_all": List(NUMBER),
        "rater_ratings": List(List(Value("int64"))),
        "rater_ratings_held_out": List(List(Value("int64"))),
    },
    "prompts": {"prompt": MESSAGES},
}


def prepare_reviews(config: ReviewsConfig, archive: Path | None = None) -> Path:
    """Make the data folder and return it; a folder with the same recipe and intact files is not touched.

    Layout: `demonstrations/`, `comparisons/`, `prompts/` with `train.parquet` and `validation.parquet` each;
    `card.json`, `card.md`.

    Args:
        archive: a source package with the rated sentences; default: the pinned one, fetched from PyPI when needed.

    Raises:
        UserError: the folder holds something else, or the source cannot be fetched or read.
    """
    folder = Path(config.output_dir)
    recipe = config.recipe(VADER_SDIST.sha256 if archive is None else sha256_file(archive))
    make_once(folder, recipe, lambda partial: _build(partial, recipe, config, archive or fetch(VADER_SDIST)))
    return folder


def _build(folder: Path, recipe: dict[str, Any], config: ReviewsConfig, archive: Path) -> dict[str, Any]:
    """Write the sets and `card.md`, and return the card."""
    parsed = sentiment.parse(*_read_source(archive))
    if not parsed.sentences:
        raise UserError(f"no usable sentence in {archive}: {dict(parsed.dropped.counts)}")
    tables = sentiment.build_tables(
        parsed.sentences,
        seed=config.seed,
        responses_per_prompt=config.responses_per_prompt,
        evaluation_share=config.evaluation_share,
    )
    source = {
        "data": f"{_DATA}_GroundTruth.txt and {_DATA}_anonDataRatings.txt",
        "package": f"{VADER_SDIST.project} {VADER_SDIST.version} (PyPI, source package)",
        "sha256": recipe["source_sha256"],
        "licence": VADER_SDIST.licence,
        "cite": "Hutto, C.J. & Gilbert, E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of "
        "Social Media Text. ICWSM 2014.",
    }
    card = make_card(parsed, tables, source=source, recipe=recipe)
    for name, rows in tables.rows.items():
        file = folder / f"{name}.parquet"
        file.parent.mkdir(exist_ok=True)
        # a fixed schema, which an empty set has too, in the form that `datasets` reads back as it is
        schema = Features(_COLUMNS[file.parent.name]).arrow_schema
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    (folder / "card.md").write_text(render(card), encoding="utf-8")
    return card


def _read_source(archive: Path) -> tuple[bytes, bytes]:
    """Return the sentence file and the ratings file: a tar archive inside the source package holds them."""
    with tempfile.TemporaryDirectory() as scratch:
        members = [f"{_DATA}_{name}.txt" for name in ("GroundTruth", "anonDataRatings")]
        texts, ratings = extract_ratings(archive, members, Path(scratch))
        return texts.read_bytes(), ratings.read_bytes()
