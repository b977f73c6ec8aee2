"""Builds the demo's data folder, whole or not at all, and skips what is already there."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.base.assets import VADER_SDIST, extract_ratings, fetch
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object
from rlhf.base.storage import sha256_file
from rlhf.config import option
from rlhf.data_prep.demo import sentiment
from rlhf.data_prep.demo.card import make_card, render
from rlhf.data_prep.prepare.folder import made_once, write_card

SOURCES = ("movie_reviews",)
#: Raised when the rows made from the same options change.
_RECIPE_VERSION = 2
_DATA = "movieReviewSnippets"


@dataclass(frozen=True, kw_only=True)
class ReviewsConfig:
    """Demonstrations, comparisons and prompts of the demo."""

    source: Literal["movie_reviews"] = option("where the rows come from", "movie_reviews")
    output_dir: str = option("folder to make; a folder with the same recipe is left as it is", "outputs/demo/data")
    seed: int = option("seed of the split, the rater halves and the order; it has nothing to do with training", 0)
    responses_per_prompt: int = option("most responses (K) in one comparison, at least 2", 8)
    evaluation_share: float = option("share of the prompts that no stage trains on, between 0 and 1", 0.15)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(
                f"no source '{self.source}'{did_you_mean(str(self.source), SOURCES)}; known: {', '.join(SOURCES)}"
            )
        if self.responses_per_prompt < 2:
            raise UserError(f"responses_per_prompt must be at least 2, got {self.responses_per_prompt}")
        if not 0 < self.evaluation_share < 1:
            raise UserError(f"evaluation_share must be between 0 and 1, got {self.evaluation_share}")

    def recipe(self, sha256: str) -> dict[str, Any]:
        """All that decides the rows."""
        return {
            "source": self.source,
            "source_sha256": sha256,
            "seed": self.seed,
            "responses_per_prompt": self.responses_per_prompt,
            "evaluation_share": self.evaluation_share,
            "version": _RECIPE_VERSION,
        }


def prepare_reviews(config: ReviewsConfig, archive: Path | None = None) -> Path:
    """Makes the data folder and returns it; a folder with the same recipe and intact files is not touched.

    Layout: `demonstrations/`, `comparisons/`, `prompts/` with `train.parquet` and `validation.parquet` each;
    `card.json`, `card.md`.

    Args:
        archive: a source package with the rated sentences; default: the pinned one, fetched from PyPI when needed.

    Raises:
        UserError: the folder holds something else, or the source cannot be fetched or read.
    """
    folder = Path(config.output_dir)
    recipe = config.recipe(VADER_SDIST.sha256 if archive is None else sha256_file(archive))

    def fill(partial: Path) -> None:
        _build(partial, recipe, config, fetch(VADER_SDIST) if archive is None else archive)

    if made_once(folder, recipe, fill):
        rows = read_object(folder / "card.json")["rows"]
        print(f"data: {folder}: " + ", ".join(f"{count:,} {name}" for name, count in rows.items()), file=sys.stderr)
    return folder


def _build(folder: Path, recipe: dict[str, Any], config: ReviewsConfig, archive: Path) -> None:
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
        _write_parquet(folder / f"{name}.parquet", rows)
    (folder / "card.md").write_text(render(card), encoding="utf-8")
    write_card(folder, card, [f"{name}.parquet" for name in tables.rows])


def _read_source(archive: Path) -> tuple[bytes, bytes]:
    """The sentence file and the ratings file: a tar archive inside the source package."""
    with tempfile.TemporaryDirectory() as scratch:
        members = [f"{_DATA}_{name}.txt" for name in ("GroundTruth", "anonDataRatings")]
        texts, ratings = extract_ratings(archive, members, Path(scratch))
        return texts.read_bytes(), ratings.read_bytes()


def _write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with a fixed schema (an empty set has one too), in the form that `datasets` reads back as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    numbers = List(Value("float64"))
    columns: dict[str, dict[str, Any]] = {
        "demonstrations": {"prompt": messages, "completion": messages, "rating": Value("float64")},
        "comparisons": {
            "prompt": messages,
            "responses": List(messages),
            "ratings": numbers,
            "ratings_held_out": numbers,
            "ratings_all": numbers,
            "rater_ratings": List(List(Value("int64"))),
            "rater_ratings_held_out": List(List(Value("int64"))),
        },
        "prompts": {"prompt": messages},
    }
    file.parent.mkdir(exist_ok=True)
    schema = Features(columns[file.parent.name]).arrow_schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
