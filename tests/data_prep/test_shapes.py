"""Columns that mean something, in the forms that other trainers document: read the same by `rlhf data` and by the stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import Built, text

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.files import Line
from rlhf.data_prep.formats.readers import SourceReader
from rlhf.data_prep.formats.rows import Malformed, Untrainable
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.prepare.recipe import Source
from rlhf.models.messages import parts_of


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def human(content: str) -> dict[str, str]:
    return {"from": "human", "value": content}


def gpt(content: str) -> dict[str, str]:
    return {"from": "gpt", "value": content}


def read(*rows: Any) -> Any:
    """The first reading of a source with these rows, and the reader."""
    reader = SourceReader(Source(path="x"), [Line("x", number, row) for number, row in enumerate(rows, start=1)])
    return next(iter(reader)), reader


SYSTEM = {"role": "system", "content": "Be kind."}
PAIR, MARGIN = [1.0, 0.0], [2.5, 0.0]
ASKED = [user("Tea?")]
LATER = [user("Hi"), assistant("Hello."), user("Tea?")]
PARTS = [{"type": "text", "value": "Tea?"}]
FUNCTION = {"name": "brew", "parameters": {"type": "object"}}

#: What documents the form, a row of it, prompt, responses, ratings.
FORMS: list[tuple[str, dict[str, Any], list[dict[str, str]], list[str], list[float] | None]] = [
    (
        "LLaMA-Factory alpaca",
        {"instruction": "Tea?", "input": "", "output": "Yes.", "system": "Be kind.", "history": [["Hi", "Hello."]]},
        [SYSTEM, *LATER], ["Yes."], None,
    ),
    ("LLaMA-Factory alpaca pair", {"instruction": "Tea?", "chosen": "Yes.", "rejected": "No."}, ASKED, ["Yes.", "No."], PAIR),
    ("LLaMA-Factory alpaca KTO", {"instruction": "Tea?", "output": "No.", "kto_tag": False}, ASKED, ["No."], [0.0]),
    (
        "LLaMA-Factory sharegpt", {"conversations": [human("Tea?"), gpt("Yes.")], "system": "Be kind.", "tools": ""},
        [SYSTEM, *ASKED], ["Yes."], None,
    ),
    (
        "LLaMA-Factory sharegpt pair",
        {"conversations": [human("Hi"), gpt("Hello."), human("Tea?")], "chosen": gpt("Yes."), "rejected": gpt("No.")},
        LATER, ["Yes.", "No."], PAIR,
    ),
    ("LLaMA-Factory sharegpt KTO", {"messages": [*ASKED, assistant("Yes.")], "label": True}, ASKED, ["Yes."], [1.0]),
    (
        "LLaMA-Factory v1",
        {
            "chosen_messages": [{"role": "user", "content": PARTS, "loss_weight": 0.0}, assistant("Yes.")],
            "rejected_messages": [{"role": "user", "content": PARTS, "loss_weight": 0.0}, assistant("No.")],
        },
        ASKED, ["Yes.", "No."], PAIR,
    ),
    (
        "MedicalGPT",
        {
            "system": "Be kind.", "history": [["Hi", "Hello."]], "question": "Tea?", "response_chosen": "Yes.",
            "response_rejected": "No.",
        },
        [SYSTEM, *LATER], ["Yes.", "No."], PAIR,
    ),
    (
        "Axolotl chatml.intel", {"system": "Be kind.", "question": "Tea?", "chosen": "Yes.", "rejected": "No."},
        [SYSTEM, *ASKED], ["Yes.", "No."], PAIR,
    ),
    (
        "Axolotl chatml.argilla", {"instruction": "Tea?", "chosen_response": "Yes.", "rejected_response": "No."},
        ASKED, ["Yes.", "No."], PAIR,
    ),
    (
        "Axolotl chat_template.default",
        {"messages": LATER, "chosen": assistant("Yes."), "rejected": assistant("No.")}, LATER, ["Yes.", "No."], PAIR,
    ),
    (
        "Axolotl ultra",
        {
            "prompt": "Tea?", "chosen": [user("Tea?"), assistant("Yes.")], "rejected": [user("Tea?"), assistant("No.")],
            "system": "Be kind.",
        },
        [SYSTEM, *ASKED], ["Yes.", "No."], PAIR,
    ),
    (
        "Axolotl gpteacher", {"instruction": "Shorten.", "input": "Tea?", "response": "T?"},
        [user("Shorten.\n\nTea?")], ["T?"], None,
    ),
    (
        "Axolotl load_open_orca", {"system_prompt": "Be kind.", "question": "Tea?", "response": "Yes."},
        [SYSTEM, *ASKED], ["Yes."], None,
    ),
    (
        "TRL preference", {"prompt": ASKED, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        ASKED, ["Yes.", "No."], PAIR,
    ),
    (
        "TRL implicit prompt", {"chosen": [*LATER, assistant("Yes.")], "rejected": [*LATER, assistant("No.")], "margin": "2.5"},
        LATER, ["Yes.", "No."], MARGIN,
    ),
    ("flags", {"prompt": "Tea?", "response": "No.", "thumbs_up": False}, ASKED, ["No."], [0.0]),
    ("JSON in a text", {"messages": json.dumps([*ASKED, assistant("Yes.")])}, ASKED, ["Yes."], None),
    (
        "capitals", {"prompt": "Tea?", "Response A": "Yes.", "Response B": "No.", "winner": "B"},
        ASKED, ["Yes.", "No."], [0.0, 1.0],
    ),
    ("TRL unpaired", {"prompt": "Tea?", "completion": "No.", "label": "0"}, ASKED, ["No."], [0.0]),
    (
        "OpenAI preferences",
        {"input": {"messages": ASKED}, "preferred_output": [assistant("Yes.")], "non_preferred_output": [assistant("No.")]},
        ASKED, ["Yes.", "No."], PAIR,
    ),
    (
        "OpenAI weights", {"messages": [*ASKED, {**assistant("Yes."), "weight": 1}, *ASKED, {**assistant("No."), "weight": 0}]},
        ASKED, ["Yes."], None,
    ),
    ("ms-swift", {"messages": [*ASKED, assistant("Yes.")], "rejected_response": "No."}, ASKED, ["Yes.", "No."], PAIR),
    ("ms-swift query", {"query": "Tea?", "response": "Yes.", "rejected_response": "No."}, ASKED, ["Yes.", "No."], PAIR),
    ("Dolly", {"instruction": "Shorten.", "context": "Tea?", "response": "T?"}, [user("Shorten.\n\nTea?")], ["T?"], None),
    ("stack-exchange-paired", {"question": "Tea?", "response_j": "Yes.", "response_k": "No."}, ASKED, ["Yes.", "No."], PAIR),
    (
        "PKU-SafeRLHF", {"prompt": "Tea?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1},
        ASKED, ["No.", "Yes."], [0.0, 1.0],
    ),
    (
        "Chatbot Arena",
        {"conversation_a": [*ASKED, assistant("Yes.")], "conversation_b": [*ASKED, assistant("No.")], "winner": "model_b"},
        ASKED, ["Yes.", "No."], [0.0, 1.0],
    ),
    (
        "HelpSteer2 preference", {"prompt": "Tea?", "response_1": "Yes.", "response_2": "No.", "preference_strength": -2},
        ASKED, ["Yes.", "No."], [2.0, 0.0],
    ),
    (
        "scores", {"prompt": "Tea?", "answer_1": "Yes.", "answer_2": "No.", "score_1": "3", "score_2": 4},
        ASKED, ["Yes.", "No."], [3.0, 4.0],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "prompt", "responses", "ratings"), [form[1:] for form in FORMS], ids=[f[0] for f in FORMS]
)
def test_documented_forms(
    tmp_path: Path, row: dict[str, Any], prompt: Any, responses: list[str], ratings: list[float] | None
) -> None:
    """Catches: a label, a preference, a system message or earlier turns that are dropped; and a stage that reads otherwise."""
    reading, _ = read(row)
    (record,) = reading.records
    assert (record.prompt, record.responses, record.ratings) == (prompt, responses, ratings)
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    good = ratings is None or max(ratings) > 0
    if good:
        best = responses[ratings.index(max(ratings)) if ratings else 0]
        (loaded,) = load_rows(tmp_path, "train", kind="demonstrations").rows
        assert (loaded["prompt"], loaded["completion"]) == (prompt, [assistant(best)])
    else:
        with pytest.raises(UserError, match=r"\(labelled false: a bad answer is no demonstration: 1\)"):
            load_rows(tmp_path, "train", kind="demonstrations")
    if len(responses) == 2:
        (loaded,) = load_rows(tmp_path, "train", kind="comparisons").rows
        assert (loaded["prompt"], loaded["ratings"]) == (prompt, ratings)
        assert [answer[0]["content"] for answer in loaded["responses"]] == responses


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "Tea?", "completion": "Yes.", "label": "drinks"}, Malformed, "'label' beside an answer must be"),
        ({"prompt": "Tea?", "completion": "Yes.", "label": 2}, Malformed, "got int 2; if it means something else, rename"),
        ({"prompt": "Tea?", "completion": "Yes.", "label": None}, Untrainable, "no 'label', which says"),
        ({"messages": [*ASKED, assistant("Yes.")], "images": ["a.png"]}, Untrainable, "'images', which no stage can use"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, Untrainable, "a part of type 'image'"),
        ({"messages": [*ASKED, {**assistant("Yes."), "weight": 0}]}, Untrainable, "no answer whose weight is above 0"),
        ({"messages": [*ASKED, {**assistant("Yes."), "weight": 0.5}]}, Malformed, "a message's weight must be 0 or 1"),
        ({"prompt": "Tea?", "completions": ["a"], "labels": [True]}, Malformed, "stepwise supervision"),
        ({"prompt": "Tea?", "completion": "Yes.", "history": "Hi"}, Malformed, "'history' must be a list of [question, answer]"),
        ({"prompt": [SYSTEM, *ASKED], "completion": "a", "system": "Be rude."}, Malformed, "'system' and the system message"),
        ({"prompt": "Tea?", "completion": "Yes.", "tools": "search"}, Malformed, "'tools' must be JSON"),
        ({"prompt": "Tea?", "chosen": "a", "rejected": "b", "margin": "much"}, Malformed, "'margin' must be a number"),
        ({"messages": ASKED, "chosen": [user("Else"), assistant("a")], "rejected": "b"}, Untrainable, "does not belong to"),
        ({"prompt": "Tea?", "response_a": "a", "response_b": "b", "winner": "tie"}, Untrainable, "no preference: a tie"),
        ({"prompt": "Tea?", "output_1": "a", "output_2": "b", "preference": 1.3}, UserError, "does not show whether output_1"),
        ({"prompt": "Tea?", "reply_x": "a", "reply_y": "b", "winner": "x"}, Malformed, "'winner' compares answers that are not"),
        ({"prompt": "p", "answer1": "a", "answer2": "b", "answer3": "c", "label": 2}, Malformed, "a label beside 3 numbered"),
        ({"segments": [{"label": True, "text": "a"}]}, UserError, "Axolotl's input_output"),
        ({"text": "a"}, UserError, "plain text is read by rlhf pretrain"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_used(row: dict[str, Any], error: type[Exception], message: str) -> None:
    """Catches: a column that changes what the row means, dropped without a word."""
    try:
        problem = read(row)[0].error
    except UserError as refusal:
        problem = refusal  # type: ignore[assignment]
    assert isinstance(problem, error) and message in str(problem)


@pytest.mark.parametrize(
    ("names", "column", "labels", "better"),
    [
        (("0", "1"), "label", [0, 1], [0, 1]),
        (("0", "1"), "label", [1, 1], [1, 1]),
        (("0", "1"), "label", [1, 2], [0, 1]),  # counted from 1: no row is 0
        (("0", "1"), "label", [0, 1, 2], [0, 1, None]),  # 2 names no column: a tie
        (("1", "2"), "preference", [1, 2], [0, 1]),
        (("1", "2"), "preference", ["2.0", "2"], [1, 1]),
        (("1", "2"), "choice", [0, 1], [0, 1]),
        (("1", "2"), "choice", [0, 1, 2], [None, 0, 1]),
        (("1", "2"), "choice", [1, 1], "1"),  # the first, or counted from 0 the second
        (("1", "2"), "choice", [0, 0], "0"),
        (("0", "1"), "label", [-1, 0, 1], "-1, 0, 1"),
        (("a", "b"), "winner", ["A", "model_b", "tie", None], [0, 1, None, None]),
        (("a", "b"), "winner", ["response_b", "tie (bothbad)"], [1, None]),
        (("a", "b"), "winner", [0, 1], [0, 1]),
        (("a", "b"), "winner", [1, 2], [0, 1]),
        (("a", "b"), "winner", [1, 1], "1"),
        (("a", "b"), "winner", [0, 1, 2], "0, 1, 2"),
        (("a", "b"), "label", [0, 1], "0, 1"),  # SHP's labels are 1 for the first
        (("a", "b"), "winner", [True, False], "false, true"),
        (("a", "b"), "winner", ["gpt-4", "claude"], "claude, gpt-4"),
    ],
)
def test_labels_of_numbered_responses(
    names: tuple[str, str], column: str, labels: list[Any], better: list[int | None] | str
) -> None:
    """Catches: half of a file turned round because labels count from 0 or from 1; a tie that becomes a preference."""
    rows = [
        {"prompt": f"p{i}", **{f"response_{name}": f"{name} {i}" for name in names}, column: label}
        for i, label in enumerate(labels)
    ]
    lines = [Line("x", number, row) for number, row in enumerate(rows, start=1)]
    if isinstance(better, str):
        with pytest.raises(
            UserError, match=rf"'{column}' holds {better}, which does not show whether response_{names[0]} or"
        ):
            SourceReader(Source(path="x"), lines)
        return
    ratings = [
        reading.records[0].ratings if reading.records else None for reading in SourceReader(Source(path="x"), lines)
    ]
    assert ratings == [None if side is None else [[1.0, 0.0], [0.0, 1.0]][side] for side in better]


def test_a_later_label_that_contradicts_refuses_the_file() -> None:
    """Catches: labels taken to count from 0 by the first rows, and from 1 by a later one."""
    rows = [{"prompt": "p", "response_1": f"a{i}", "response_2": "b", "choice": i % 2} for i in range(1000)]
    lines = [Line("x", i, row) for i, row in enumerate([*rows, {**rows[0], "choice": 2}], start=1)]
    with pytest.raises(
        UserError, match=r"x, row 1001: 'choice' names none of response_1, response_2: int 2, unlike the rows"
    ):
        list(SourceReader(Source(path="x"), lines))


def test_labelled_answers_to_one_prompt_are_compared(tmp_path: Path, build_data: Callable[..., Built]) -> None:
    """Catches: KTO's labels lost to the reward model; a second good answer lost to SFT; a bad one that is trained on."""
    rows = [
        {"prompt": text(i), "completion": f"{word} {text(i + 500)}", "label": word != "bad"}
        for i in range(40)
        for word in ("good", "bad", "fine")
    ]
    file = tmp_path / "kto.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = build_data(None, Source(path=str(file)), stages="shared", similarity=1.0, validation_share=0.3)
    for place in (file, built.folder):
        compared, good = (
            [row for split in ("train", "validation") for row in load_rows(place, split, kind=kind).rows]  # type: ignore[arg-type]
            for kind in ("comparisons", "demonstrations")
        )
        for row in compared:
            words = [answer[0]["content"].split()[0] for answer in row["responses"]]
            assert dict(zip(words, row["ratings"], strict=True)) == {"good": 1.0, "bad": 0.0, "fine": 1.0}
        first = [row["completion"][0]["content"].split()[0] for row in good]
        assert set(first) == {"good", "fine"} and first.count("good") == first.count("fine") == len(compared)
        assert len(compared) == 40 if place == file else compared


def test_columns_that_are_not_used_are_named_once(
    tmp_path: Path, build_data: Callable[..., Built], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a column that means something to its owner, left out without a word."""
    rows = [
        {
            "messages": [{**user(text(i)), "time": 3}, assistant(text(i + 500))],
            "topic": "tea",
            "empty": None,
            "id": str(i),
        }
        for i in range(40)
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = build_data(None, Source(path=str(file)), validation_share=0.3)
    assert built.card["sources"][0]["unused_columns"] == {"messages.time": 40, "topic": 40}
    named = "not used: messages.time (40 rows), topic (40 rows)"
    assert f"Columns of in.jsonl that are {named}." in (built.folder / "card.md").read_text()
    assert capsys.readouterr().err.count(named) == 1
    for split in ("train", "validation", "train"):
        load_rows(file, split, kind="demonstrations")
    assert capsys.readouterr().err.count(f"{file}: {named}") == 1
    load_rows(built.folder, "train", kind="demonstrations")
    assert "not used" not in capsys.readouterr().err


def test_no_row_is_left(tmp_path: Path, build_data: Callable[..., Built], write_jsonl: Callable[..., Path]) -> None:
    """Catches: hundreds of rows gone, with neither the reasons nor the rows."""
    file = write_jsonl([{"prompt": text(i), "completion": "", "note": i} for i in range(30)])
    with pytest.raises(
        UserError, match=r"^no row is left: empty response: 30; the rows left out are in .*out.rejected.jsonl$"
    ):
        build_data(None, Source(path=str(file)))
    lines = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert [line["data"]["note"] for line in lines] == list(range(30))
    file.write_text("".join(json.dumps({"prompt": text(i), "completion": text(i + 500)}) + "\n" for i in range(30)))
    build_data(None, Source(path=str(file)), validation_share=0.3)
    assert not (tmp_path / "out.rejected.jsonl").exists()


def test_tools_and_calls_of_every_dialect() -> None:
    """Catches: tools, a call or the reasoning left out, or a call's arguments written as text within text."""
    call = {"type": "function", "function": {"name": "brew", "arguments": {"cups": 2}}}
    as_text = json.dumps(call["function"])
    with_text = {**call, "function": {"name": "brew", "arguments": '{"cups": 2}'}}
    openai = {"role": "assistant", "content": None, "tool_calls": [with_text]}
    sharegpt = {"from": "function_call", "value": as_text}
    legacy = {**assistant(""), "function_call": {"name": "brew", "arguments": '{"cups": 2}'}}
    parts = {"role": "assistant", "content": [{"type": "tool_call", "value": as_text}]}
    wrapped = [{"type": "function", "function": FUNCTION}]
    for turn, tools in ((openai, [FUNCTION]), (sharegpt, json.dumps([FUNCTION])), (legacy, wrapped), (parts, FUNCTION)):
        key = "conversations" if "from" in turn else "messages"
        reading, _ = read({key: [user("Tea?") if key == "messages" else human("Tea?"), turn], "tools": tools})
        (record,) = reading.records
        assert parts_of(record.prompt[0]) == {"tools": [{"type": "function", "function": FUNCTION}]}
        assert record.responses == [""] and json.loads(record.parts[0]) == {"tool_calls": [call]}
    for name in ("reasoning_content", "reasoning", "thinking"):
        reading, _ = read({"messages": [*ASKED, {**assistant("Yes."), name: "It is cold."}]})
        assert json.loads(reading.records[0].parts[0]) == {"reasoning_content": "It is cold."}


def test_parts_are_cleaned_too(build_data: Callable[..., Built]) -> None:
    """Catches: an address in the reasoning that is trained on, or a call that is no longer JSON after cleaning."""
    call = {"name": "mail", "arguments": {"to": "ann@example.org"}}
    rows = [
        {
            "messages": [
                user(text(i)),
                {**assistant(text(i + 500)), "thinking": "ann@example.org?", "tool_calls": [call]},
            ]
        }
        for i in range(30)
    ]
    built = build_data(rows, validation_share=0.3, stages="shared")
    parts = [parts_of(row["messages"][-1]) for row in built.rows("demonstrations")]
    assert {part["reasoning_content"] for part in parts} == {"[EMAIL]?"} and len(parts) == 30
    assert parts[0]["tool_calls"][0]["function"]["arguments"] == {"to": "[EMAIL]"}
    assert built.card["steps"]["personal"]["changed"] == 30


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    """Catches: the last of two values of one name wins."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n')
    (tmp_path / "a.json").write_text('[{"prompt": "a", "prompt": "b"}]')
    (tmp_path / "a.csv").write_text("prompt,note,,\na,b,,\n")
    (tmp_path / "b.csv").write_text("prompt,note,prompt\na,b,a\n")
    for name, match in (
        ("a.jsonl", r"row 2: not valid JSON: `prompt` stands twice, with different values"),
        ("a.json", r"row 1: `prompt` stands twice, with different values"),
        ("b.csv", r"b.csv: `prompt` stands twice in the header"),
    ):
        with pytest.raises(UserError, match=match):
            load_rows(tmp_path / name, "train", kind="prompts")
    with pytest.raises(UserError, match="a single prompt"):  # columns without a name are no columns
        load_rows(tmp_path / "a.csv", "train", kind="prompts")
