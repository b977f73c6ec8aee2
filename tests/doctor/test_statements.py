"""Statements of the doctor: written line by line, read back, and damaged lines left out by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.base.reading import FolderReader
from rlhf.doctor.audit import quantities, training_quantities
from rlhf.doctor.audit.compare import Quantity
from rlhf.doctor.health.check import HealthCheck
from rlhf.doctor.health.findings import CHECKS
from rlhf.doctor.review.tables import ANSWER_TABLE, INPUT_LIMITS
from rlhf.doctor.statements import STATEMENTS, Statement, append, read
from rlhf.stages.investigate import examine


def test_statements_come_back_in_order(tmp_path: Path) -> None:
    good = Statement(part="audit", name="values", passed=True, measured="equal to 1e-7")
    bad = Statement(
        part="review",
        name="gamma",
        passed=False,
        measured="0.5",
        cause="low",
        action="raise",
        explains=["value_useless"],
    )
    append(tmp_path, [good])
    append(tmp_path, [bad])
    assert read(FolderReader(tmp_path)) == [good, bad]


def test_a_damaged_line_is_left_out_and_named(tmp_path: Path) -> None:
    append(tmp_path, [Statement(part="audit", name="values", passed=True, measured="equal")])
    with (tmp_path / STATEMENTS).open("a") as file:
        file.write('{"part": "audit", "name": "scores", "passed": "yes", "measured": "equal"}\n')
    reader = FolderReader(tmp_path)
    assert [statement.name for statement in read(reader)] == ["values"]
    assert reader.problems == [f"{STATEMENTS}: 1 unreadable line left out"]


def test_no_file_is_no_statement_and_no_problem(tmp_path: Path) -> None:
    reader = FolderReader(tmp_path)
    assert read(reader) == [] and reader.problems == []


def audited(*stages: str) -> dict[str, Quantity]:
    """Quantities of the audits of these stages, by name."""
    modules = {quantities if stage == "ppo" else training_quantities for stage in stages}
    return {item.name: item for module in modules for item in vars(module).values() if isinstance(item, Quantity)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_what_excludes_a_cause_is_a_statement_of_its_stage(check: HealthCheck) -> None:
    """Catches: a cause that nothing can exclude, because its statement has another name or is of another stage."""
    limits = {limit.name for limit in (*INPUT_LIMITS, *ANSWER_TABLE) if set(limit.stages) & set(check.stages)}
    experiments = "".join(Path(str(module.__file__)).read_text() for module in examine.MODULES)
    for witness in (name for names in check.causes.values() for name in names):
        part, _, name = witness.partition(":")
        exists = {
            "audit": name in audited(*check.stages),
            "review": name in limits,
            "investigation": f'"{name}"' in experiments,
        }
        assert exists[part], witness
    assert set(check.explains) <= {other.name for other in CHECKS}


def test_consequences_of_wrong_quantities_are_checks() -> None:
    """Catches: a check that was renamed, and stands as a cause of its own beside the quantity that explains it."""
    for quantity in (*audited("ppo").values(), *audited("sft").values()):
        assert quantity.explains and set(quantity.explains) <= {check.name for check in CHECKS}, quantity.name
