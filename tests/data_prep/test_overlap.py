"""What is held out: answers, where the prompts of a task are few and shared; prompts elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from registry.test_registry import publish

from rlhf.data_prep.overlap import ROWS_A_PROMPT, SHARED, shares_few_prompts
from rlhf.doctor.preflight.data import check_leaks
from rlhf.registry import Registry
from rlhf.registry.outcome import overlap_lines
from rlhf.stages.data import describe_data, load_splits, overlap

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write a folder of (prompt, *answers) rows of a kind, and return it."""

    def write(kind: str, train: Sequence[Sequence[str]], validation: Sequence[Sequence[str]]) -> Path:
        place = tmp_path / "data" / kind
        place.mkdir(parents=True)
        for split, rows in (("train", train), ("validation", validation)):
            lines = [json.dumps(row_of(kind, *row)) + "\n" for row in rows]
            (place / f"{split}.jsonl").write_text("".join(lines))
        return tmp_path / "data"

    return write


def row_of(kind: str, prompt: str, *answers: str) -> dict[str, Any]:
    if kind == "demonstrations":
        return {"prompt": prompt, "completion": answers[0]}
    return {"prompt": prompt, "responses": list(answers), "ratings": [1, 0]} if answers else {"prompt": prompt}


FEW = [("a", f"train {i}") for i in range(6)]


def test_answers_are_held_out_where_prompts_are_shared(folder: Folder, tmp_path: Path, capsys: Any) -> None:
    """Bug: the demo's stages began with `384 of 1001 held-out prompts are among those trained on`, beside a passed leak check."""
    place = folder("demonstrations", [*FEW, ("b", "x")], [("a", "new"), ("a", "newer"), ("c", "x")])
    sets = load_splits(str(place), "demonstrations")
    counts = overlap(sets, [], Registry(tmp_path / "registry"))
    assert counts == {"held_out": 3, "by": "answers", "in_training": {"its own data": 0}, "shared_prompts": 2}
    shown = capsys.readouterr().out
    assert shown == (
        "held out are the answers, none of which was trained on; 2 of 3 held-out rows share their prompts with training rows\n"
    )
    leak = check_leaks(str(place), sets["validation"], {"train": sets["train"]}, by="row")
    assert leak.passed and leak.measured == "none of 3 held-out rows is in train"
    assert overlap_lines("sft", {"overlap": counts}) == []


def test_an_answer_that_was_trained_on_counts(folder: Folder, tmp_path: Path, capsys: Any) -> None:
    """Catches: a held-out comparison whose answer the SFT model was trained on; the same answer to another prompt is new."""
    place = folder("demonstrations", [("a", "Good  one"), ("b", "x")], [("c", "y")])
    folder(
        "comparisons",
        [("d", "p", "q")],
        [("a", "good one", "bad one"), ("c", "x", "z"), ("D", "P", "r"), ("d", "s", "t")],
    )
    registry = Registry(tmp_path / "registry")
    data = describe_data(load_splits(str(place), "demonstrations"))
    sft = publish(registry, "sft", config={"dataset": str(place)}, data=data)
    counts = overlap(load_splits(str(place), "comparisons"), [sft], registry)
    assert counts["in_training"] == {"its own data": 1, "sft/demo@1": 1} and counts["by"] == "answers"
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "1 of the 4 held-out rows have an answer that the stage was trained on",
        "1 of the 4 held-out rows have an answer that sft/demo@1 was trained on",
    ]
    marks = overlap_lines("reward", {"overlap": counts}, " of its reward stage")
    assert marks[0] == "1 of the 4 held-out rows of its reward stage have an answer that the stage was trained on"


def test_prompts_are_held_out_where_there_are_no_answers(folder: Folder, tmp_path: Path, capsys: Any) -> None:
    """Catches: PPO judged on prompts that it was trained on, in a task of many prompts."""
    place = folder("prompts", [(str(i),) for i in range(8)], [("1",), ("new",)])
    sets = load_splits(str(place), "prompts")
    counts = overlap(sets, [], Registry(tmp_path / "registry"))
    assert counts["by"] == "prompts" and counts["in_training"] == {"its own data": 1}
    assert capsys.readouterr().out == "1 of the 2 held-out prompts are among those that the stage was trained on\n"
    assert not check_leaks(str(place), sets["validation"], {"train": sets["train"]}, by="prompt").passed


def test_ppo_in_a_task_of_few_prompts(folder: Folder, tmp_path: Path, capsys: Any) -> None:
    """A task of two instructions has no others to hold out; it was refused as a leak."""
    place = folder("prompts", [("write",)] * 6 + [("draw",)] * 6, [("write",), ("draw",)])
    sets = load_splits(str(place), "prompts")
    counts = overlap(sets, [], Registry(tmp_path / "registry"))
    assert counts["by"] == "answers" and counts["in_training"] == {"its own data": 0} and counts["shared_prompts"] == 2
    assert "2 of 2 held-out rows share their prompts" in capsys.readouterr().out
    check = check_leaks(str(place), sets["validation"], {"train": sets["train"]}, by="prompt")
    assert check.passed and "a task of 2 prompts, which training and evaluation share" in check.measured


def test_limits_of_few_prompts() -> None:
    """Just inside and just outside."""
    assert ROWS_A_PROMPT == 4 and SHARED == 0.9
    held_out = ["a"] * 9 + ["new"]
    assert shares_few_prompts(["a", "b"] * 4, held_out) and not shares_few_prompts(["a", "b"] * 4 + ["c"], held_out)
    assert not shares_few_prompts(["a", "b"] * 4, [*held_out, "newer"])


def test_counts_of_earlier_versions() -> None:
    """They counted prompts everywhere: of a policy's evaluation that says something, of a loss on new answers it does not."""
    data = {"overlap": {"held_out": 1001, "in_training": {"its own data": 386, "sft/demo@1": None}}}
    assert overlap_lines("sft", data) == [] and overlap_lines("reward", data) == []
    assert overlap_lines("ppo", data) == [
        "386 of the 1001 held-out prompts are among those that the stage was trained on"
    ]
    assert overlap_lines("ppo", {}) == []
