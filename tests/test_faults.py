"""The benchmark of the doctor: known faults, held-out faults and clean runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `faults` of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str) -> Any:
    return importlib.import_module(f"faults.{name}")


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "doctor.py"), *map(str, words)], capture_output=True, text=True, timeout=600
    )


def row(name: str, *found: str, refused: str = "", by: str = "guard", group: str = "held_out") -> dict[str, Any]:
    """A finished run."""
    fault = {"what": name, "kind": "input", "causes": ["advantages"], "words": ["mask"]} if group != "clean" else {}
    return {
        "name": name, "group": group, "stage": "ppo", **fault, "live": [], "seconds": 1.0,
        "findings": [{"name": check, "first": 1, "last": 2, "evidence": ""} for check in found],
        "refused": {"by": by, "error": "ValueError", "message": refused} if refused else None,
    }  # fmt: skip


def test_two_faults_and_a_clean_run(tmp_path: Path) -> None:
    """A patch whose target was renamed, a fault that does not reach its run, or a run that is made again when it is there."""
    words = ["--folder", tmp_path / "runs", "--out", tmp_path / "faults.json", "--updates", 3, "--pretraining", 40]
    only = ["--only", "sft_learning_rate_0", "h_prompt_cut", "clean_ppo_plain_small_0"]  # all in one world
    done = command(*words, *only)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = {run["name"]: run for run in json.loads((tmp_path / "faults.json").read_text())["runs"]}
    assert runs["sft_learning_rate_0"]["right"] and runs["sft_learning_rate_0"]["group"] == "tuned"
    assert runs["h_prompt_cut"]["group"] == "held_out"
    assert not any(run["refused"] for run in runs.values()), "neither the faults nor the stages without any"
    assert {"clean_sft_plain_small_0", "clean_reward_plain_small_0"} <= runs.keys()
    folders = {name: tmp_path / "runs" / "runs" / name for name in runs}
    assert all(json.loads((folders[name] / "answer.json").read_text())["name"] == name for name in runs)
    entropies = {
        next(row["objective/entropy"] for row in map(json.loads, lines) if "objective/entropy" in row)
        for lines in (
            (folders[name] / "ppo" / "metrics.jsonl").read_text().splitlines()
            for name in ("h_prompt_cut", "clean_ppo_plain_small_0")
        )
    }
    assert len(entropies) == 2, "the fault does not reach its run"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "runs").glob("*/verdict.json")}
    again = command(*words, *only)
    assert again.returncode == 0 and "| SFT: learning rate 0 |" in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_data_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """Catches: data in the order of a set, so that clean runs of two machines are not the same runs."""
    program = "import sys; from pathlib import Path; from faults.world import write_data; write_data(Path(sys.argv[1]), seed=3)"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(BENCHMARKS)}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / seed)], env=environment, check=True)
    first, second = (
        {file.relative_to(tmp_path / seed): file.read_bytes() for file in (tmp_path / seed).glob("*/*.jsonl")}
        for seed in ("1", "2")
    )
    assert len(first) == 6 and first == second


def test_patches_leave_nothing_behind(tmp_path: Path) -> None:
    """Catches: a module that is first imported under a patch and keeps the patched function for all later runs."""
    program = """
import sys
from pathlib import Path
from faults.cases import cases
from faults.run import Bench
bench = Bench(Path(sys.argv[1]), updates=1, pretraining=1, options={})
with bench._faulty(next(case for case in cases() if case.name == "h_logprobs_bf16")):
    from rlhf.models import logprobs
    from rlhf.ppo import forward
    assert "held_out" in forward.log_distribution.__module__ and "held_out" in logprobs.log_distribution.__module__
assert forward.log_distribution is logprobs.log_distribution and forward.log_distribution.__module__ == "rlhf.models.logprobs"
"""
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_judging() -> None:
    """Catches: a symptom further down that counts as the right cause, a refusal for another reason, a crash that counts as
    detected, and clean runs in the rates of faults."""
    names = {"advantages": ("a", "b")}
    score = load("score")
    rows = [
        row("first", "b", "c"), row("second", "c", "a"), row("missed"), row("guard", refused="The mask is no prefix"),
        row("other guard", refused="no disk"), row("crash", refused="mask", by="crash"), row("tuned", "a", group="tuned"),
        row("healthy", group="clean"), row("alarm", "c", group="clean"),
    ]  # fmt: skip
    summary = score.summarise(rows, lambda run: score.judge(run, names))
    judged = summary["runs"]
    assert [run["right"] for run in judged[:6]] == [True, False, False, True, False, False]
    assert [run["right_at_all"] for run in judged[:6]] == [True, True, False, True, False, False]
    statement = row("statement", "c", "a")
    statement["findings"][0]["kind"] = "audit"
    assert not score.judge(statement, names)["right"] and score.judge(statement, names)["right_by_symptoms"]
    assert score.judge(statement, {"advantages": ("audit/c",)})["right"]
    assert not score.judge(statement, {"advantages": ("review/c",)})["right"]
    assert judged[4]["named"] == "refused" and judged[5]["named"] == "nothing"
    held_out = summary["held_out"]
    assert (held_out["detected"]["runs"], held_out["detected"]["of"], held_out["right_cause"]["runs"]) == (4, 6, 2)
    assert (summary["tuned"]["right_cause"]["runs"], summary["tuned"]["right_cause"]["of"]) == (1, 1)
    assert (summary["false_alarms"]["runs"], summary["false_alarms"]["of"]) == (1, 2)


def test_intervals() -> None:
    """Wilson's interval of 4 of 5, by hand: (p + z^2/2n -+ z sqrt(p q / n + z^2/4n^2)) / (1 + z^2/n)."""
    rate = load("score").share([True] * 4 + [False])
    assert (rate["low"], rate["high"]) == (pytest.approx(0.3755, abs=1e-4), pytest.approx(0.9638, abs=1e-4))
    assert load("score").share([]) == {"of": 0}


def test_tables(tmp_path: Path) -> None:
    """Catches: tables that lose a page's other text, and a tool that could not be run in the rates."""
    score = load("score")
    names = {"advantages": ("a",)}
    summary = score.summarise([row("x y", "c", "a"), row("alarm", "c", group="clean")], lambda r: score.judge(r, names))
    rival = {key: summary[key] for key in ("tuned", "held_out", "false_alarms")}
    summary["rivals"] = {"one": rival, "other": {"not_run": "No module named other"}}
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{score.BEGIN}\nold\n{score.END}\n\nafter\n")
    score.write_tables(page, summary)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| x y | afterwards | c | no | a |" in text and "Alarms on clean runs: alarm: c." in text
    assert "| faults held out: detected | 1 | 1 | 100% |" in text
    assert "| one | held out | 1 of 1" in text and "| other | - | No module named other |" in text


def test_every_cause_has_a_name_of_the_doctor() -> None:
    """Catches: a fault whose cause no table knows, and a table that names a check or statement which does not exist."""
    cases, names = load("cases").cases(), load("accepted").NAMES
    faults = [case.fault for case in cases if case.fault is not None]
    causes = {cause for fault in (*faults, load("tuned").OVEROPTIMISED) for cause in fault.causes}
    assert causes <= names.keys() and all(fault.causes for fault in faults)
    assert {cause for table in load("rivals").NAMES.values() for cause in table} <= causes
    groups = [case.group for case in cases]
    assert groups.count("clean") >= 60 and groups.count("tuned") >= 40 and groups.count("held_out") >= 30
    assert len({case.name for case in cases}) == len(cases)


def test_the_page_has_the_figures_of_the_benchmark() -> None:
    """Catches: tables that were edited by hand, or left behind by newer runs."""
    summary = json.loads((BENCHMARKS / "results" / "faults.json").read_text())
    assert load("score").tables(summary) in (ROOT / "docs" / "health.md").read_text(encoding="utf-8")
