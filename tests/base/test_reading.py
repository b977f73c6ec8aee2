"""Values of files by type: what fits stays as it is, what does not is left out and named once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

import pytest

from rlhf.base.reading import PROBLEMS_NAMED, FolderReader, fit
from rlhf.run.metrics import LogRow


class Part(TypedDict, total=False):
    name: Required[str]
    share: float


class Whole(TypedDict, total=False):
    parts: list[Part]
    counts: dict[str, int]
    kind: Literal["a", "b"]
    either: list[str] | str
    more: Annotated[dict[str, Any], Part]


@pytest.mark.parametrize(
    "value, fitting, problems",
    [
        ({"parts": [{"name": "a", "share": 1, "other": []}]}, {"parts": [{"name": "a", "share": 1, "other": []}]}, []),
        ({"parts": [{"name": "a", "share": None}], "counts": None, "x": None}, {"parts": [{"name": "a"}], "x": None}, []),
        ({"parts": {}}, {}, ["parts is an object, not a list"]),
        ({"parts": [{"name": 3}, {"name": "b"}]}, {"parts": [{"name": "b"}]}, ["parts[0].name is a whole number, not text"]),
        ({"parts": [{"share": 0.5}]}, {"parts": []}, ["parts[0] lacks the field 'name'"]),
        ({"parts": [{"name": "a", "share": True}]}, {"parts": [{"name": "a"}]},
         ["parts[0].share is true or false, not a number"]),
        ({"counts": {"a": 1, "b": "2", "c": 1.5}}, {"counts": {"a": 1}},
         ["counts.b is text, not a whole number", "counts.c is a number, not a whole number"]),
        ({"kind": "c"}, {}, ["kind is text, not one of a, b"]),
        ({"either": ["x", 1]}, {"either": ["x"]}, ["either[1] is a whole number, not text"]),
        ({"either": 1}, {}, ["either is a whole number, not a list or text"]),
        ({"more": {}}, {}, ["more lacks the field 'name'"]),
        ([], None, ["it is a list, not an object"]),
    ],
)  # fmt: skip
def test_fit(value: Any, fitting: Any, problems: list[str]) -> None:
    """A figure of the wrong type must not take those beside it along, and none may go without a word."""
    assert fit(value, Whole) == (fitting, problems)


def test_infinite_numbers_are_no_figures() -> None:
    """NaN in a chart's data is no JSON, and stops the page's script."""
    for number in (float("nan"), float("inf")):
        assert fit(number, float)[1]
    assert fit(10**30, float) == (10**30, [])


def test_many_problems_are_counted(tmp_path: Path) -> None:
    """A page of ten thousand lines about one file would hide all others."""
    (tmp_path / "a.json").write_text(
        '{"counts": {' + ",".join(f'"{i}": null' for i in range(PROBLEMS_NAMED + 2)) + "}}"
    )
    reader = FolderReader(tmp_path)
    assert reader.read_object("a.json", Whole) == {"counts": {}}
    assert len(reader.problems) == PROBLEMS_NAMED + 1 and reader.problems[-1] == "a.json: 2 more parts left out"


def test_rows(tmp_path: Path) -> None:
    """A step that is text or a list cannot be placed: the line goes, the others stay."""
    rows = [
        '{"step": 1, "a": 1}',
        '{"step": "2"}',
        '{"step": []}',
        '{"step": 1.5}',
        '{"a": 2}',
        '{"step": 3, "a": "\\ud800"}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    reader = FolderReader(tmp_path)
    assert reader.read_rows("metrics.jsonl", LogRow) == [{"step": 1, "a": 1}, {"a": 2}]
    assert reader.problems == ["metrics.jsonl: 4 unreadable lines left out"]
