"""The sheet of a GPU's figures: its toy form, and what is left of a run that is stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def sheet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_sheet")


def figures(out: Path) -> dict[tuple[str, str], Any]:
    """The lines of a sheet."""
    lines = map(json.loads, out.read_text().splitlines())
    return {(line["section"], line["figure"]): line["value"] for line in lines}


def test_figures_of_a_shape(sheet: Any, tmp_path: Path) -> None:
    """Catches: a sampler, trainer or plan that no longer takes what the sheet gives it, and models that are written to disk."""
    out = tmp_path / "sheet.jsonl"
    (section,) = (one for one in sheet.sections(toy=True) if one.worker == "shape")
    sheet.shape(out=str(out), section="tiny", device="cpu", dtype="float32", **section.work)
    found = {figure: value for (_, figure), value in figures(out).items()}
    assert found["update: responses a pass"] == 4
    phases = sum(found[f"update: {name}, seconds"] for name in ("rollout", "score", "optimise"))
    assert 0 < phases < 3 * found["update: seconds"]
    assert found["update: operator calls"] > 1000 and found["update: times its floor, base"] > 0
    assert found["update: peak GB, planned"] > 0 and found["update: error of the first ratio"] < 1e-5
    ours, library = (found[f"rollout of 4 x 5 tokens, {side}, tokens/s"] for side in ("ours", "generate"))
    assert found["rollout of 4 x 5 tokens, ours / generate"] == pytest.approx(ours / library, rel=1e-3)


def test_sections_in_their_time(sheet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: figures that wait for the tests, time that is given twice, and TRL's update without its wheel."""
    ran: list[tuple[str, float]] = []

    def run(section: Any, settings: Mapping[str, Any], seconds: float, environment: Mapping[str, str]) -> None:
        ran.append((section.name, seconds))
        now[0] += 100.0
        if section.name == "TRL":
            site = Path(environment["PYTHONPATH"].split(":")[0])
            assert (site / "trl" / "__init__.py").is_file()

    def sheets(*words: object) -> dict[tuple[str, str], Any]:
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["gpu_sheet", *map(str, words), "--out", str(tmp_path / "sheet.jsonl")])
        sheet.main(run)
        return figures(tmp_path / "sheet.jsonl")

    now = [0.0]
    monkeypatch.setattr(sheet.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sheet, "gpu_name", lambda: "a GPU")
    left = sheets("--wheels", tmp_path)
    assert ran == [("135M", 120.0), ("1B", 120.0), ("0.5B", 60.0), ("demo", 150.0), ("exactness", 80.0)]
    assert left["TRL", "left out"].endswith("has no wheel of TRL 1.12.0")
    assert left["tests", "left out"] == "no time was left" and left["machine", "gpu"] == "a GPU"
    with sheet.zipfile.ZipFile(tmp_path / "trl-1.12.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("trl/__init__.py", "")
    sheets("--wheels", tmp_path, "--only", "TRL", "tests")
    assert ran == [("TRL", 60.0), ("tests", 380.0)]


@pytest.mark.parametrize(("seconds", "outcome"), [(60.0, "ended with exit code 1"), (0.05, "stopped after 0 s")])
def test_a_stopped_section_keeps_its_figures(sheet: Any, seconds: float, outcome: str, tmp_path: Path) -> None:
    """Catches: a worker that ends the whole sheet, and figures that are written at the end only."""
    out = tmp_path / "sheet.jsonl"
    sheet.note(str(out), "broken", "before", 1.23456789)
    section = sheet.Section("broken", "chain", {"shape": "no such shape"})
    sheet.run_section(section, {"out": str(out), "device": "cpu", "dtype": "float32"}, seconds, {})
    assert figures(out) == {("broken", "before"): 1.2346, ("broken", "not finished"): outcome}


def test_launches_are_counted_by_the_hosts_calls(sheet: Any) -> None:
    """Catches: kernels inside a replayed graph counted as launches, and launches of Triton's left out."""
    calls = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel", "cudaGraphLaunch"]
    others = ["cudaMemcpyAsync", "aten::mm", "void cudaLaunchKernel_like<float>", "cudaStreamSynchronize"]
    assert [name for name in calls + others if sheet.LAUNCHES.match(name)] == calls


@pytest.mark.slow
def test_the_toy_sheet_as_a_user_starts_it(tmp_path: Path) -> None:
    """Catches: a worker that cannot be started, and stages, forks or kills that the sheet no longer knows."""
    out = tmp_path / "sheet.jsonl"
    command = [sys.executable, BENCHMARKS / "gpu_sheet.py", "--toy", "--wheels", tmp_path, "--out", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = figures(out)
    assert found["exactness", "PPO killed and resumed, too"] == "yes"
    assert found["exactness", "two runs of PPO end in the same bytes"] == "yes"
    assert found["chain", "ppo: peak GB"] > 0 and not [name for _, name in found if name == "not finished"]
