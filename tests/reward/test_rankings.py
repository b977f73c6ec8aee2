"""Rankings as token rows: nothing is left out without a count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.data_prep.load import load_rows
from rlhf.evaluation.card.judged import judge_rows, rated_pairs
from rlhf.models.tokenization import encode_prompt, encode_response, load_tokenizer
from rlhf.reward.ranking import RankingCollator, ordered_pairs
from rlhf.reward.rankings import Encoded, encode_rankings


@pytest.fixture
def tokenizer(toy_base: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(toy_base("llama")), chat_template="chatml")


ROWS = [
    {"prompt": "good", "responses": ["good film", "bad film"], "ratings": [1.0, 0.0]},
    {"prompt": "bad " * 60, "responses": ["a", "b"], "ratings": [1.0, 0.0]},
    {"prompt": "plot", "responses": ["a " * 60, "b", "c"], "ratings": [1.0, 0.0, 2.0]},
    {"prompt": "film", "responses": ["good", "bad", "dull"], "ratings": [0.2, 0.1, 0.0]},
    {"prompt": "movie", "responses": ["a", "b"], "ratings": [0.0, 0.0], "ratings_held_out": [1.0, 0.0]},
    {"prompt": "the", "responses": ["one"], "ratings": [1.0]},
]


def encoded(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Encoded:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return encode_rankings(load_rows(tmp_path, "train", kind="comparisons"), tokenizer, 50, **options)


def test_token_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Responses of another row, or a prompt length that is off: lengths and likelihoods would be those of other texts."""
    row = encoded(tmp_path, tokenizer).rows[0]
    prompt = [{"role": "user", "content": "good"}]
    head = encode_prompt(tokenizer, prompt)
    answers = [[{"role": "assistant", "content": text}] for text in ("good film", "bad film")]
    assert row["prompt_length"] == len(head)
    assert row["lengths"] == [len(encode_response(tokenizer, prompt, answer)) for answer in answers]
    assert row["input_ids"] == [head + encode_response(tokenizer, prompt, answer) for answer in answers]


def test_what_is_left_out_is_counted_by_reason_and_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt beyond the context that vanishes, or that is cut and asks something else; ties that count as rankings."""
    found = encoded(tmp_path, tokenizer, min_responses=2, min_rating_difference=0.5)
    assert found.dropped == {
        "prompt of 50 tokens or more": [2],
        "prompt and response of more than 50 tokens": [3],
        "no two ratings that differ enough": [4, 5],
    }
    assert len(found.rows) == 1
    assert found.left_out["fewer than two responses"] == {"count": 1, "rows": [6]}, "what loading left out is told, too"
    assert found.left_out["no two ratings that differ enough"] == {"count": 2, "rows": [4, 5]}


def test_an_evaluation_keeps_ties_and_small_rankings(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ties of the raters trained on are pairs to the others; left out, both accuracy and ceiling would flatter."""
    assert [row["prompt"][0]["content"] for row in encoded(tmp_path, tokenizer).rows] == ["good", "film", "movie"]
    large = encoded(tmp_path, tokenizer, min_responses=3)
    assert large.dropped["fewer than 3 responses"] == [1, 5] and len(large.rows) == 1


def test_nothing_left_is_the_users_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A stage that trains on nothing."""
    with pytest.raises(UserError, match=r"max_length=50 tokens \(.*fewer than 9 responses: 3"):
        encoded(tmp_path, tokenizer, min_responses=9)


def test_a_difference_of_exactly_the_minimum_is_one_everywhere(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rankings that are kept for a pair that training takes for a tie, and that the card counts: 0.7 - 0.2 is below 0.5 in
    fp64, 1.3 - 0.8 in fp32, and 50.3 - 49.8 by more than a rounding error of small numbers. 0.1 + 0.2 and 0.3 are a tie."""
    high_low = [(n / 10 + 0.5, n / 10) for n in range(30)] + [(0.7, 0.2), (1.3, 0.8), (50.3, 49.8), (0.1 + 0.2, 0.3)]
    rows = [{"prompt": f"film {i}", "responses": ["a", "b"], "ratings": r} for i, r in enumerate(high_low)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_rows(tmp_path, "train", kind="comparisons")
    kept = encode_rankings(data, tokenizer, 50, min_rating_difference=0.5)
    assert kept.dropped == {"no two ratings that differ enough": [len(rows)]}
    batch = RankingCollator(0)(kept.rows.to_list())
    trained_on = ordered_pairs(batch["ratings"], batch["prompt"], min_difference=0.5)
    judged = judge_rows(kept.rows, set(), [])
    assert len(trained_on.better) == len(rated_pairs(judged.ratings, judged, 0.5)) == len(rows) - 1
    everything = encode_rankings(data, tokenizer, 50, min_rating_difference=0.0)
    assert everything.dropped == {"no two ratings that differ enough": [len(rows)]}
