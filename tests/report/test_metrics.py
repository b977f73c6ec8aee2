"""The table of metrics: one entry shows a metric in every view, and no view has a list of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.test_comparison import content_of
from report.test_run_page import plots_of, write_jsonl
from rich.console import Console
from test_docs import metrics_table
from wandb_reader import OfflineRun

from rlhf.report.compare_page import write_comparison
from rlhf.report.run_page import write_report
from rlhf.report.workspace import workspace
from rlhf.run import terminal
from rlhf.run.metrics import METRICS, Metric, Sign, axes, shown
from rlhf.run.tracker import Tracker

NEW = Metric(
    "curiosity/surprise", "surprise", "how new the answers are", "0: seen it all", "nats a joke",
    ("terminal", "report", "comparison", "health"), title="Surprise", note="Should stay.",
    signs=(Sign("Least surprise", min, "Boredom."),),
)  # fmt: skip


@pytest.fixture
def new_metric(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metric]:
    monkeypatch.setitem(METRICS, NEW.name, NEW)
    yield NEW


@pytest.fixture
def run(tmp_path: Path, new_metric: Metric) -> Path:
    """A run that logged the new metric and nothing else."""
    write_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl", [{"step": s, new_metric.name: s / 4} for s in (1, 2, 3)])
    (tmp_path / "run" / "results.json").write_text(json.dumps({"ppo": {"kl": 1.0}}))
    return tmp_path / "run"


def test_a_new_entry_is_drawn_in_the_runs_page(run: Path) -> None:
    """Bug: a metric that is logged and not drawn, because the page has a list of its own."""
    (plot,) = plots_of(write_report(run).read_text(encoding="utf-8"))
    assert (plot["title"], plot["unit"], plot["note"]) == ("Surprise", "nats a joke", "Should stay.")
    assert plot["traces"] == [{"name": "surprise", "x": [1, 2, 3], "y": [0.25, 0.5, 0.75]}]


def test_a_new_entry_is_drawn_and_tabled_in_the_comparison(run: Path, tmp_path: Path) -> None:
    """Bug: as above, for the curves and the health table of several runs."""
    page = write_comparison([run], tmp_path / "page.html").read_text(encoding="utf-8")
    (chart,) = content_of(page)["charts"]
    assert (chart["title"], chart["unit"], chart["traces"][0]["y"]) == ("Surprise", "nats a joke", [0.25, 0.5, 0.75])
    assert '<td>Least surprise</td><td class="n">0.25</td>' in page


def test_a_new_entry_is_shown_on_the_terminal(new_metric: Metric) -> None:
    """Bug: as above, for the view of a run that goes on."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with terminal.view("ppo", console) as view:
        assert view is not None
        terminal.show_metrics({new_metric.name: 0.25, "unknown/metric": 7.0})
        output = Console(file=io.StringIO(), width=100)
        output.print(view)
    text = output.file.getvalue()  # type: ignore[attr-defined]
    assert "surprise, nats a joke  0.25" in text and "7" not in text


def test_a_new_entry_has_a_panel_in_the_workspace(new_metric: Metric) -> None:
    """Bug: as above, for W&B; or a panel over log lines, because the metric's family is unknown there."""
    content = workspace("me", "films", "name")._to_model().model_dump(by_alias=True)
    sections = {s["name"]: s["panels"] for s in content["spec"]["section"]["panelBankConfig"]["sections"]}
    (panel,) = [p["config"] for p in sections["Health"] if p["config"]["metrics"] == [new_metric.name]]
    assert panel["xAxis"] == "episodes"


def test_a_new_family_has_an_axis_in_wandb(new_metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the tracker does not define the axis that the workspace draws over."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with Tracker(tmp_path, stage="ppo", name="n", group="g", config={}, wandb_mode="offline") as tracker:
        tracker.log({new_metric.name: 1.0}, 1)
    assert OfflineRun(tmp_path).axes["curiosity/*"] == axes()["curiosity/*"] == "episodes"


def test_a_new_entry_is_a_row_of_the_docs(new_metric: Metric) -> None:
    """Bug: the page explains all metrics but the new one."""
    assert "| `curiosity/surprise` | how new the answers are | 0: seen it all |" in metrics_table("ppo")


def test_entries_have_what_their_places_show() -> None:
    """Bug: a plot without a title; a legend of two equal names; a fallback that is never logged."""
    for metric in METRICS.values():
        assert metric.label and metric.meaning, metric.name
        assert metric.title or "comparison" not in metric.shown, metric.name
        assert metric.title or metric.chart or "report" not in metric.shown, metric.name
        assert not metric.fallback or metric.fallback in METRICS, metric.name
        assert not metric.signs or metric.stage == "ppo", "the health table reads PPO's log"
    legends = [(m.stage, m.chart or m.title, m.label) for m in shown("report")]
    assert len(set(legends)) == len(legends)
    titles = [m.title for m in shown("comparison")]
    assert len(set(titles)) == len(titles)
