"""docs/python.md: its examples run from top to bottom, as one program, on a toy model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import WORDS

from rlhf.run import checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def write_preferences(file: Path) -> None:
    """Pairs about films, as a reader of the page has them of another kind."""
    draw = random.Random(0)
    rows = []
    for number in range(60):
        words = [draw.choice(WORDS) for _ in range(6)]
        good, bad = draw.choice(["good", "great"]), draw.choice(["bad", "awful"])
        rows.append(
            {
                "prompt": f"Film {number}: {' '.join(words)}?",
                "chosen": f"The {draw.choice(WORDS)} film is {good}",
                "rejected": f"The {draw.choice(WORDS)} film is {bad}",
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def page(
    tmp_path_factory: pytest.TempPathFactory, toy_base: Callable[[str], Path], request: pytest.FixtureRequest
) -> dict[str, Any]:
    """The variables that the page's program leaves."""
    folder = tmp_path_factory.mktemp("page")
    write_preferences(folder / "preferences.jsonl")
    names: dict[str, Any] = {"__name__": "python_page"}
    program = "\n".join(BLOCKS)
    line = 'MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert program.count(line) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(program.replace(line, f"MODEL = {str(toy_base('llama'))!r}"), "docs/python.md", "exec"), names)
    return names | {"folder": folder}


def test_the_stages_register_what_the_page_prints(page: dict[str, Any]) -> None:
    """Catches: an example that fails or takes a figure that is not there, and one whose result is another than the page says."""
    artifacts = [page[name] for name in ("sft_policy", "reward_model", "policy", "brief", "judged")]
    assert [one.reference for one in artifacts] == [
        "sft/own@1",
        "reward/own@1",
        "ppo/own@1",
        "ppo/brief@1",
        "ppo/judged@1",
    ]
    assert page["data"] == "outputs/own/data" and (page["folder"] / "registry" / "ppo" / "own" / "v1").is_dir()
    assert {"score_before", "score_after"} <= set(page["policy"].manifest.metrics)


def test_objects_are_recorded_as_unknown(page: dict[str, Any]) -> None:
    """Catches: a recipe that claims to know a function or model of which it has nothing but the name."""
    brief, judged = page["brief"].manifest, page["judged"].manifest
    assert brief.config["reward"] == ["reward/own", "python:brevity"] and brief.config["gold"] == "python:variety"
    assert brief.inputs == {
        "reward python:brevity": "unknown",
        "gold python:variety": "unknown",
    }
    assert judged.config["reward"] == ["python:Classifier"]


def test_the_callbacks_watched_and_stopped(page: dict[str, Any]) -> None:
    """Catches: a callback that is not called after each update, and an order that is not followed."""
    assert len(page["scores"]) == 2 and not (page["folder"] / "registry" / "ppo" / "far").exists()
    assert checkpoint.latest(page["folder"] / "outputs/far/ppo/checkpoints").name == "checkpoint-2"  # type: ignore[union-attr]


def test_the_evaluation_judges_by_the_callable(page: dict[str, Any]) -> None:
    """Catches: a judge that was handed over and not asked."""
    lines = {(line["model"], line["judge"]) for line in page["result"]["win_rates"]}
    assert lines == {("ppo/own@1", "reward/own@1"), ("ppo/own@1", "variety")}
    assert [point["model"] for point in page["result"]["frontier"]["points"]] == ["ppo/own@1"]


def test_the_plain_model_is_the_policy_that_chats(page: dict[str, Any]) -> None:
    """Catches: a model without the adapters of its stages."""
    ids = torch.tensor([page["after"].encode([{"role": "user", "content": page["question"]}])])
    with torch.no_grad():
        ours, plain = page["after"].model(ids).logits.float(), page["model"](ids).logits
    torch.testing.assert_close(ours, plain, atol=0.1, rtol=0.05)  # bf16 against fp32
    first = page["after"].answer(page["question"], seed=1)
    assert first == page["after"].answer([{"role": "user", "content": page["question"]}], seed=1)
    assert 1 <= len(first.tokens) <= 12
