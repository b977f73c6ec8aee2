"""Every limit that a user meets: a case just inside and one just outside, computed from the number in the code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import Built, pairs, text

from rlhf.base.errors import UserError
from rlhf.data_prep import ReviewsConfig, Source
from rlhf.data_prep.demo.sentiment import FREQUENT_WORD, MIN_SENTENCES_PER_PROMPT, Sentence, build_tables
from rlhf.data_prep.formats.files import LONGEST_ROW, read_file
from rlhf.data_prep.formats.readers import ROWS_LOOKED_AT
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.load import NAMED_ROWS, VALIDATION_SHARE, load_rows
from rlhf.data_prep.prepare.build import FEWEST_ROWS
from rlhf.data_prep.prepare.clean import FEWEST_LETTERS, Dropped, check_language
from rlhf.data_prep.prepare.dedup import NUM_PERMUTATIONS, RECALL, band_rows, jaccard, near_duplicates
from rlhf.data_prep.prepare.recipe import Options
from rlhf.data_prep.prepare.splits import FEWEST_PROMPTS, LARGEST_GROUP

Build = Callable[..., Built]
Write = Callable[..., Path]


def demonstrations(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": text(i), "completion": text(i + 5000)} for i in range(first, first + count)]


def test_longest_row(tmp_path: Path) -> None:
    """Catches: a row at the limit refused, or one beyond it read into memory."""
    frame = len(json.dumps({"prompt": ""}))
    for beyond in (0, 1):
        file = tmp_path / "train.jsonl"
        file.write_text(json.dumps({"prompt": "x" * (LONGEST_ROW - frame + beyond)}) + "\n")
        (line,) = read_file(file)
        assert bool(line.problem) == bool(beyond)
    with pytest.raises(UserError, match=r"row 1: 16\.0 MB on one line"):
        load_rows(tmp_path, "train", kind="prompts")
    assert Options().max_row_megabytes * 1e6 == LONGEST_ROW, "what `rlhf data` reads, a stage reads"


def test_share_of_malformed_rows(write_jsonl: Write, build_data: Build) -> None:
    """Catches: a share at the limit refused, one above it let pass, or one slip in a handful of rows taken for a share."""
    share = Options().max_rejected_share
    few = write_jsonl([*demonstrations(FEWEST_ROWS // 2), *["{"] * (FEWEST_ROWS - 1 - FEWEST_ROWS // 2)], "few.jsonl")
    many = write_jsonl(demonstrations(100, first=100), "many.jsonl")
    built = build_data(None, Source(path=str(few)), Source(path=str(many)), validation_share=0.3)
    assert len(built.rejected) == FEWEST_ROWS - 1 - FEWEST_ROWS // 2
    for total in (FEWEST_ROWS, 100):
        bad = math.floor(share * total)
        rows = [*demonstrations(total - bad), *["{"] * bad]
        assert len(build_data(rows, folder=f"at{total}", validation_share=0.3).rejected) == bad
        with pytest.raises(UserError, match=rf"{bad + 1} of {total} rows are malformed"):
            build_data([*rows[1:], "{"], folder=f"above{total}", validation_share=0.3)


def test_largest_group(build_data: Build) -> None:
    """Catches: a group at the limit refused, a template just above it split as if it were many prompts, or few prompts
    refused."""
    largest = math.floor(LARGEST_GROUP * FEWEST_PROMPTS)

    def rows(count: int, alike: int) -> list[dict[str, Any]]:
        same = [{"prompt": text(1, 60) + f" {i}", "completion": text(7000 + i)} for i in range(alike)]
        return [*same, *demonstrations(count - alike, first=100)]

    built = build_data(rows(FEWEST_PROMPTS, largest), validation_share=0.3)
    assert built.card["splits"]["largest_group"] == largest
    with pytest.raises(UserError, match=rf"{largest + 1} of {FEWEST_PROMPTS} prompts are near-duplicates"):
        build_data(rows(FEWEST_PROMPTS, largest + 1), folder="above", validation_share=0.3)
    build_data(rows(FEWEST_PROMPTS - 1, largest + 1), folder="few", validation_share=0.3)


def test_reader_fits_most_of_the_first_rows(write_jsonl: Write, build_data: Build) -> None:
    """Catches: a reader that half of the rows speak against; or one that later rows decide."""
    alpaca = [{"instruction": text(i), "output": text(i + 900)} for i in range(ROWS_LOOKED_AT)]
    half = ROWS_LOOKED_AT // 2
    most = write_jsonl([*alpaca[: half + 1], *[{"a": "b"}] * (half - 1)], "most.jsonl")
    built = build_data(None, Source(path=str(most)), validation_share=0.3, max_rejected_share=0.9)
    assert built.card["sources"][0]["reader"] == "alpaca"
    rows = [*alpaca[:half], *[{"a": "b"}] * half, *alpaca]  # the last of them come too late
    with pytest.raises(UserError, match="no reader knows rows with the columns instruction, output, a;"):
        build_data(None, Source(path=str(write_jsonl(rows, "half.jsonl"))), folder="half")


def test_rows_named_for_a_reason(tmp_path: Path) -> None:
    """Catches: a manifest of a million row numbers, or rows that nobody can look up."""
    for count in (NAMED_ROWS, NAMED_ROWS + 1):
        rows = [{"prompt": "p", "completion": "c"}, *[{"prompt": " ", "completion": "c"}] * count]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded = load_rows(tmp_path, "train", kind="demonstrations")
        assert loaded.dropped == {"empty prompt": count}
        assert loaded.dropped_rows == {"empty prompt": list(range(2, 2 + NAMED_ROWS))}


def test_share_of_a_file_for_validation(tmp_path: Path) -> None:
    """Catches: a share that is not read, or that holds for rows in place of prompts."""
    file, count = tmp_path / "all.jsonl", 4000
    file.write_text("".join(json.dumps({"prompt": f"p{i % count}"}) + "\n" for i in range(count + 400)))
    held_out = {row["prompt"][0]["content"] for row in load_rows(file, "validation", kind="prompts").rows}
    spread = 3 * math.sqrt(VALIDATION_SHARE * (1 - VALIDATION_SHARE) / count)
    assert len(held_out) / count == pytest.approx(VALIDATION_SHARE, abs=spread)


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.95])
def test_bands_are_the_most_selective_that_find_enough(similarity: float) -> None:
    """Catches: bands that miss pairs, and bands of fewer rows than needed, by which every text is compared with many."""

    def probability(rows: int) -> float:
        return float(1 - (1 - similarity**rows) ** (NUM_PERMUTATIONS // rows))

    bands, rows = band_rows(similarity)
    assert bands == NUM_PERMUTATIONS // rows and probability(rows) >= RECALL > probability(rows + 1)


def test_similarity(tmp_path: Path) -> None:
    """Catches: > in place of >=, or another similarity than the one asked for."""
    texts = [("a" * 30 + text(1, 60),), ("b" * 30 + text(1, 60),)]
    similarity = jaccard(texts[0][0], texts[1][0])
    assert 0.5 < similarity < 1
    firsts = [
        near_duplicates(lambda start, stop: texts[start:stop], 2, limit, tmp_path).tolist()
        for limit in (similarity, similarity + 1e-9)
    ]
    assert firsts == [[0, 0], [0, 1]]


def test_letters_that_tell_a_language() -> None:
    """Catches: short answers of any language dropped, or long ones of another language let pass."""
    german = "dasisteinlangersatzueberdenwinter"
    check_language(Record(prompt=[{"role": "user", "content": german[: FEWEST_LETTERS - 1]}]), ["zh"])
    with pytest.raises(Dropped, match="language"):
        check_language(Record(prompt=[{"role": "user", "content": german[:FEWEST_LETTERS]}]), ["zh"])


@pytest.mark.parametrize("limit", [5, 30])
def test_shared_prefix_and_prompts_of_a_user(build_data: Build, limit: int) -> None:
    """Catches: a limit that is one off: a prompt too many of a user, or a prefix of one character less."""
    rows = [{**row, "user": "busy"} for row in pairs(limit)]
    others = [{**row, "user": "other"} for row in pairs(limit - 1, first=500)]
    options: dict[str, Any] = {"stages": "shared", "validation_share": 0.4, "similarity": 1.0}
    at_limit = build_data([*rows, *others], max_prompts_per_user=limit, **options)
    above = build_data([*rows, *others], folder="above", max_prompts_per_user=limit - 1, **options)
    assert not at_limit.reasons("limits") and sum(above.reasons("limits").values()) == 1
    frame = "x" * limit
    alike = [{"prompt": f"{frame}{letter} {text(i)}", "completion": text(i)} for i, letter in enumerate("abc")]
    others = [{"prompt": f"{i} {text(i)}", "completion": text(i)} for i in range(1000, 1020)]
    inside = build_data([*alike, *others], folder="inside", min_shared_prefix=limit, **options)
    outside = build_data([*alike, *others], folder="outside", min_shared_prefix=limit + 1, **options)
    assert sum(inside.reasons("limits").values()) == 2 and not outside.reasons("limits")


def test_words_of_the_demo() -> None:
    """Catches: the frequent word held out, or a word just as frequent as it may be never held out; prompts of rare words."""

    def sentences(word: str, count: int) -> list[Sentence]:
        return [Sentence(f"{word}{i}", f"{word} film {i}", (1, 2)) for i in range(count)]

    def tables(word: str, count: int, seed: int = 0) -> dict[str, list[Any]]:
        return build_tables(sentences(word, count), seed=seed, responses_per_prompt=4, evaluation_share=0.5).rows

    for count in (FREQUENT_WORD, FREQUENT_WORD + 1):
        held_out = [bool(tables("The", count, seed)["prompts/validation"]) for seed in range(20)]
        assert any(held_out) == (count == FREQUENT_WORD)
    for count in (MIN_SENTENCES_PER_PROMPT - 1, MIN_SENTENCES_PER_PROMPT):
        rows = tables("Rare", count)
        prompts = len(rows["prompts/train"]) + len(rows["prompts/validation"])
        assert prompts == (count == MIN_SENTENCES_PER_PROMPT)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("similarity", 0.3, 0.299),
        ("similarity", 1.0, 1.001),
        ("validation_share", 1e-9, 0.0),
        ("test_share", 0.0, -1e-9),
        ("held_out_raters", 0.999, 1.0),
        ("max_rejected_share", 0.999, 1.0),
        ("min_difference", 0.0, -1e-9),
        ("max_row_megabytes", 1e-9, 0.0),
        ("min_shared_prefix", 1, 0),
        ("max_prompts_per_user", 1, 0),
        ("stage_weights", [0.0, 0.0, 1e-9], [0.0, 0.0, 0.0]),
    ],
)
def test_options_of_a_recipe(name: str, inside: Any, outside: Any) -> None:
    """Catches: a value that makes sense refused, or one that does not found out after an hour of reading."""
    assert getattr(Options(**{name: inside}), name) == inside
    with pytest.raises(UserError, match=name):
        Options(**{name: outside})


def test_options_of_the_demo() -> None:
    """Catches: comparisons of one response, or an evaluation of all prompts or none."""
    assert ReviewsConfig(responses_per_prompt=2, evaluation_share=1e-9)
    for wrong in ({"responses_per_prompt": 1}, {"evaluation_share": 0.0}, {"evaluation_share": 1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ReviewsConfig(**wrong)  # type: ignore[arg-type]
