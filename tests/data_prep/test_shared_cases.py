"""Small inputs that failed: each ends as its README says, through `rlhf data` and straight into a stage.

The folder is that of RLHF_SHARED_CASES, or shared/cases beside the repository; without it the tests are skipped. The other
tests of this room make inputs of the same kinds themselves.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import Built
from transformers import PreTrainedTokenizerFast

from rlhf.base.errors import UserError
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.prepare.personal import replace_personal_data
from rlhf.data_prep.prepare.recipe import Source
from rlhf.data_prep.writable import writable
from rlhf.models.messages import parts_of
from rlhf.models.tokenization import TEMPLATES

CASES = Path(os.environ.get("RLHF_SHARED_CASES", Path(__file__).parents[3] / "shared" / "cases"))

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")


def raw_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


def answers(rows: Any) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def both_ways(build: Callable[..., Built], name: str, kind: str) -> Iterator[list[dict[str, Any]]]:
    """All rows of a kind in the raw file, as the stages load them; and those of the prepared folder."""
    file = CASES / name
    yield [row for split in ("train", "validation") for row in load_rows(file, split, kind=kind).rows]  # type: ignore[arg-type]
    built = build(None, Source(path=str(file), uses=[kind]), stages="shared", clean=[], similarity=1.0, test_share=0.0)
    yield [row for split in ("train", "validation") for row in load_rows(built.folder, split, kind=kind).rows]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["labelled_messages.jsonl", "labelled_completions.jsonl"])
def test_bad_answers_are_no_demonstrations(build_data: Callable[..., Built], name: str) -> None:
    """Catches: answers labelled false trained on as good ones."""
    good = sum(row["label"] for row in raw_rows(name))
    for rows in both_ways(build_data, name, "demonstrations"):
        assert all(answer.startswith("A good answer") for answer in answers(rows)) and len(rows) <= good
    assert load_rows(CASES / name, "train", kind="demonstrations").dropped == {
        "labelled false: a bad answer is no demonstration": 200 - good
    }
    built = build_data(None, Source(path=str(CASES / name)), folder="all", similarity=1.0)
    assert (
        built.card["steps"]["labels"]["dropped"]["labelled false: a bad answer is no demonstration"]["count"]
        == 200 - good
    )


@pytest.mark.parametrize("name", ["preferences_beside_messages.jsonl", "sharegpt_preferences.jsonl"])
def test_preferences_beside_messages(build_data: Callable[..., Built], name: str) -> None:
    """Catches: the preference lost, and an earlier turn as the demonstration."""
    turns = 1 if name.startswith("preferences") else 3
    for rows in both_ways(build_data, name, "comparisons"):
        assert len(rows) == 200
        for row in rows:
            better, worse = sorted(
                zip(row["ratings"], row["responses"], strict=True), reverse=True, key=lambda pair: pair[0]
            )
            assert better[1][0]["content"].startswith("Better: ") and worse[1][0]["content"].startswith("Worse: ")
            assert len(row["prompt"]) == turns and better[0] > worse[0]
    for rows in both_ways(build_data, name, "demonstrations"):
        assert len(rows) == 200 and all(answer.startswith("Better: ") for answer in answers(rows))


def test_system_and_history_are_in_the_prompt(build_data: Callable[..., Built]) -> None:
    """Catches: the system message, or the earlier turns, left out of the prompt."""
    for rows in both_ways(build_data, "system_beside_pair.jsonl", "comparisons"):
        assert len(rows) == 200
        assert all(row["prompt"][0]["role"] == "system" and len(row["prompt"]) == 2 for row in rows)
    for rows in both_ways(build_data, "alpaca_system_history.jsonl", "demonstrations"):
        assert len(rows) == 200
        for row in rows:
            turns = row["prompt"]
            assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
            starts = ("Be brief.", "Earlier question", "Earlier answer", "Now explain")
            assert all(turn["content"].startswith(start) for turn, start in zip(turns, starts, strict=True))


@pytest.mark.parametrize("name", ["margins.jsonl", "margins.csv"])
def test_margins_are_numbers(build_data: Callable[..., Built], name: str) -> None:
    """Catches: a margin that becomes 1, or is refused as text."""
    for rows in both_ways(build_data, name, "comparisons"):
        assert len(rows) == 200
        assert {max(row["ratings"]) - min(row["ratings"]) for row in rows} == {0.25, 3.0}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tool_calls.jsonl", "tool_calls"),
        ("tool_call_last.jsonl", "tool_calls"),
        ("reasoning_content.jsonl", "reasoning_content"),
    ],
)
def test_parts_reach_the_template(
    build_data: Callable[..., Built], toy_tokenizer: PreTrainedTokenizerFast, name: str, part: str
) -> None:
    """Catches: calls and reasoning dropped, so that a model is trained to stop where a call should come."""
    for rows in both_ways(build_data, name, "demonstrations"):
        assert len(rows) == 200
        for row in rows:
            assert any(part in parts_of(message) for message in [*row["prompt"], *row["completion"]])
    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.chat_template = TEMPLATES["chatml"]
    loaded = load_rows(CASES / name, "train", kind="demonstrations")
    with pytest.raises(
        UserError, match=rf"can write none of the \d+ rows \(the chat template does not write '{part}': \d+\)"
    ):
        writable(loaded, tokenizer)


def test_a_repeated_column_is_refused(build_data: Callable[..., Built]) -> None:
    """Catches: the last of two columns of one name wins."""
    file = CASES / "repeated_column.csv"
    for read in (
        lambda: load_rows(file, "train", kind="comparisons"),
        lambda: build_data(None, Source(path=str(file))),
    ):
        with pytest.raises(UserError, match=r"repeated_column.csv: `chosen` stands twice in the header"):
            read()


def test_numbers_that_are_no_phone() -> None:
    """Catches: constants, sums, sections and whole numeric answers replaced by [PHONE] or [IP]."""
    for row in raw_rows("numbers_that_are_no_phone.jsonl"):
        assert {name: replace_personal_data(text) for name, text in row.items()} == row
