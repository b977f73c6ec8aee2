"""The report card of a real (toy) reward model, from the stage and from the command."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import Call

from rlhf.config import RewardCardConfig
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import load_rows
from rlhf.evaluation.card import statistics
from rlhf.evaluation.card.judged import judge_rows
from rlhf.evaluation.card.output import print_card
from rlhf.evaluation.card.report_card import _notes, _score_rows
from rlhf.models.compute import Compute
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Registry
from rlhf.reward.rankings import encode_rankings
from rlhf.reward.scorer import open_scorer


@pytest.fixture(scope="module")
def card(finished: tuple[Path, Path]) -> dict[str, Any]:
    """The card that the toy pipeline's reward stage made."""
    return json.loads((finished[1] / "reward" / "card.json").read_text())


@pytest.fixture(scope="module")
def lines(finished: tuple[Path, Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (finished[1] / "reward" / "scores.jsonl").read_text().splitlines()]


def numbers(tree: Any) -> list[float]:
    """Every number in nested plain data."""
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [tree] if isinstance(tree, int | float) and not isinstance(tree, bool) else []


def test_the_card_has_all_of_its_parts(card: dict[str, Any]) -> None:
    """A part of the card that is empty because a name changed underneath it, or a NaN that no JSON reader takes."""
    for part in ("accuracy", "accuracy_held_out_prompts", "accuracy_held_out_raters", "human_ceiling", "calibration"):
        assert card[part], part
    assert {line["name"] for line in card["rivals"]} == {"length", "bag of words", "likelihood of the SFT model"}
    assert len(card["probes"]) == 9 and all(probe["tried"] <= 3 for probe in card["probes"])
    assert {line["slice"] for line in card["slices"]} == {"label strength", "length", "position", "prompt"}
    assert card["samples"]["samples"]["count"] == 6 and 4 <= card["samples"]["training"]["count"] <= 12
    assert card["human_ceiling"]["value"] == 1.0, "the toy raters agree"
    assert card["verdict"].startswith("reward/toy ")
    assert all(map(math.isfinite, numbers(card))) and len(numbers(card)) > 200


def test_the_card_is_of_the_registered_model(
    card: dict[str, Any], lines: list[dict[str, Any]], finished: tuple[Path, Path], toy_data: Path
) -> None:
    """Scores of the model before training, raw for normalised, or listed beside other texts. The oracle scores the texts
    of scores.jsonl one by one with the registered model, and counts the pairs by a double loop."""
    registry = Registry(finished[0])
    options = RewardCardConfig(model="reward/toy", dataset=str(toy_data), device="cpu")
    scorer = open_scorer(registry.get("reward/toy"), registry, options, Compute.choose(options), 1)
    prompts = [[{"role": "user", "content": line["prompt"]}] for line in lines]
    alone = scorer([scorer.encode(p, line["response"]) for p, line in zip(prompts, lines, strict=True)])
    listed = torch.tensor([line["score"] for line in lines])
    assert float((alone - listed).abs().max()) < (0.1 if scorer.compute.bf16 else 1e-3)
    right = [
        (one["score"] > other["score"]) + 0.5 * (one["score"] == other["score"])
        for one in lines
        for other in lines
        if one["ranking"] == other["ranking"] and one["rating"] >= other["rating"] + 1
    ]
    assert card["accuracy"]["pairs"] == len(right) >= 10
    assert card["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
    assert card["responses"] == len(lines)


def test_columns_of_the_data_are_flattened_in_step(toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """Two rankings of one prompt are one prompt to the bootstrap; ratings, lengths and sources stay with their response."""
    rows = [
        {
            "prompt": "p",
            "responses": ["good", "bad film"],
            "ratings": [1, 0],
            "ratings_held_out": [2, 3],
            "source": "a",
        },
        {
            "prompt": "q",
            "responses": ["a", "b", "c"],
            "ratings": [0, 1, 2],
            "ratings_held_out": [0, 0, 1],
            "source": "b",
        },
        {"prompt": "p", "responses": ["x", "y"], "ratings": [1, 0], "ratings_held_out": [1, 0], "source": "a"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    encoded = encode_rankings(load_rows(tmp_path, "train", kind="comparisons"), tokenizer, 200)
    key = prompt_key([{"role": "user", "content": "q"}])
    judged = judge_rows(encoded.rows, {key}, ["source", "no_such_column"])
    assert judged.ranking.tolist() == [0, 0, 1, 1, 1, 2, 2] and judged.prompt.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert judged.ratings.tolist() == [1, 0, 0, 1, 2, 1, 0]
    assert judged.held_out is not None and judged.held_out.tolist() == [2, 3, 0, 0, 1, 1, 0]
    assert list(judged.texts) == ["good", "bad film", "a", "b", "c", "x", "y"]
    expected = [len(tokenizer(text)["input_ids"]) + 1 for text in judged.texts]  # and the stop token
    assert judged.lengths.tolist() == expected
    assert judged.seen is not None and judged.seen.tolist() == [False, False, True, True, True, False, False]
    assert dict(judged.columns) == {"source": ["a", "a", "b", "b", "b", "a", "a"]}


def test_rows_without_held_out_raters_do_not_count_and_are_told(
    toy_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """One row without held-out raters that takes the ceiling from all others; a rating of theirs that is made up; no word of
    why there is no ceiling, where several raters rated every response."""

    def encoded(*rows: dict[str, Any]) -> Any:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return encode_rankings(load_rows(tmp_path, "train", kind="comparisons"), tokenizer, 200).rows

    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    plain = {"prompt": "p", "responses": ["a", "b"], "ratings": [0, 1], "rater_ratings": [[0, 0], [1, 1]]}
    split = {**plain, "prompt": "q", "ratings_held_out": [0, 2], "rater_ratings_held_out": [[0], [2]]}
    rows = encoded(plain, split)
    judged = judge_rows(rows, None, [])
    assert judged.held_out is not None and str(judged.held_out.tolist()) == "[nan, nan, 0.0, 2.0]"
    own, ceiling = statistics.raters(np.array([1.0, 0.0, 0.0, 1.0]), judged, 1.0)
    assert own is not None and ceiling is not None and (own["value"], own["pairs"], ceiling["value"]) == (1.0, 1, 1.0)
    listed = _score_rows(rows, judged, np.zeros(4), {})
    assert [line["rating_held_out"] for line in listed] == [None, None, 0.0, 2.0]
    assert not [line for line in statistics.slices(np.zeros(4), judged, 0.0) if line["slice"] == "prompt"]
    assert [note.split(":")[0] for note in _notes(rows, judged)] == ["no accuracy on new prompts"]

    rows = encoded(plain)
    judged = judge_rows(rows, set(), [])
    assert judged.held_out is None and "held_out_raters" in _notes(rows, judged)[0]
    rows = encoded({**plain, "rater_ratings": [[0], [1]]})
    assert _notes(rows, judge_rows(rows, set(), [])) == [], "a single rater cannot be held out"


def test_the_command_judges_a_registered_model(
    finished: tuple[Path, Path], toy_data: Path, tmp_path: Path, call: Callable[..., Call], card: dict[str, Any]
) -> None:
    """A command whose figures are not those of the stage on the same held-out data, or that leaves no page, no JSON, no table.
    Its training split here has the held-out prompts, and is not what the model was trained on: they are new all the same."""
    data = tmp_path / "data"
    (data / "comparisons").mkdir(parents=True)
    for split in ("train", "validation"):
        shutil.copy(toy_data / "comparisons" / "validation.jsonl", data / "comparisons" / f"{split}.jsonl")
    words = ["--model", "reward/toy", "--dataset", data, "--registry", finished[0], "--output_dir", tmp_path]
    sizes = [
        "--response_length",
        8,
        "--card_policy_samples",
        6,
        "--card_likelihood_responses",
        12,
        "--card_probe_answers",
        3,
    ]
    done = call("rlhf.evaluation.card.report_card", *words, *sizes, "--wandb_mode", "disabled")
    assert done.code == 0, done.err[-3000:]
    made = json.loads((tmp_path / "card.json").read_text())
    assert made["model"] == "reward/toy@1"
    for part in ("accuracy", "accuracy_held_out_prompts", "human_ceiling", "length", "calibration", "slices"):
        assert json.dumps(made[part]) == json.dumps(card[part]), part
    assert [line["name"] for line in made["rivals"]] == [line["name"] for line in card["rivals"]]
    assert made["verdict"].split(" ", 1)[1].split(".")[0] in done.out.replace("\n", " ")
    assert "held-out pairs" in done.out and "prompt copied" in done.out and "calibration: off by" in done.out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Is the reward model good?" in page
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["card/accuracy"] == made["accuracy"]["value"]


@pytest.mark.parametrize(
    "options, told",
    [
        ({"model": "reward/tox"}, "did you mean 'reward/toy'"),
        ({"model": "sft/toy"}, "give reward/NAME"),
        ({"data": "/no/such/data"}, "no data at /no/such/data"),
        ({"gold": "no_module:f"}, "no_module:f"),
        ({"max_length": 3}, "max_length=3"),
    ],
)
def test_what_a_user_gets_wrong(
    finished: tuple[Path, Path], toy_data: Path, tmp_path: Path, call: Callable[..., Call], options: dict, told: str
) -> None:
    """A traceback, or a card of another model."""
    given = {
        "model": "reward/toy",
        "data": toy_data,
        "registry": finished[0],
        "output_dir": tmp_path / "out",
        **options,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert told in call("rlhf.evaluation.card.report_card", *words).complaint
    assert not (tmp_path / "out").exists()


def test_the_terminal_says_the_verdict_first(card: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A table that hides the bad news below the fold, or markup in a text that rich takes for a command."""
    print_card({**card, "verdict": "reward/toy FALLS SHORT: [bold]it is a coin[/bold]."})
    out = capsys.readouterr().out
    assert out.startswith("reward/toy FALLS SHORT: [bold]it is a coin[/bold].")


def test_the_report_of_the_pipeline_shows_the_card(finished: tuple[Path, Path], card: dict[str, Any]) -> None:
    """A card that is made and not shown."""
    page = html.unescape((finished[1] / "report.html").read_text(encoding="utf-8"))
    assert "Is the reward model good?" in page and "Hack probes" in page
    assert card["verdict"] in page and all(flag["message"] in page for flag in card["flags"])
