"""The tables of options against the config classes of the other projects: no option is unhandled, none is made up."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rlhf.config import STAGE_CONFIGS
from rlhf.migration import llama_factory, swift, trl
from rlhf.migration.__main__ import option_table
from rlhf.migration.rules import TRAINING_REFUSED, Project

SECTIONS = dict(re.findall(r"^\[(.+)\]\n([^\[]+)", Path(__file__).with_name("fields.txt").read_text(), re.MULTILINE))
FIELDS = {name: set(text.split()) for name, text in SECTIONS.items()}
#: Sections whose options a config of this kind can have.
KINDS: list[tuple[Project, str, tuple[str, ...]]] = [
    (trl.OLD, "ppo", ("trl old ppo",)),
    (trl.NEW, "ppo", ("trl ppo", "trl model and script", "transformers")),
    (trl.NEW, "reward", ("trl reward", "trl model and script", "transformers")),
    (trl.NEW, "sft", ("trl sft", "trl model and script", "transformers")),
    *[(llama_factory.PROJECT, stage, ("LLaMA-Factory", "transformers")) for stage in ("sft", "reward", "ppo")],
    *[(swift.PROJECT, stage, ("ms-swift", "transformers")) for stage in ("sft", "reward", "ppo")],
]
#: Options of TRL's example scripts, and of the `generate` that they call: no config class has them.
OF_SCRIPTS = {
    "max_prompt_length",
    "max_new_tokens",
    "temperature",
    "save_freq",
    "output_max_length",
    "reward_model_name",
}
IDS = [f"{project.name} {stage}" for project, stage, _ in KINDS]


def test_the_lists_are_whole() -> None:
    """Catches: a file of names that this test no longer reads, with which all others would pass."""
    assert {name: len(names) > 15 for name, names in FIELDS.items()} == dict.fromkeys(FIELDS, True)
    assert (
        len(FIELDS) == 8
        and {"init_kl_coef", "horizon"} <= FIELDS["trl old ppo"]
        and "cutoff_len" in FIELDS["LLaMA-Factory"]
    )


@pytest.mark.parametrize(("project", "stage", "sections"), KINDS, ids=IDS)
def test_every_option_is_mapped_or_refused(project: Project, stage: str, sections: tuple[str, ...]) -> None:
    """Catches: an option that is reported as unknown, although the project has it."""
    fields = set().union(*(FIELDS[name] for name in sections))
    assert sorted(f for f in fields if f not in project.stages[stage].rules and not project.reason(f)) == []


@pytest.mark.parametrize(("project", "stage", "sections"), KINDS, ids=IDS)
def test_every_rule_is_of_an_option(project: Project, stage: str, sections: tuple[str, ...]) -> None:
    """Catches: a misspelt name in a table, and a rule for an option that our stage does not have."""
    everything = OF_SCRIPTS.union(*FIELDS.values())
    kind = project.stages[stage]
    assert sorted(set(kind.rules) - everything) == [] and sorted(set(kind.defaults) - everything) == []
    ours = {field.name for field in dataclasses.fields(STAGE_CONFIGS[stage])}
    named = {option for rule in kind.rules.values() for option in rule.option.split(", ")}
    assert sorted(named - ours) == []


@pytest.mark.parametrize("project", [trl.NEW, llama_factory.PROJECT, swift.PROJECT], ids=lambda project: project.name)
def test_refusals_have_reasons_and_no_two(project: Project) -> None:
    """Catches: a name that two reasons are given for, of which the second is never seen."""
    reasons = {**project.refused, **TRAINING_REFUSED}
    assert all(len(reason) > 10 for reason in reasons)
    names = [name for text in project.refused.values() for name in text.split()]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_page_has_the_table() -> None:
    """Catches: a rule that was changed without docs/migrating.md."""
    page = Path(__file__).parents[2] / "docs" / "migrating.md"
    assert f"\n\n{option_table()}\n\n" in page.read_text(encoding="utf-8")
