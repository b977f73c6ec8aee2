"""Ratings to preferences: the three rules against numbers worked out by hand, merging, raters held out and kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from prepared import Built, text

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.records import Record, ranks_of
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.ratings import bradley_terry, clear_pairs, majority_votes, mean_ratings, merge

Build = Callable[..., Built]


def record(matrix: list[list[float | None]], raters: str, responses: str = "ab") -> Record:
    return Record(
        prompt=[{"role": "user", "content": "p"}], responses=list(responses), raters=list(raters), rater_ratings=matrix
    )


def test_means_leave_out_who_did_not_see_it() -> None:
    """Catches: a missing rating counted as 0."""
    assert mean_ratings([[1, None, 4], [2, 2, None]]) == [2.5, 2.0]


def test_majority() -> None:
    """Catches: a rater of large numbers who outvotes the others: votes count heads. a beats b 2:1, b beats c 3:0, a and c tie."""
    scores = majority_votes([[2, 2, 0], [1, 1, 9], [0, 0, 0]])
    assert scores == pytest.approx([((2 - 1) / 3 + 2 / 3) / 2, ((1 - 2) / 3 + 1) / 2, (-2 / 3 - 1) / 2])
    assert majority_votes([[5, 1], [1, 5]]) == [0, 0]


def test_bradley_terry_is_the_maximum_of_its_likelihood() -> None:
    """Catches: a fit that is not the fit. The oracle climbs the log-likelihood by its gradient, wins with 1/2 of prior added."""
    matrix = [[3, 3, 1, 2], [2, 2, 2, 2], [1, 1, 3, 1]]
    wins = [[0.5] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(3):
            for a, b in zip(matrix[i], matrix[j], strict=True):
                wins[i][j] += (a > b) + 0.5 * (a == b)
    theta = [0.0] * 3
    for _ in range(20_000):
        for i in range(3):
            slope = sum(
                wins[i][j] - (wins[i][j] + wins[j][i]) / (1 + math.exp(theta[j] - theta[i])) for j in range(3) if j != i
            )
            theta[i] += 0.05 * slope
    middle = sum(theta) / 3
    assert bradley_terry(matrix) == pytest.approx([t - middle for t in theta], abs=1e-6)


def test_bradley_terry_of_a_clean_sweep_is_finite_and_of_two_is_the_log_odds() -> None:
    """Catches: infinite strengths. 3 wins of 3, and half a win each of prior: odds 3.5 : 0.5."""
    strengths = bradley_terry([[2, 2, 2], [1, 1, 1]])
    assert strengths[0] - strengths[1] == pytest.approx(math.log(7))


def test_least_difference() -> None:
    """Catches: a limit that leaves out the pairs at the limit, or is taken of sums; of two, a vote of 2:1 is a share of 1/3."""
    two = Record(prompt=[{"role": "user", "content": "p"}], responses=["a", "b", "c"], ratings=[1.0, 2.0, 1.5])
    assert clear_pairs(two, "mean", 0.5) == [(1, 0), (2, 0), (1, 2)]
    assert clear_pairs(two, "mean", 0.6) == [(1, 0)]
    votes = majority_votes([[1, 1, 0], [0, 0, 1]])
    vote = Record(prompt=two.prompt, responses=["a", "b"], ratings=votes)
    assert clear_pairs(vote, "majority", 0.33) == [(0, 1)] and clear_pairs(vote, "majority", 0.34) == []


def test_ranks() -> None:
    """Catches: equal ratings with different ranks, or 0 for the best."""
    assert ranks_of([3.0, 5.0, 5.0, 1.0]) == [3, 1, 1, 4]


def test_merge() -> None:
    """Catches: ratings that move to another response or rater; a rater who said it twice counted twice."""
    merged = merge([record([[1.0], [2.0]], "x"), record([[5.0], [4.0]], "y", "ba"), record([[3.0], [2.0]], "x")])
    assert (merged.responses, merged.raters) == (["a", "b"], ["x", "y"])
    assert merged.rater_ratings == [[2.0, 4.0], [2.0, 5.0]] and merged.ratings == [3.0, 3.5]


def long_rows(prompts: int, raters: int = 6) -> list[dict[str, Any]]:
    """One rating a row, as a spreadsheet has it: three responses of true quality 2, 1, 0; rater r adds r % 2 to the second."""
    return [
        {
            "prompt": text(10 * p),
            "response": text(10 * p + k + 1),
            "rater": f"r{r}",
            "rating": 2 - k + (r % 2) * (k == 1),
        }
        for p in range(prompts)
        for r in range(raters)
        for k in range(3)
    ]


def test_one_rating_a_row_becomes_rankings(build_data: Build) -> None:
    """Catches: rows of one response that are lost as "no comparison"; ratings mixed up between responses; lost rater ids."""
    built = build_data(long_rows(30), validation_share=0.3, stages="shared")
    rows = built.rows("comparisons")
    assert len(rows) == 30
    for row in rows:
        by_text = {r[0]["content"]: rating for r, rating in zip(row["responses"], row["ratings"], strict=True)}
        number = next(p for p in range(30) if text(10 * p) == row["prompt"][0]["content"])
        assert by_text == {text(10 * number + 1): 2.0, text(10 * number + 2): 1.5, text(10 * number + 3): 0.0}
        assert row["raters"] == [f"r{r}" for r in range(6)] and len(row["rater_ratings"]) == 3
    assert built.card["steps"]["merge raters"]["changed"] == 30


def test_rules_and_forms(build_data: Build) -> None:
    """Catches: an option that nobody reads, pairs below the limit, or a margin that is not the difference."""
    rows = long_rows(30)
    pairs = build_data(rows, validation_share=0.3, stages="shared", comparison_form="pairs", min_difference=1.0)
    margins = sorted({row["margin"] for row in pairs.rows("comparisons")})
    assert margins == [1.5, 2.0], "2 and 1.5 are too close"
    assert set(pairs.rows("comparisons")[0]) >= {"prompt", "chosen", "rejected", "margin", "raters"}
    votes = build_data(rows, folder="votes", validation_share=0.3, stages="shared", preference_rule="majority")
    assert {tuple(row["ratings"]) for row in votes.rows("comparisons")} == {(0.75, 0.25, -1.0)}
    strengths = build_data(rows, folder="bt", validation_share=0.3, stages="shared", preference_rule="bradley_terry")
    assert {round(sum(row["ratings"]), 6) for row in strengths.rows("comparisons")} == {0.0}


def test_no_clear_preference_is_no_comparison(build_data: Build) -> None:
    """Catches: a tie that trains the reward model on the first of two; or a prompt lost with it, which PPO could use."""
    rows = long_rows(30) + [
        {"prompt": text(5000), "response": said, "rater": rater, "rating": rating}
        for said, rater, rating in (("one", "x", 1), ("two", "x", 2), ("one", "y", 2), ("two", "y", 1))
    ]
    built = build_data(rows, validation_share=0.3, stages="shared")
    assert text(5000) in built.prompts("prompts") and text(5000) not in built.prompts("comparisons")


def test_raters_held_out_go_into_a_column_of_their_own(build_data: Build) -> None:
    """Catches: a held-out rater whose rating is in the training mean too; and a column that the reward stage cannot read."""
    built = build_data(long_rows(40, raters=10), validation_share=0.3, stages="shared", held_out_raters=0.4)
    rows = built.rows("comparisons")
    seen: dict[str, set[str]] = {"": set(), "_held_out": set()}
    for row in rows:
        assert len(row["raters"]) + len(row["raters_held_out"]) == 10
        for half, raters in seen.items():
            raters |= set(row[f"raters{half}"])
            means = [sum(of_response) / len(of_response) for of_response in row[f"rater_ratings{half}"]]
            assert row[f"ratings{half}"] == pytest.approx(means)
        assert row["ratings"][1] != row["ratings_held_out"][1], "the response that raters disagree on"
    assert len(seen[""]) + len(seen["_held_out"]) == 10 and not seen[""] & seen["_held_out"]
    loaded = load_rows(built.folder, "train", kind="comparisons").rows
    assert len(loaded) == built.card["rows"]["comparisons/train"]
    assert {"ratings_held_out", "rater_ratings"} <= set(loaded.column_names)


def test_split_by_rater(build_data: Build) -> None:
    """Catches: a rater in two splits, whose taste is then both learned and tested; and a held-out prompt that is trained on
    because another rater's split is train."""
    built = build_data(long_rows(60, raters=24), split_by="rater", validation_share=0.3, stages="shared")
    raters = {
        s: {r for row in built.rows("comparisons", s) for r in row["raters"]} for s in ("train", "validation", "test")
    }
    assert len(raters["train"]) > 3 and raters["validation"]
    assert not raters["train"] & raters["validation"] and not raters["train"] & raters["test"]
    assert set.union(*raters.values()) == {f"r{r}" for r in range(24)}
    assert not built.prompts("comparisons", "train") & built.prompts("prompts", "validation", "test")
    assert built.prompts("comparisons", "train") & built.prompts("comparisons", "validation"), (
        "the same prompts, other raters"
    )
    assert built.reasons("splits") == {
        "rated by a rater of training, but its prompt is held out": 60 - len(built.rows("comparisons", "train"))
    }


def test_contradictions_without_raters_are_dropped(build_data: Build) -> None:
    """Catches: the same pair ordered both ways, of which the first is believed; a copy of a pair is no contradiction."""
    rows = [{"prompt": text(3 * i), "chosen": text(3 * i + 1), "rejected": text(3 * i + 2)} for i in range(40)]
    swapped = {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    built = build_data([*rows, swapped, rows[1]], validation_share=0.3, stages="shared")
    assert built.reasons("duplicates") == {
        "the same responses are ordered differently in another row": 2,
        "copy of an earlier row": 1,
    }
    assert rows[0]["prompt"] not in built.prompts("comparisons") and rows[1]["prompt"] in built.prompts("comparisons")


def test_split_by_something_that_no_row_names(build_data: Build) -> None:
    """Catches: a split by user that is a split by prompt in truth."""
    rows = [{"prompt": text(i), "completion": "yes"} for i in range(40)]
    with pytest.raises(
        UserError, match=r"split_by user: no row of source rows names one; map a column \(columns: \{user: THEIRS\}\)"
    ):
        build_data(rows, split_by="user")
