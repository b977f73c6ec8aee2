"""docs/ppo.md, docs/reward.md, docs/comparing.md and docs/evaluation.md against the code: nothing is said that is not there,
nor left unsaid."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import EvaluationConfig, PPOConfig, RewardConfig, StageConfig, TrainingLength
from rlhf.doctor.health.findings import markdown_rows
from rlhf.evaluation.card import hack_probes, verdict
from rlhf.run.metrics import Stage, of_stage
from rlhf.sharing.__main__ import build_parser
from rlhf.stages.investigate.examine import EXPERIMENTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
CITATION = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def table(heading: str, page: str = PAGE) -> list[list[str]]:
    """The cells of the last table below a heading, its head left out."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    last_head = max(i for i, line in enumerate(lines) if set(line) <= set("|-"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[last_head + 1 :]]


@cache
def defined_tests(file: str) -> set[str]:
    """Names of the test functions of a file, which is read and not imported."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as the page writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return ", ".join(map(str, field.default_factory())) or "none"
    if field.default is dataclasses.MISSING:
        return "required"
    return "none" if field.default in (None, "") else str(field.default)


METRIC_TABLES: dict[str, tuple[Stage, ...]] = {
    "Metrics": ("ppo",),
    "Metrics of the other stages": ("pretrain", "sft", "reward"),
}


def metrics_table(*stages: Stage) -> str:
    """The page's table of these stages' metrics, as it is made from the table in `rlhf.run.metrics`."""
    rows = [
        f"| `{metric.name}` | {metric.meaning} | {metric.trouble} |" for stage in stages for metric in of_stage(stage)
    ]
    head = "| metric | meaning, and what is healthy | a bad value, and what to change |\n|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def with_metrics(page: str) -> str:
    """The page with its tables of metrics made again."""
    for heading, stages in METRIC_TABLES.items():
        start = page.index("| metric |", page.index(f"\n## {heading}\n"))
        page = page[:start] + metrics_table(*stages) + page[page.index("\n\n", start) + 1 :]
    return page


def test_the_tables_of_metrics_are_those_of_the_code() -> None:
    """Catches: a new metric that nobody explains, an explanation that outlives its metric, and one edited on the page alone."""
    assert with_metrics(PAGE) == PAGE, "run python tests/test_docs.py"
    for heading, stages in METRIC_TABLES.items():
        rows = [row[0].strip("`") for row in table(heading)]
        assert rows == [metric.name for stage in stages for metric in of_stage(stage)]


def test_every_option_is_listed_with_its_default() -> None:
    """Catches: an option that was added, renamed or removed, and a default that was changed, without the page."""
    documented = {row[0]: row[2] for row in table("Options")}
    actual = {f"`{field.name}`": f"`{default_of(field)}`" for field in dataclasses.fields(PPOConfig)}
    assert documented == actual


@pytest.mark.parametrize("file", sorted({file for file, _ in CITATION.findall(PAGE)}))
def test_cited_tests_exist(file: str) -> None:
    """Catches: a proof that was renamed or deleted, so that the page promises what nobody checks any more."""
    cited = {name for of, name in CITATION.findall(PAGE) if of == file}
    assert cited - defined_tests(file) == set()


def test_the_review_has_its_25_rows_each_with_a_proof_or_the_lack_of_one() -> None:
    """Catches: a detail that was dropped because nothing proves it."""
    rows = table("What an expert checks")
    assert [row[0] for row in rows] == [str(number) for number in range(1, 26)]
    assert [row[0] for row in rows if not CITATION.search(row[3]) and "no test yet" not in row[3]] == []


REWARD_PAGE = (ROOT / "docs" / "reward.md").read_text(encoding="utf-8")


def test_every_option_of_the_reward_models_training_is_explained() -> None:
    """Catches: an option of the loss that was added or renamed without a word about it."""
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table("Training", REWARD_PAGE))))
    own = {name for name in RewardConfig.__annotations__ if name not in ("GROUPS", "policy", "min_responses")}
    shared = {field.name for kind in (StageConfig, TrainingLength) for field in dataclasses.fields(kind)}
    assert own <= named <= own | shared


def test_thresholds_of_the_card_are_those_of_the_code() -> None:
    """Catches: a flag that was made stricter, and a page that promises the old one."""
    flagged = {row[0]: row[2] for row in table("The card", REWARD_PAGE)}
    assert f"{verdict.LENGTH_BIAS:.0%} more pairs" in flagged["length"]
    assert f"above {verdict.POOR_CALIBRATION:.0%}" in flagged["calibration"]
    assert f"more than {verdict.OUTSIDE:.0%}" in flagged["samples"]
    assert f"below {verdict.CEILING_SHARE:.0%} of the way" in flagged["held-out raters, human ceiling"]
    assert f"beyond {verdict.RIVAL_GAIN:.0%}" in flagged["rivals"]
    assert f"gains {hack_probes.FLAGGED_GAIN} standard deviations" in flagged["hack probes"]


def test_every_verb_of_the_registry_is_explained_and_no_other() -> None:
    """Catches: a verb that was added or renamed without a word about it."""
    page = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    documented = [row[0].strip("`").split()[0] for row in table("The registry", page)]
    (commands,) = [one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    assert documented == list(commands.choices)


EVALUATION_PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_option_of_the_evaluation_is_listed_with_its_default() -> None:
    """Catches: an option that was added, renamed or removed, and a default that was changed, without the page."""
    documented = {row[0]: row[2] for row in table("Options", EVALUATION_PAGE)}
    actual = {f"`{field.name}`": f"`{default_of(field)}`" for field in dataclasses.fields(EvaluationConfig)}
    assert documented == actual


DOCTOR_PAGE = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
HEALTH_PAGE = (ROOT / "docs" / "health.md").read_text(encoding="utf-8")


def test_the_table_of_health_checks_is_that_of_the_code() -> None:
    """Catches: a check or a limit that was changed without the page. `python -m rlhf.doctor.health.findings` prints the table."""
    rows = [
        line for line in HEALTH_PAGE.split("## The checks")[1].split("\n## ")[0].splitlines() if line.startswith("| `")
    ]
    assert rows == markdown_rows()


def test_every_experiment_is_in_the_table_and_no_other() -> None:
    """Catches: an experiment that was added, renamed or removed without the page."""
    documented = [(row[0].strip("`"), row[1].lower()) for row in table("Experiments", DOCTOR_PAGE)]
    assert sorted(documented) == sorted((one.name, one.stage) for one in EXPERIMENTS)


if __name__ == "__main__":
    (ROOT / "docs" / "ppo.md").write_text(with_metrics(PAGE), encoding="utf-8")
