"""Each benchmark at toy size."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.data_prep.loading import load_rows


def test_demo_over_seeds(tmp_path: Path, toy_config: Path) -> None:
    """A figure renamed in results.json, or seeds that overwrite each other's runs, would break the README's table."""
    out = tmp_path / "demo.json"
    script = Path(__file__).parents[1] / "benchmarks" / "demo.py"
    words = ["--config", toy_config, "--seeds", 0, 1, "--folder", tmp_path / "runs", "--out", out]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(out.read_text())
    assert [run["seed"] for run in runs] == [0, 1]
    assert runs[0]["artifacts"] != runs[1]["artifacts"]
    assert "| PPO: KL to SFT, nats a response | <= 8 |" in done.stdout


def load_script(name: str) -> Any:
    """A script of benchmarks/ as a module."""
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def reward_card(
    finished: tuple[Path, Path], toy_config: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """`reward_card("speed", ...)` runs benchmarks/reward_card.py in this process, beside a finished toy policy."""
    script = load_script("reward_card")
    shutil.copytree(finished[0] / "sft", tmp_path / "registry" / "sft")

    def run(command: str, *words: object) -> dict[str, Any]:
        places = ["--registry", tmp_path / "registry", "--folder", tmp_path / "runs", "--out", tmp_path / "out.json"]
        toy = ["--policy", "sft/toy", "--dataset", toy_data, "--config", toy_config / "reward.yaml"]
        more = ["--", "--wandb_mode", "disabled", "--lora_r", 4, "--card_policy_samples", 4, "--response_length", 6]
        given = ["reward_card.py", command, *places, *toy, *words, *more, "--card_probe_answers", 2]
        monkeypatch.setattr(sys, "argv", [str(word) for word in given])
        script.main()
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_reward_card_flags(reward_card: Callable[..., dict[str, Any]]) -> None:
    """Labels that are spoilt in the held-out rows too, so that the card has nothing to compare with, or not spoilt at all."""
    found = reward_card("flags")
    for name in ("length", "shuffled"):
        assert found[name]["flags"] and "FALLS SHORT" in found[name]["verdict"]
    assert found["length"]["accuracy"] != found["shuffled"]["accuracy"]


def test_reward_card_pandalm(
    reward_card: Callable[..., dict[str, Any]], toy_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Prompts that are in two folds, a held-out annotator that was trained on, pairs compared across folds, ties as wins."""
    verdicts = [(1, 1, 1), (2, 2, 2), (1, 0, 1), (2, 1, 2), (1, 2, 2), (0, 1, 0)]
    rows = [
        {
            "instruction": f"Say {i}", "input": "" if i % 2 else "please", "response1": f"good film {i}",
            "response2": f"bad plot {i} {i}", "cmp_key": "a_b", "motivation_app": "app",
            **{f"annotator{n + 1}": verdict for n, verdict in enumerate(verdicts[i % len(verdicts)])},
        }
        for i in range(24)
    ]  # fmt: skip
    (tmp_path / "testset.json").write_text(json.dumps(rows))
    found = reward_card("pandalm", "--file", tmp_path / "testset.json", "--base", toy_base("llama"), "--folds", 2)
    # Annotators 1 and 3 are trained on: they tie on (1, 2, 2) and (0, 1, 0). Annotator 2 is held out: undecided on (1, 0, 1).
    assert found["accuracy"]["pairs"] == found["accuracy"]["prompts"] == 16
    assert found["accuracy_held_out_rater"]["pairs"] == 20
    # Of those 20 verdicts the others share (1, 1, 1) and (2, 2, 2), oppose (2, 1, 2), and tie on two kinds.
    assert found["human_ceiling"]["value"] == (4 + 4 + 0 + 4 * 0.5 + 4 * 0.5) / 20
    assert [line["name"] for line in found["rivals"]] == ["length", "bag of words", "likelihood of the SFT model"]


@pytest.mark.skipif("RLHF_PANDALM" not in os.environ, reason="RLHF_PANDALM does not name PandaLM's testset-v1.json")
def test_the_real_file_of_pandalm(tmp_path: Path) -> None:
    """The real file differs from the one made up above: verdicts in another order, answers that are no texts, prompts that
    are in many rows and so must not be in two folds. The ceiling was also worked out apart from this code: .942 on all 999."""
    script = load_script("reward_card")
    rows = script.pandalm_rows(Path(os.environ["RLHF_PANDALM"]))
    assert len(rows) == 999 and len({row["prompt"] for row in rows}) == 170
    sizes = [sum(script.fold_of(row, 5) == fold for row in rows) for fold in range(5)]
    assert sum(sizes) == 999 and min(sizes) > 100
    script.write_data(tmp_path, "comparisons", {"train": rows})
    loaded = load_rows(tmp_path, "train", kind="comparisons")
    assert loaded.dropped == {"empty response": 53, "all responses are rated the same": 85} and len(loaded.rows) == 861
    agreed = [
        0.5 + 0.5 * ((a[0] > a[1]) - (a[0] < a[1])) * (1 if b[0] > b[1] else -1)
        for a, b in zip(loaded.rows["ratings"], loaded.rows["ratings_held_out"], strict=True)
        if b[0] != b[1]
    ]
    assert 0.93 < sum(agreed) / len(agreed) < 0.95


def test_reward_card_speed_and_equal_compute(reward_card: Callable[..., dict[str, Any]]) -> None:
    """Rates of other pairs on the two sides, or a comparison in which one side sees more responses an update."""
    found = reward_card("speed", "--responses", 8, "--repeats", 1)
    assert found["K=4"]["pairs"] == 12 and found["K=4"]["ratio"] > 0 and "K=9" not in found
    assert set(found["K=4"]["pairs_per_second"]) == {"rankings", "single pairs"}
    found = reward_card("equal_compute", "--responses", 8)
    assert found["single pairs"]["rows"] == 6 * found["rankings of 4"]["rows"] > 0
    assert found["machine"]["cores"] >= 1
