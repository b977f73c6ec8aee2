"""benchmarks/plan.py at toy size: a plan beside its run, the sums over configurations, and the page."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.run.timing import PhaseTimer


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, whose children's work happens in this process."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("common", "memory", "plan"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module: Any = importlib.import_module("plan")
    monkeypatch.setattr(PhaseTimer, "phase", PhaseTimer.phase)  # the script wraps it; back afterwards
    monkeypatch.setattr(module.common, "measure", lambda _, subject, work: getattr(module, subject)(**work))
    return module


def case(**figures: float) -> dict[str, Any]:
    """A configuration as it should be, but for some figures."""
    right = {"planned_gb": 2.0, "measured_gb": 2.0, "planned_seconds": 9.0, "measured_seconds": 9.0}
    return {"shape": "plan-deep", "stage": "sft", "options": {}, "phases": [], **right, **figures}


def test_a_stage_runs_beside_its_plan(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches: options that a stage does not take, phases that no longer have these names, a table that is not written."""
    page, out = tmp_path / "page.md", tmp_path / "plan.json"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*script.MARKS))
    monkeypatch.setattr(script, "VARIANTS", (("sft", {}),))
    words = ["plan", "--shapes", "tiny", "--rows", "2", "--tokens", "8", "--out", str(out), "--write", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    (measured,) = json.loads(out.read_text())["cases"]
    assert [row["name"] for row in measured["phases"]] == ["load", "train"]
    assert measured["measured_seconds"] > 0 and measured["planned_seconds"] > 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| tiny | sft |" in text and "Median" in text


def test_summary_counts_wrong_fits_and_takes_medians(script: Any) -> None:
    cases = [case(), case(planned_gb=2.2), case(measured_gb=2.8), case(measured_gb=2.81, planned_seconds=4.5)]
    for one in cases:
        one["phases"] = [{"peak": 2e9, "measured_gb": 2.0}]
    summary = script.summarise(cases)
    assert summary["wrong_fits"] == 1  # 2.8, a margin of 1.4, is just inside
    assert summary["memory_error"]["median"] == pytest.approx((0.1 + 0.8 / 2.8) / 2)
    assert summary["time_error"] == {"median": 0.0, "max": 0.5}
