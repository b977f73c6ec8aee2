"""Task checks: figures against values worked out by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.base.errors import UserError
from rlhf.evaluation.checks import Check, _named, read_checks

PROMPT = [{"role": "user", "content": "Say it"}]


def figures(kind: str, references: list[list[str]], texts: list[str]) -> dict[str, float]:
    found = Check("it", kind, [PROMPT] * len(texts), references).figures(texts)
    for figure in found.values():
        assert figure is not None and figure["value"] is not None
        if len(texts) == 1:
            assert figure["low"] is None and figure["high"] is None
        else:
            assert figure["low"] <= figure["high"]  # type: ignore[operator]
    return {name: figure["value"] for name, figure in found.items()}  # type: ignore[index, misc]


def test_summaries() -> None:
    """ROUGE against the worst or the first reference; recall taken for F. By hand: 2 of 3 words, 1 of 2 pairs."""
    found = figures("summarisation", [["red dog", "cat sat there"]], ["cat sat down"])
    assert found == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})


def test_a_chinese_summary_is_read() -> None:
    """rouge-score's own tokens are Latin letters and digits: a perfect Chinese summary scores 0."""
    found = figures("summarisation", [["今天天气好"], ["他走了。"]], ["今天天气好", "他来了"])
    assert found == pytest.approx({"rouge1": (1 + 2 / 3) / 2, "rouge2": 0.5, "rougeL": (1 + 2 / 3) / 2})


def test_translations() -> None:
    """References in the order of files and not of rows; rows with fewer references than others; Chinese as one word."""
    right = [["the cat sat on the mat", "a cat was on the mat"], ["he went home yesterday"]]
    texts = ["a cat was on the mat", "he went home yesterday"]
    assert figures("translation", right, texts) == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    assert figures("translation", right, texts[::-1])["bleu"] < 10
    one_off = figures("translation", [["今天的天气真的很好啊"]], ["今天的天气真的不好啊"])
    assert 40 < one_off["bleu"] < 90


def test_questions() -> None:
    """Case, articles or punctuation that count; F1 of sets in place of bags. By hand: 2 common of 3 and 2 words."""
    right = [["The Eiffel Tower!"], ["green", "dark blue"], ["no no"]]
    found = figures("question_answering", right, ["eiffel tower", "a dark blue sky", "no"])
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 * 2 / 5 + 2 / 3) / 3})


def test_labels() -> None:
    """An answer without a label that is left out of the F1, or a label that is found inside another."""
    right = [["positive"], ["positive"], ["not positive"], ["negative"]]
    found = figures("classification", right, ["Positive.", "who knows", "not positive at all", "positive"])
    assert figures("classification", [["A"], ["b"], ["C++"]], [" a.", "B", "c++"])["macro_f1"] == 1.0
    # positive: 1 found of 2, 1 right of 2 said; not positive: 1 and 1; negative: never said
    assert found == pytest.approx({"accuracy": 0.5, "macro_f1": (0.5 + 1.0 + 0.0) / 3})


def test_interval_of_f1_where_draws_miss_a_rare_label() -> None:
    """The F1 of a label that a draw does not hold, counted as 0: the interval of a perfect classifier began at a half."""
    labels = ["a"] * 19 + ["rare"]
    found = Check("x", "classification", [[]] * 20, [[label] for label in labels]).figures(labels)["macro_f1"]
    assert found == {"value": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["A", "B", "C", "D"], {"A": "A", "(b)": "B", "**C**: no doubt": "C", "Dogs": "", "a, as it is": "A", "": ""}),
        (["+1", "-1"], {"+1": "+1", "-1.": "-1", '"-1"': "-1", "1": "", "-12": "", "+1.5": ""}),
        (["C", "C++", "Java"], {"c++": "C++", "C": "C", "C, not C++": "C", "C++, surely": "C++", "JavaScript": ""}),
        (["the", "not the"], {"The": "the", "Not  the": "not the", "them": ""}),
        (["正面", "负面"], {"正面": "正面", "“负面”。": "负面", "正面的评价": "正面", "很正面": ""}),
    ],
)
def test_labels_that_are_marks_articles_or_parts_of_others(labels: list[str], said: dict[str, str]) -> None:
    """A label of which nothing is left (`A`), with which every answer begins; +1 and -1, C and C++ taken for one."""
    for answer, label in said.items():
        number = _named(answer, [one.casefold() for one in labels])
        assert (labels[number] if number >= 0 else "") == label, answer


@pytest.mark.parametrize(
    ("option", "rows", "message"),
    [
        ("summarization={}", [], "did you mean 'summarisation'"),
        ("summarisation", [], "KIND=FILE"),
        ("translation=none.jsonl", [], "no file none.jsonl"),
        ("translation={}", [{"prompt": "A", "reference": "b"}, {"reference": "b"}], "row 2: no column prompt"),
        ("translation={}", [{"prompt": "A"}], "row 1: 'reference' must be"),
        ("translation={}", [{"prompt": "", "reference": "b"}], "row 1: empty prompt"),
        ("classification={}", [{"prompt": "A", "reference": ["b", "c"]}], "one reference"),
        (
            "classification={}",
            [{"prompt": "A", "reference": r} for r in ("no", " no", "No")],
            "row 3: the label 'No' differs from 'no'",
        ),
        ("classification={}", [{"prompt": "A", "reference": " "}], "row 1: 'reference' must be"),
    ],
)
def test_what_is_no_check_is_refused(tmp_path: Path, option: str, rows: list[dict[str, object]], message: str) -> None:
    """A row that is scored 0 because it has nothing to be compared with."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        read_checks([option.format(file)])


def test_two_checks_of_one_name_are_refused(tmp_path: Path) -> None:
    """Figures of one file that replace those of another."""
    options = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text('{"prompt": "A", "completion": "b"}\n')
        options.append(f"question_answering={tmp_path / folder / 'rows.jsonl'}")
    assert read_checks(options[:1])[0].references == [["b"]]
    with pytest.raises(UserError, match="two checks are called rows"):
        read_checks(options)
