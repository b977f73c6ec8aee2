"""The data folder: whole or not at all, skipped when it is there, never over other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlhf.base.errors import UserError
from rlhf.config import build, parse_config
from rlhf.data_prep import ReviewsConfig
from rlhf.data_prep.demo import build as build_module
from rlhf.data_prep.demo.build import prepare_reviews
from rlhf.data_prep.load import load_rows

MakeArchive = Callable[..., Path]
FILES = {f"{k}/{s}.parquet" for k in ("demonstrations", "comparisons", "prompts") for s in ("train", "validation")}


def config(tmp_path: Path, **options: Any) -> ReviewsConfig:
    return ReviewsConfig(output_dir=str(tmp_path / "out" / "data"), evaluation_share=0.3, **options)


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_folder_is_complete_and_readable(tmp_path: Path, make_archive: MakeArchive) -> None:
    """Bug: a set without a file, or with columns that the stages do not read."""
    folder = prepare_reviews(config(tmp_path), make_archive())
    assert files_in(folder) == FILES | {"card.json", "card.md"}
    card = json.loads((folder / "card.json").read_text())
    assert {name: pq.read_metadata(folder / f"{name}.parquet").num_rows for name in card["rows"]} == card["rows"]
    for kind in ("demonstrations", "comparisons", "prompts"):
        for split in ("train", "validation"):
            assert len(load_rows(folder, split, kind=kind).rows) > 0  # type: ignore[arg-type]
    assert set(load_rows(folder, "train", kind="comparisons").rows.column_names) == {
        "prompt", "responses", "ratings", "ratings_held_out", "ratings_all", "rater_ratings",
        "rater_ratings_held_out",
    }  # fmt: skip


def test_an_empty_set_still_has_a_file_with_columns(tmp_path: Path, make_archive: MakeArchive) -> None:
    """Bug: a table without rows is written without a schema, and readers fail on it."""
    archive = make_archive(b"1\t1.5\tThe film\n", b"1\t1.5\t.5\t[1, 2]\n")
    folder = prepare_reviews(config(tmp_path), archive)
    assert "responses" in pq.read_schema(folder / "comparisons" / "train.parquet").names
    with pytest.raises(UserError, match="is empty"):
        load_rows(folder, "train", kind="comparisons")


def test_same_recipe_makes_the_same_files(tmp_path: Path, make_archive: MakeArchive) -> None:
    """Bug: rows in the order of a set, or a date in the files."""
    archive = make_archive()  # one for both: a .tar.gz holds the second it was made in
    folders = [prepare_reviews(config(tmp_path / name), archive) for name in "ab"]
    for name in FILES | {"card.json"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_second_run_skips(tmp_path: Path, make_archive: MakeArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: each pipeline run builds the data anew."""
    archive = make_archive()
    folder = prepare_reviews(config(tmp_path), archive)
    monkeypatch.setattr(build_module, "_build", None)
    assert prepare_reviews(config(tmp_path), archive) == folder


@pytest.mark.parametrize("change", ["seed", "altered file", "missing file", "broken card"])
def test_other_recipe_or_damage_builds_again(tmp_path: Path, make_archive: MakeArchive, change: str) -> None:
    """Bug: data of another seed, or a damaged file, is taken for what was asked."""
    archive = make_archive()
    folder = prepare_reviews(config(tmp_path), archive)
    damaged = folder / "prompts" / "train.parquet"
    before = (folder / "demonstrations" / "train.parquet").read_bytes()
    if change == "altered file":
        damaged.write_bytes(b"x")
    elif change == "missing file":
        damaged.unlink()
    elif change == "broken card":
        (folder / "card.json").write_text("{")
    prepare_reviews(config(tmp_path, seed=int(change == "seed")), archive)
    assert files_in(folder) == FILES | {"card.json", "card.md"}
    assert ((folder / "demonstrations" / "train.parquet").read_bytes() == before) == (change != "seed")
    assert len(load_rows(folder, "train", kind="prompts").rows) > 0


def test_interrupted_build_leaves_nothing(
    tmp_path: Path, make_archive: MakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: Ctrl-C in the middle leaves half a folder; or loses the one that was there."""
    archive = make_archive()

    def interrupted(card: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "render", interrupted)
        prepare_reviews(config(tmp_path), archive)
    assert not list((tmp_path / "out").iterdir())

    folder = prepare_reviews(config(tmp_path), archive)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "render", interrupted)
        prepare_reviews(config(tmp_path, seed=1), archive)
    assert list((tmp_path / "out").iterdir()) == [folder]
    assert json.loads((folder / "card.json").read_text())["recipe"]["seed"] == 0


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, make_archive: MakeArchive) -> None:
    """Bug: `--output_dir .` deletes the user's work."""
    folder = tmp_path / "out" / "data"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        prepare_reviews(config(tmp_path), make_archive())
    assert (folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "movie_review"}, "no source 'movie_review'.*did you mean 'movie_reviews'"),
        ({"responses_per_prompt": 1}, "at least 2, got 1"),
        ({"evaluation_share": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    """Bug: an impossible option is found out minutes later, or never."""
    with pytest.raises(UserError, match=message):
        ReviewsConfig(**options)


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    """Bug: a misspelt key is ignored and the default used."""
    with pytest.raises(UserError, match=r"unknown key 'response_per_prompt' \(did you mean 'responses_per_prompt'\?\)"):
        build(ReviewsConfig, {"response_per_prompt": 4}, "data.yaml")
    file = tmp_path / "data.yaml"
    file.write_text("source: movie_reviews\nseed: 3\n")
    assert parse_config(ReviewsConfig, ["--config", str(file), "--responses_per_prompt", "4"]) == ReviewsConfig(
        seed=3, responses_per_prompt=4
    )


def test_archive_without_usable_sentences(tmp_path: Path, make_archive: MakeArchive) -> None:
    """Bug: six empty files and no word."""
    with pytest.raises(UserError, match=r"no usable sentence.*not 3 tab"):
        prepare_reviews(config(tmp_path), make_archive(b"nothing here\n", b"nothing\n"))


def test_real_data(real_reviews: Path, tmp_path: Path) -> None:
    """Bug: the real files differ from what the tests make up. Also through the command line, in one line."""
    command = [sys.executable, "-m", "rlhf.data_prep", "--output_dir", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "data")]
    card = json.loads((tmp_path / "data" / "card.json").read_text())
    assert card["sentences_read"] == 10_605
    assert card["fingerprint"].startswith("8ad76fb6591da966")
    assert card["held_out_sentences_in_training"] == 0, "held out are sentences: prompts are few first words"
    assert list(card["held_out_rows_with_a_prompt_of_training"].values()) == [386, 103, 0]
    assert "386 of 1,001 rows of demonstrations/validation" in (tmp_path / "data" / "card.md").read_text()
    wrong = subprocess.run([*command, "--sede", "1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: unknown option --sede (did you mean 'seed'?)\n"
