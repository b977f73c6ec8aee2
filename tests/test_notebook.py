"""The tour: the notebook is its script, runs from top to bottom, and shows what it says that it shows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell

FOLDER = Path(__file__).parents[1] / "notebooks"
#: What the last cell, which the test adds, prints of the notebook's variables.
FIGURES = """
import json
print(json.dumps({
    "sft": logged("tour/sft", "sft/eval_loss")[1],
    "accuracy": float((margins > 0).float().mean()),
    **{f"{name} {metric}": run.curve(f"objective/{metric}")
       for name, run in (("careful", careful), ("greedy", greedy)) for metric in ("score", "gold", "kl_full")},
    "careful findings": [one.severity for one in diagnose(FOLDER / "tour/ppo")[0].findings],
    "greedy findings": [one.severity for one in diagnose(FOLDER / "greedy/ppo")[0].findings],
}))
"""


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_make", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures of the executed notebook; a cell that fails fails the test."""
    notebook = make.notebook(make.SCRIPT.read_text(encoding="utf-8"))
    notebook.cells.append(new_code_cell(FIGURES))
    make.execute(notebook, tmp_path_factory.mktemp("tour"))
    (output,) = notebook.cells[-1].outputs
    result: dict[str, Any] = json.loads(output["text"])
    return result


def test_the_notebook_is_its_script(make: ModuleType) -> None:
    """Catches: a cell that was edited in the notebook alone, a script that came after it, and a notebook without pictures."""
    committed = nbformat.read(make.NOTEBOOK, as_version=4)
    cells = make.notebook(make.SCRIPT.read_text(encoding="utf-8")).cells
    assert [(one.cell_type, one.source) for one in committed.cells] == [(one.cell_type, one.source) for one in cells], (
        "run python notebooks/make.py"
    )
    pictures = [o for one in committed.cells for o in one.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 9 and make.NOTEBOOK.stat().st_size < 500_000
    assert not [o for one in committed.cells for o in one.get("outputs", []) if o.output_type == "error"]


def test_sft_and_reward_model_learn(figures: dict[str, Any]) -> None:
    """Catches: pictures of models that have learned nothing."""
    assert figures["sft"][-1] < 0.6 * figures["sft"][0]
    assert 0.7 < figures["accuracy"] < 0.95  # raters are noisy


def test_ppo_with_brakes_pleases_the_judge_and_without_them_the_proxy(figures: dict[str, Any]) -> None:
    """Catches: a story of over-optimisation that the pictures do not show, and a doctor who does not see it."""

    def gain(name: str) -> float:
        return mean(figures[name][-5:]) - mean(figures[name][:2])

    assert gain("careful gold") > 0.1 and gain("careful score") > 0.2
    assert gain("greedy score") > gain("careful score") + 0.5
    assert mean(figures["greedy gold"][-5:]) < mean(figures["careful gold"][-5:]) - 0.1
    assert mean(figures["greedy kl_full"][-5:]) > 2 * mean(figures["careful kl_full"][-5:])
    assert "critical" in figures["greedy findings"] and "critical" not in figures["careful findings"]
