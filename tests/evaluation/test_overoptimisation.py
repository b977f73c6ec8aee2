"""benchmarks/overoptimisation.py at toy size."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judged import World

from rlhf.registry import Registry

PLACE = ("--wandb_mode", "disabled", "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("overoptimisation")


def row(first: str, text: str, rating: float) -> dict[str, Any]:
    ask = f'Write one sentence of a movie review that starts with "{first}"'
    prompt, answer = [{"role": "user", "content": ask}], [{"role": "assistant", "content": text}]
    return {"prompt": prompt, "completion": answer, "rating": rating}


def test_rankings_are_of_one_prompt_each(script: Any) -> None:
    """Sentences of two prompts compared, a rating beside another's sentence, a ranking of one, or one larger than asked for."""
    rows = [row("It" if text == "b" else "The", text, i) for i, text in enumerate("abcdef", start=1)]
    made = script.rankings(rows, largest=2)
    assert [[r[0]["content"] for r in m["responses"]] for m in made] == [["a", "c"], ["d", "e"]]
    assert [m["ratings"] for m in made] == [[1, 3], [4, 5]] and all(m["prompt"] == rows[0]["prompt"] for m in made)


def test_judge_and_frontier(
    script: Any,
    world: World,
    toy_data: Path,
    toy_config: Path,
    toy_base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A judge that was trained on the demo's comparisons or on its policy; a frontier without snapshots, or without one of the
    two judges."""
    registry = tmp_path / "registry"
    shutil.copytree(world.registry, registry)

    def run(command: str, *words: object) -> dict[str, Any]:
        places = ["--registry", registry, "--folder", tmp_path / "runs", "--out", tmp_path / "out.json"]
        monkeypatch.setattr(sys, "argv", list(map(str, ["overoptimisation.py", command, *places, *words])))
        script.main()
        return json.loads((tmp_path / "out.json").read_text())

    base = ("--base", toy_base("llama"), "--dataset", toy_data, "--config", toy_config / "reward.yaml")
    small = ("--card_policy_samples", 4, "--response_length", 6, "--card_probe_answers", 2, "--lora_r", 4)
    card = run("reward", *base, "--", *PLACE, *small)
    assert card["accuracy"]["pairs"] > 0
    assert [parent.name for parent in Registry(registry).get("reward/independent").manifest.parents] == ["independent"]
    trained = json.loads((tmp_path / "runs" / "judge_data" / "comparisons" / "train.jsonl").read_text().splitlines()[0])
    told = [json.loads(line) for line in (toy_data / "demonstrations" / "train.jsonl").read_text().splitlines()]
    assert trained["responses"][0] in [row["completion"] for row in told]

    sizes: tuple[Any, ...] = ("--num_prompts", 6, "--samples_per_prompt", 2, "--response_length", 8)
    sizes += ("--best_of", 2, "--best_of_prompts", 2)
    found = run("frontier", "--runs", world.run, "--dataset", world.prompts, "--", *PLACE, *sizes)
    assert list(found["gold"]) == ["vader", "independent"]
    assert {point["update"] for point in found["frontier"]["points"]} >= {1, 2}
    point = found["frontier"]["points"][0]
    row = script.frontier_table(found).splitlines()[2].split(" | ")
    assert row[0] == f"| {point['model']}" and float(row[2]) == pytest.approx(point["score_gain"]["value"], abs=0.005)

    told = run("course", "--runs", world.run)[world.run.name]
    logged = [json.loads(line) for line in (world.run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [r["objective/score"] for r in told["updates"]] == [
        r["objective/score"] for r in logged if "objective/score" in r
    ]
    assert told["answers"] and script.course_table(told["updates"]).splitlines()[-1].startswith(
        f"| {logged[-1]['step']} |"
    )
