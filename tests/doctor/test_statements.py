"""Statements of the doctor: written line by line, read back, and damaged lines left out by name."""

from __future__ import annotations

from pathlib import Path

from rlhf.base.reading import FolderReader
from rlhf.doctor.statements import STATEMENTS, Statement, append, read


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
