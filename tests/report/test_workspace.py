"""The saved W&B workspace, as it would be sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import Call

from rlhf.run.metrics import METRICS, shown


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Every value under a key, at any depth."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []:
        yield from values_of(inner, key)


def test_every_metric_has_a_panel(tmp_path: Path, call: Callable[..., Call]) -> None:
    """A metric that is logged and that nobody sees; panels over log lines, on which two runs do not line up."""
    file = tmp_path / "workspace.json"
    done = call(
        "rlhf.tracking", "dashboard", "--entity", "me", "--project", "films", "--group", "demo", "--output", file
    )
    assert done.code == 0, done.err
    made = json.loads(file.read_text())
    assert (made["entity"], made["project"]) == ("me", "films")
    sections = {s["name"]: s for s in made["spec"]["section"]["panelBankConfig"]["sections"]}
    panels = {metric for metrics in values_of(made, "metrics") if metrics for metric in metrics}
    assert {name for name in METRICS if not name.startswith("card/")} <= panels
    scalars = {panel["config"].get("metrics", [None])[0] for panel in sections["Reward report card"]["panels"]}
    assert {name for name in METRICS if name.startswith("card/")} <= scalars
    titles = {
        "Health": "episodes",
        "PPO": "episodes",
        "SFT": "updates",
        "Reward model": "updates",
        "Pretraining": "updates",
    }
    for title, axis in titles.items():
        assert set(values_of(sections[title], "xAxis")) - {"_step"} == {axis}
    assert [m for panel in sections["Health"]["panels"] for m in panel["config"]["metrics"]] == [
        metric.name for metric in shown("health")
    ]
    text = json.dumps(made)
    for table in ("ppo/samples", "card/accuracies", "frontier/score_table"):
        assert table in text
    (runset,) = made["spec"]["section"]["runSets"]
    assert "demo" in json.dumps(runset) and [g["name"] for g in runset["grouping"]] == ["group", "jobType"]


def test_nothing_is_sent_without_a_key(
    tmp_path: Path, call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of a client that cannot log in; or a project of nobody."""
    assert "wandb login" in call("rlhf.tracking", "dashboard", "--entity", "me").complaint
    assert "--entity" in call("rlhf.tracking", "dashboard", "--output", tmp_path / "w.json").complaint
    assert "invalid choice" in call("rlhf.tracking", "dashbord").complaint


@pytest.mark.parametrize("page", ["dashboard", "report"])
def test_both_pages_show_the_judge_on_held_out_prompts(page: str, tmp_path: Path, call: Callable[..., Call]) -> None:
    """Runs that are compared by the score that they were trained on alone."""
    file = tmp_path / "page.json"
    done = call("rlhf.tracking", page, "--entity", "me", "--project", "films", "--group", "demo", "--output", file)
    assert done.code == 0, done.err
    content = json.loads(file.read_text())
    plots = {(c.get("xAxis"), c.get("yAxis")) for c in values_of(content, "config") if isinstance(c, dict)}
    assert ("summary:summary/kl", "summary:summary/gold_after") in plots
    assert "eval/gold" in {metric for metrics in values_of(content, "metrics") if metrics for metric in metrics}
    pinned = next(columns for columns in values_of(content, "columnPinned") if columns)
    assert next(name for name in pinned if name.startswith("summary:")) == "summary:summary/gold_after"
    assert "ppo/comparison" in json.dumps(content) and '["demo"]' in json.dumps(content)
