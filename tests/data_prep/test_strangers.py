"""Files as users of other trainers bring them: read for what they mean, or refused in one line that names the slip."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.files import Line, read_file
from rlhf.data_prep.formats.readers import LONG_PROMPT, SourceReader
from rlhf.data_prep.formats.rows import Malformed, Untrainable, is_blank
from rlhf.data_prep.prepare.recipe import Source

ROWS = [{"prompt": "Tea?", "completion": "Yes."}, {"prompt": "Milk?", "completion": "No."}]
ASKED, ANSWERED = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}


def read(row: dict[str, Any]) -> tuple[Any, SourceReader]:
    reader = SourceReader(Source(path="x"), [Line("x", 1, row)])
    return next(iter(reader)), reader


@pytest.mark.parametrize(
    ("columns", "good"),
    [
        ({"accepted": "1"}, True), ({"accepted": "0"}, False), ({"thumbs_up": "False"}, False), ({"is_good": "yes"}, True),
        ({"thumbs": "down"}, False), ({"feedback": "bad"}, False), ({"thumbs_down": True}, False), ({"thumbs_down": False}, True),
        ({"rejected": True}, False), ({"undesirable": 1}, False), ({"label": "thumbs_up"}, True), ({"label": "👎"}, False),
        ({"thumbs_up": False, "thumbs_down": True}, False),
    ],
)  # fmt: skip
def test_labels_in_other_words(columns: dict[str, Any], good: bool) -> None:
    """Catches: a bad answer that is a demonstration because its label is a text, as in CSV, or stands the other way round."""
    reading, reader = read({**ROWS[0], **columns})
    assert reading.records[0].ratings == [float(good)] and reading.records[0].labelled and not reader.unused


def test_flags_that_cannot_be_used() -> None:
    """Catches: counts, comments and contradictions beside an answer that are taken for nothing."""
    for columns in ({"desirable": 3}, {"good": "a comment"}, {"label": "yes"}):
        error = read({**ROWS[0], **columns})[0].error
        assert isinstance(error, Malformed) and f"'{next(iter(columns))}' beside an answer must be" in str(error)
    error = read({**ROWS[0], "thumbs_up": True, "thumbs_down": True})[0].error
    assert isinstance(error, Untrainable) and str(error) == "'thumbs_up' and 'thumbs_down' contradict each other"
    reading, reader = read({**ROWS[0], "feedback": "Could be longer.", "thumbs_up": None})
    assert reading.records[0].ratings is None and set(reader.unused) == {"feedback"}


def test_messages_as_json_in_texts() -> None:
    """Catches: the JSON of a message trained as the answer, as CSV and Arrow files of texts hold it."""
    (record,) = read({"prompt": json.dumps([ASKED]), "completion": json.dumps(ANSWERED)})[0].records
    assert (record.prompt, record.responses) == ([ASKED], ["Yes."])
    pair = {
        name: json.dumps([ASKED, {**ANSWERED, "content": text}])
        for name, text in (("chosen", "Yes."), ("rejected", "No."))
    }
    (record,) = read({"prompt": "Tea?", **pair})[0].records
    assert (record.prompt, record.responses) == ([ASKED], ["Yes.", "No."])
    for text in ('{"role": "admin", "content": "x"}', '{"role": "user"}', '[{"role": "user", "content"', "[]"):
        assert read({"prompt": "Tea?", "completion": text})[0].records[0].responses == [text]


def test_answers_that_repeat_the_prompt() -> None:
    """Catches: the prompt trained as the beginning of every answer, where `chosen` and `rejected` are whole texts."""
    for length, error in ((LONG_PROMPT, Untrainable), (LONG_PROMPT - 1, type(None))):
        prompt = "x" * length
        assert (
            type(read({"prompt": prompt, "chosen": prompt + " Yes.", "rejected": f" {prompt} No."})[0].error) is error
        )
    prompt = "x" * LONG_PROMPT
    assert read({"prompt": prompt, "chosen": prompt + " Yes.", "rejected": "No."})[0].error is None


def test_texts_that_show_nothing() -> None:
    """Catches: an answer of zero-width characters as a demonstration."""
    assert is_blank(" \u200b\ufeff\n\u202e") and not is_blank("\u200bA") and not is_blank("👍")
    assert str(read({"prompt": "Tea?", "completion": "\u200b\u200b"})[0].error) == "empty response"
    assert str(read({"prompt": "\u200b", "completion": "Yes."})[0].error) == "empty prompt"


def test_conversations_of_other_forms() -> None:
    """Catches: LIMA's texts, Anthropic's system parts or a transcript after a text for the system read as something else."""
    (record,) = read({"conversations": ["Tea?", "Yes."]})[0].records
    assert (record.prompt, record.responses) == ([ASKED], ["Yes."])
    system = {"role": "system", "content": "Be kind."}
    parts = [{"type": "text", "text": "Be kind."}]
    assert read({"system": parts, "messages": [ASKED, ANSWERED]})[0].records[0].prompt == [system, ASKED]
    transcript = "Be kind.\n\nHuman: Tea?\n\nAssistant:"
    assert read({"prompt": transcript, "chosen": " Yes.", "rejected": " No."})[0].records[0].prompt == [system, ASKED]
    quoted = "They said\n\nHuman: Tea?\n\nAssistant: Yes.\n\nWhy?"
    assert read({"prompt": quoted, "completion": "Because."})[0].records[0].prompt == [{**ASKED, "content": quoted}]


def test_turns_after_the_last_answer_are_named() -> None:
    """Catches: a last question that no stage uses, left out without a word."""
    reading, reader = read({"messages": [ASKED, ANSWERED, ASKED]})
    assert (
        reading.records[0].prompt == [ASKED]
        and reader.unused_columns() == "turns of messages after the last answer (1 rows)"
    )


def test_a_vote_in_three_columns() -> None:
    """Catches: a tie, or answers to unlike conversations, compared."""
    row = {
        "prompt": "Tea?",
        "response_a": "Yes.",
        "response_b": "No.",
        "winner_model_a": 0,
        "winner_model_b": 0,
        "winner_tie": 1,
    }
    assert str(read(row)[0].error) == "no preference: a tie"
    voted = {**row, "winner_model_a": 1, "winner_tie": 0}
    assert read(voted)[0].records[0].ratings == [1.0, 0.0]
    assert isinstance(read({**voted, "winner_tie": 1})[0].error, Malformed)
    turns = {"prompt": ["Hi", "Tea?"], "response_a": ["Hello.", "Yes."], "response_b": ["Hey.", "No."]}
    assert str(read({**voted, **turns})[0].error) == "the two responses do not answer the same prompt"


@pytest.mark.parametrize("name", ["data", "instances", "examples"])
def test_rows_in_an_object(tmp_path: Path, name: str) -> None:
    """Catches: LMFlow's files, on one line or several, packed or with a byte order mark, read as one row or as broken lines."""
    value = {"type": "text2text", name: ROWS}
    for number, text in enumerate(
        (json.dumps(value), json.dumps(value, indent=2), "\ufeff" + json.dumps(value, indent=2))
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        assert [line.value for line in read_file(file)] == ROWS
    packed = tmp_path / "rows.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(value, indent=1).encode()))
    assert [(line.number, line.value) for line in read_file(packed)] == [(1, ROWS[0]), (2, ROWS[1])]


def test_json_lines_stay_lines(tmp_path: Path) -> None:
    """Catches: a column of the name `data` taken for all rows, and a broken first line that refuses the file."""
    file = tmp_path / "rows.json"
    rows = [{**row, "data": [{"x": 1}]} for row in ROWS]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [line.value for line in read_file(file)] == rows
    file.write_text('{"prompt": "a\n' + json.dumps(ROWS[0]))
    assert [bool(line.problem) for line in read_file(file)] == [True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", json.dumps({"0": ROWS[0]}, indent=1), "holds JSON objects over several lines"),
        ("rows.jsonl", gzip.compress(b"{}"), "holds gzip data; let its name end in .gz"),
        ("rows.csv", b"PK\x03\x04...", "holds a zip archive or a spreadsheet"),
        ("rows.json", b"PAR1....", "holds Parquet; let its name end in .parquet"),
        (
            "rows.csv",
            "prompt;completion\nTea?;Yes.\n",
            r"columns are separated by ';' in 'prompt;completion'; save it with commas",
        ),
        ("rows.tsv", "prompt,completion\nTea?,Yes.\n", "save it with tabs"),
    ],
)
def test_files_of_other_forms_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """Catches: "not valid JSON" or "not UTF-8" for each line of a file whose form is another."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(read_file(file))


def test_a_header_with_blanks(tmp_path: Path) -> None:
    """Catches: " completion" as another column than "completion"."""
    file = tmp_path / "rows.csv"
    file.write_text("prompt, completion \nTea?,Yes.\n")
    assert [line.value for line in read_file(file)] == ROWS[:1]
    file.write_text("prompt, prompt\nTea?,Yes.\n")
    with pytest.raises(UserError, match="`prompt` stands twice in the header"):
        list(read_file(file))


def test_no_row_can_be_read(tmp_path: Path) -> None:
    """Catches: "no reader knows rows with the columns none" where not one line is JSON, which hides the reason."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + ",\n" for row in ROWS))
    with pytest.raises(UserError, match=r"no row can be read; .*rows.jsonl, row 1: not valid JSON: Extra data"):
        SourceReader(Source(path=str(file)), read_file(file))
