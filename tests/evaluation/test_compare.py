"""The whole evaluation of toy policies, against figures that are made in another way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import World, toy_gold
from peft import PeftModel
from toys import Call

from rlhf.config import EvaluationConfig, parse_config
from rlhf.evaluation import __main__ as command
from rlhf.evaluation.compare import FORMAT, run
from rlhf.models import Compute, load_base, load_policy
from rlhf.registry import Registry
from rlhf.reward.scorer import open_scorer
from rlhf.tokenization import encode_prompt, load_tokenizer

MODELS = ("ppo/toy", "ppo/snaps")
NAMES = ["sft/toy@1", "ppo/toy@1", "ppo/snaps@1"]


def options(world: World, folder: Path, *words: object, models: tuple[str, ...] = MODELS) -> EvaluationConfig:
    given = ["--models", *models, *world.common, "--output_dir", str(folder), *map(str, words)]
    return parse_config(EvaluationConfig, given)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the evaluation is that this file reads."""
    place = tmp_path_factory.mktemp("evaluation")
    run(options(world, place, "--gold", "judged:toy_gold", "--runs", world.run, "--force", "true"))
    return place


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def figure(result: dict[str, Any], model: str, name: str) -> float:
    (line,) = [line for line in result["models"] if line["name"] == model]
    return line["figures"][name]["value"]


def test_the_result_has_all_of_its_parts(result: dict[str, Any]) -> None:
    """A part that another program reads and that is not there, or under another name."""
    assert result["format"] == FORMAT == 1
    assert [line["name"] for line in result["models"]] == NAMES
    assert (result["reference"], result["baseline"], result["reward"]) == ("sft/toy@1", "sft/toy@1", "reward/toy@1")
    assert result["gold"] == {"toy_gold": "judged:toy_gold"} and result["prompts"]["count"] == 6
    shown = {
        "score",
        "gold/toy_gold",
        "kl",
        "kl_k3",
        "kl_full",
        "entropy",
        "length",
        "stop_rate",
        "distinct_1",
        "distinct_2",
    }
    shown |= {"distinct_3", "distinct_2_all", "repetition", "base_perplexity"}
    for line in result["models"]:
        assert set(line["figures"]) == shown
        for name, value in line["figures"].items():
            assert value["low"] is None or value["low"] <= value["value"] <= value["high"], name
            assert (value["low"] is None) == (name == "distinct_2_all"), name
    print(json.dumps(result, indent=1)[:6000])
