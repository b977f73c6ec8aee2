"""The blind table: what it says, what it does not say, and what comes back."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rlhf.base.errors import UserError
from rlhf.evaluation import people
from rlhf.evaluation.chat import Pair

PAIRS = [Pair(f"prompt {i}", f"policy's {i}", f"baseline's {i}") for i in range(40)]


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def fill(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as handle:
        table = csv.DictWriter(handle, people.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return file


def test_verdicts_come_back_to_the_side_that_wrote_the_answer(tmp_path: Path) -> None:
    """A rater who always prefers the policy's text, whichever side it is on, must give the policy every pair."""
    file = tmp_path / "pairs.csv"
    assert people.export(file, PAIRS, seed=3) == 40
    rows = read(file)
    for row in rows:
        row["verdict"] = "A" if row["answer_a"].startswith("policy") else " b "
    won = people.unblind(PAIRS, 3, people.read_verdicts([fill(tmp_path / "filled.csv", rows)]))
    assert won == [1.0] * 40


def test_the_table_gives_nothing_away(tmp_path: Path) -> None:
    """Sides that alternate or stay, lines in the order of the policies, and ids that hold a name."""
    file = tmp_path / "pairs.csv"
    people.export(file, PAIRS, seed=3)
    rows = read(file)
    first = [row["answer_a"].startswith("policy") for row in rows]
    assert 10 < sum(first) < 30
    assert [row["prompt"] for row in rows] != [pair.prompt for pair in PAIRS]
    assert len({row["id"] for row in rows}) == 40 and all(set(row["id"]) <= set("0123456789abcdef") for row in rows)
    assert all(row["verdict"] == "" for row in rows)


def test_several_people_in_part(tmp_path: Path) -> None:
    """The mean of those who judged a pair; None where nobody did, which is not a tie."""
    lines = people.blind(PAIRS[:3], seed=0)
    side = {line.id: "B" if line.swapped else "A" for line in lines}
    other = {line.id: "A" if line.swapped else "B" for line in lines}

    def row(number: int, verdict: str) -> dict[str, str]:
        return {"id": lines[number].id, "verdict": verdict}

    one = fill(tmp_path / "one.csv", [row(0, side[lines[0].id]), row(1, "tie"), row(2, "")])
    two = fill(tmp_path / "two.csv", [row(0, other[lines[0].id]), row(1, side[lines[1].id])])
    assert people.unblind(PAIRS[:3], 0, people.read_verdicts([one, two])) == [0.5, 0.75, None]


def test_texts_survive_the_table(tmp_path: Path) -> None:
    """Commas, quotes, line breaks and other scripts, of which answers are full."""
    pair = Pair('he said "no", then\nleft', "größer, 大", 'a\r\n"b"')
    people.export(tmp_path / "pairs.csv", [pair, pair], seed=0)
    (row,) = read(tmp_path / "pairs.csv")
    assert row["prompt"] == pair.prompt and {row["answer_a"], row["answer_b"]} == {pair.answer, pair.baseline}


def test_answers_that_are_alike_are_a_tie_without_a_question(tmp_path: Path) -> None:
    """People who are asked to choose between twice the same text stop taking the others seriously."""
    alike = Pair("p", "x", "x")
    assert people.export(tmp_path / "pairs.csv", [alike, PAIRS[0]], seed=0) == 1
    assert people.unblind([alike, PAIRS[0]], 0, {}) == [0.5, None]


@pytest.mark.parametrize(
    "content, told",
    [
        ("id,verdict\nabc,C\n", "line 2: the verdict is 'C'; write A, B, tie or nothing"),
        ("prompt,verdict\nabc,A\n", "has no column 'id'"),
        ("", "has no column 'id'"),
    ],
)
def test_what_people_get_wrong(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "filled.csv"
    file.write_text(content)
    with pytest.raises(UserError, match=r"filled\.csv") as refused:
        people.read_verdicts([file])
    assert told in str(refused.value)


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "filled.csv").write_text("id,verdict\n")
    with pytest.raises(UserError, match=r"did you mean '.*filled\.csv'"):
        people.read_verdicts([tmp_path / "filed.csv"])


def test_verdicts_on_other_answers_are_refused() -> None:
    """A table of last week's comparison, of which no line fits, read as if nobody had judged anything."""
    known = people.blind(PAIRS[:1], 0)[0].id
    people.check_pairs(PAIRS, 0, {known: [1.0]})
    with pytest.raises(UserError, match=r"1 of 2 verdicts are on pairs of another comparison .id abc"):
        people.check_pairs(PAIRS, 0, {known: [1.0], "abc": [0.0]})
