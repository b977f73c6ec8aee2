"""Loading any user's data: every accepted shape, every refused one, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import Loaded, NoneOfKind, load_rows


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ranked(responses: Any, ratings: Any) -> dict[str, Any]:
    return {"prompt": "p", "responses": responses, "ratings": ratings}


def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected}


def answer(completion: Any) -> dict[str, Any]:
    return {"prompt": "p", "completion": completion}


SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
HH_PROMPT = [user("Hi"), assistant("Hello."), user("How are you?")]


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(folder: Path, kind: str, *rows: Any) -> Loaded:
    write(folder, list(rows))
    return load_rows(folder, "train", kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, [user("Hi")], "Hello"),
        ({"prompt": [SYSTEM, user("Hi")], "completion": [assistant("Hello")]}, [SYSTEM, user("Hi")], "Hello"),
        ({"messages": [user("Hi"), assistant("Hello")]}, [user("Hi")], "Hello"),
        ({"messages": [*HH_PROMPT, assistant("Fine"), user("Bye")]}, HH_PROMPT, "Fine"),
        ({"chosen": HH + " Fine.", "rejected": HH + " Bad."}, HH_PROMPT, "Fine."),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, [user("Hi")], "Hello"),
    ],
)
def test_demonstrations(tmp_path: Path, row: Any, prompt: Any, completion: str) -> None:
    """Bug: an earlier answer is trained on, or the prompt's last turn is lost."""
    (loaded,) = load(tmp_path, "demonstrations", row).rows
    assert loaded == {"prompt": prompt, "completion": [assistant(completion)]}


@pytest.mark.parametrize(
    ("row", "prompt", "responses", "ratings"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, [user("Hi")], ["Hello", "No"], [1.0, 0.0]),
        (
            {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]},
            [user("Hi")], ["Hello", "No"], [1.0, 0.0],
        ),
        (
            {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("No")]},
            [user("Hi")], ["Hello", "No"], [1.0, 0.0],
        ),
        (  # ultrafeedback_binarized: a prompt as text beside whole conversations
            {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("No")]},
            [user("Hi")], ["Hello", "No"], [1.0, 0.0],
        ),
        ({"chosen": HH + " Fine.", "rejected": HH + " Bad."}, HH_PROMPT, ["Fine.", "Bad."], [1.0, 0.0]),
        ({"prompt": HH, "chosen": " Fine.", "rejected": " Bad."}, HH_PROMPT, ["Fine.", "Bad."], [1.0, 0.0]),
        (  # TRL's column: how much better the chosen one is, and null where nobody said
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "margin": 2.5}, [user("Hi")], ["Hello", "No"], [2.5, 0.0],
        ),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "margin": None}, [user("Hi")], ["Hello", "No"], [1.0, 0.0],
        ),
        (
            {"prompt": "Hi", "responses": ["a", "b", "c"], "ratings": [1, 3.5, 2]},
            [user("Hi")], ["a", "b", "c"], [1.0, 3.5, 2.0],
        ),
        (
            {"prompt": "Hi", "responses": [[assistant("a")], [assistant("b")]], "ranks": [2, 1]},
            [user("Hi")], ["a", "b"], [-2.0, -1.0],
        ),
    ],
)  # fmt: skip
def test_comparisons(tmp_path: Path, row: Any, prompt: Any, responses: list[str], ratings: list[float]) -> None:
    """Bug: chosen and rejected swapped, ranks read as ratings, the prompt left inside the answers."""
    (loaded,) = load(tmp_path, "comparisons", row).rows
    assert loaded == {"prompt": prompt, "responses": [[assistant(r)] for r in responses], "ratings": ratings}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi"}, [user("Hi")]),
        ({"prompt": [SYSTEM, user("Hi")]}, [SYSTEM, user("Hi")]),
        ({"prompt": [user("Hi"), assistant("Hello")]}, [user("Hi")]),
        ({"messages": [user("Hi"), assistant("Hello")]}, [user("Hi")]),
        ({"prompt": HH}, HH_PROMPT),
        ({"chosen": HH + " Fine.", "rejected": HH + " Bad."}, HH_PROMPT),
    ],
)
def test_prompts(tmp_path: Path, row: Any, prompt: Any) -> None:
    """Bug: the policy is asked to go on after an answer that is already there."""
    (loaded,) = load(tmp_path, "prompts", row).rows
    assert loaded == {"prompt": prompt}


def test_raters_are_split_in_two_halves(tmp_path: Path) -> None:
    """Bug: a rater whose verdict is trained on is also held out, a rater who changes halves from row to row, or a missing
    verdict read as 0."""
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "rater_ratings": [[3, 1, 1], [0, 1, 2]]},
        {"prompt": "q", "responses": ["a", "b"], "rater_ratings": [[3, 1, None, 2], [0, 5, 2]]},
    ]
    first, second = load(tmp_path, "comparisons", *rows).rows
    assert first["ratings"] == [2.0, 1.0] and first["ratings_held_out"] == [1.0, 1.0]
    assert first["rater_ratings"] == [[3, 1], [0, 2]] and first["rater_ratings_held_out"] == [[1], [1]]
    assert second["ratings"] == [3.0, 1.0] and second["ratings_held_out"] == [1.5, 5.0]
    given = {**rows[0], "ratings": [0.0, 1.0]}
    (kept,) = load(tmp_path, "comparisons", given).rows
    assert kept["ratings"] == [0.0, 1.0] and kept["rater_ratings"] == [[3, 1, 1], [0, 1, 2]], "given ratings stay"
    assert "ratings_held_out" not in kept


def test_a_tie_of_one_half_is_kept_for_the_other(tmp_path: Path) -> None:
    """Bug: pairs on which the raters trained on are undecided are left out, and the human ceiling rises for it."""
    row = {"prompt": "p", "responses": ["a", "b"], "rater_ratings": [[1, 1, 0], [0, 0, 1]]}
    (kept,) = load(tmp_path, "comparisons", row).rows
    assert kept["ratings"] == [0.5, 0.5] and kept["ratings_held_out"] == [1.0, 0.0]
    tied = {**row, "rater_ratings": [[1, 1, 0], [0, 1, 1]]}
    assert load(tmp_path, "comparisons", row, tied).dropped == {"all responses are rated the same": 1}


def test_rows_that_contradict_each_other_are_left_out(tmp_path: Path) -> None:
    """Bug: the model is trained on a pair in both orders, which teaches it nothing and counts as data; or a row goes that
    only repeats another, or answers another prompt."""
    rows = [
        pair("a", "b"),
        pair("b", "a"),  # against the first
        pair("a", "b"),  # as the first says
        {**pair("b", "a"), "prompt": "q"},  # of another prompt
        pair("a", "c"),
        ranked(["x", "y", "z"], [1, 2, 3]) | {"prompt": "r"},
    ]
    loaded = load(tmp_path, "comparisons", *rows[:5])
    assert [row["responses"][0][0]["content"] + row["responses"][1][0]["content"] for row in loaded.rows] == [
        "ba",
        "ac",
    ]
    assert loaded.dropped == {"contradicts another row": 3}
    assert loaded.dropped_rows == {"contradicts another row": [1, 2, 3]} and loaded.numbers == [4, 5]
    lists = [ranked(["x", "y", "z"], [1, 2, 3]), ranked(["z", "w", "x"], [1, 1, 2]), ranked(["x", "y"], [0, 2])]
    loaded = load(tmp_path, "comparisons", *lists)  # x and z are in both orders, x and y in one
    assert loaded.dropped_rows == {"contradicts another row": [1, 2]} and loaded.numbers == [3]


def test_a_file_may_mix_its_forms(tmp_path: Path) -> None:
    """Bug: every row is read by the columns of the whole file, and a row of single raters' numbers among rows of ratings is
    refused for having no ranks."""
    rows = [
        ranked(["a", "b"], [0, 1]),
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "r", "responses": ["a", "b"], "rater_ratings": [[3, 1], [0, 2]]},
        {**pair("a", "b"), "prompt": "s"},
    ]
    loaded = load(tmp_path, "comparisons", *rows).rows
    assert loaded["ratings"] == [[0, 1], [-1, -2], [3, 0], [1, 0]]
    assert loaded["ratings_held_out"] == [None, None, [1, 2], None]
    mixed = load(tmp_path, "demonstrations", {"messages": [user("a"), assistant("b")]}, answer("c")).rows
    assert [completion[0]["content"] for completion in mixed["completion"]] == ["b", "c"]


def test_other_columns_are_kept(tmp_path: Path) -> None:
    """Bug: the held-out ratings are lost, or a column of mixed types that nobody needs stops the run."""
    row = {"prompt": "p", "responses": ["a", "b"], "ratings": [0, 1], "ratings_held_out": [0.5, 1.5]}
    rows = load(tmp_path, "comparisons", {**row, "note": 1}, {**row, "note": "x"}, row).rows
    assert rows["ratings_held_out"] == [[0.5, 1.5]] * 3
    assert rows["note"] == ["1", '"x"', "null"]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("comparisons", ranked(["a"], [1]), "fewer than two responses"),
        ("comparisons", ranked(["a", "b"], [1, 1]), "all responses are rated the same"),
        ("comparisons", ranked(["a", " "], [1, 2]), "empty response"),
        ("comparisons", ranked(["a", "b"], [1, float("nan")]), "ratings that are missing or not finite"),
        ("comparisons", ranked(["a", "b"], [1, None]), "ratings that are missing or not finite"),
        ("comparisons", ranked(["a", "b"], [1, float("inf")]), "ratings that are missing or not finite"),
        ("comparisons", ranked(["a", "b", "a"], [1, 2, 3]), "the same response is rated twice, differently"),
        (
            "comparisons",
            {**ranked(["a", "b"], [1, 2]), "rater_ratings": [[1], [None]]},
            "rater_ratings that are missing or not finite",
        ),
        ("comparisons", pair("a", "a"), "chosen and rejected are the same"),
        ("comparisons", {**pair("a", "b"), "margin": 0}, "a margin that is not above 0 and finite"),
        ("comparisons", {**pair("a", "b"), "margin": -1.0}, "a margin that is not above 0 and finite"),
        ("comparisons", {**pair("a", "b"), "margin": float("nan")}, "a margin that is not above 0 and finite"),
        ("comparisons", {**pair("a", "b"), "prompt": ""}, "empty prompt"),
        (
            "comparisons",
            {"chosen": HH + " a", "rejected": "\n\nHuman: Else\n\nAssistant: b"},
            "chosen and rejected do not answer the same prompt",
        ),
        (
            "comparisons",
            {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " b"},
            "the conversation does not end with an answer",
        ),
        ("demonstrations", {"prompt": "p", "completion": ""}, "empty response"),
        ("demonstrations", {"messages": [user("a")]}, "no assistant turn"),
        ("demonstrations", {"messages": [assistant("a")]}, "empty prompt"),
        ("prompts", {"prompt": " \n"}, "empty prompt"),
        ("prompts", {"prompt": [SYSTEM]}, "empty prompt"),
        ("prompts", {"messages": []}, "empty conversation"),
    ],
)
def test_rows_without_a_lesson_are_dropped_and_counted(tmp_path: Path, kind: str, row: Any, reason: str) -> None:
    """Bug: such a row reaches a loss as 0/0, or vanishes without a count; or nothing is left and training starts."""
    if "messages" in row:
        good: dict[str, Any] = {"messages": [user("a"), assistant("b")]}
    elif kind == "comparisons":
        good = ranked(["a", "b"], [0, 1]) if "responses" in row else pair("x", "y")
    else:
        good = {"prompt": "p", "completion": "a"}
    loaded = load(tmp_path, kind, good, row, row)
    assert len(loaded.rows) == 1
    assert loaded.dropped == {reason: 2}
    assert loaded.dropped_rows == {reason: [2, 3]} and loaded.numbers == [1]
    with pytest.raises(UserError, match=rf"no row of .*train.jsonl can be used as {kind} \({reason}: 1\)"):
        load(tmp_path, kind, row)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("demonstrations", answer(3), r"train.jsonl, row 2: 'completion' must be a string .* got int 3"),
        (
            "demonstrations",
            {"prompt": "p"},
            r"row 2: demonstrations need 'prompt' \+ 'completion', .* this row has prompt;",
        ),
        ("demonstrations", answer([user("a")]), r"row 2: 'completion' must be a string or one assistant message"),
        ("demonstrations", answer([{"from": "gpt"}]), r"row 2: 'completion' must hold messages with the texts 'role'"),
        (
            "demonstrations",
            {"prompt": [{"role": "humam", "content": "p"}], "completion": "a"},
            r"row 2: 'prompt' has a message of role 'humam' \(did you mean 'human'\?\)",
        ),
        ("demonstrations", ["p"], r"row 2: must be an object with named columns, got list"),
        ("comparisons", ranked("ab", [1, 2]), r"row 2: 'responses' must be a list, got str 'ab'"),
        ("comparisons", ranked(["a", "b"], [1]), r"row 2: 2 responses but 1 ratings"),
        ("comparisons", ranked(["a", "b"], ["1", "2"]), r"row 2: 'ratings' must be a list of numbers"),
        (
            "comparisons",
            {**ranked(["a", "b"], [1, 2]), "rater_ratings": [[1], ["x"]]},
            r"row 2: 'rater_ratings' must be",
        ),
        (
            "comparisons",
            {**ranked(["a", "b"], [1, 2]), "rater_ratings": [[1]]},
            r"row 2: 2 responses but 1 lists of rater",
        ),
        ("comparisons", {**ranked(["a", "b"], [1, 2]), "ratings_held_out": [1]}, r"2 responses but 1 ratings_held_out"),
        ("comparisons", ranked(["a", "b"], [True, False]), r"row 2: 'ratings' must be a list of numbers"),
        (
            "comparisons",
            ranked(["a", "b"], None),
            r"row 2: it has 'responses', but no 'ratings', 'ranks' or 'rater_ratings'",
        ),
        ("comparisons", {**pair("a", "b"), "margin": "much"}, r"row 2: 'margin' must be a number, got str 'much'"),
    ],
)
def test_wrong_types_name_file_and_row(tmp_path: Path, kind: str, row: Any, message: str) -> None:
    """Bug: KeyError or TypeError from deep inside, with no hint which of 100,000 rows is meant."""
    good = answer("a") if kind == "demonstrations" else ranked(["a", "b"], [0, 1])
    with pytest.raises(UserError, match=message):
        load(tmp_path, kind, good, row)


def test_an_answer_without_its_prompt(tmp_path: Path) -> None:
    """Bug: a reward model trained on answers to nothing."""
    with pytest.raises(UserError, match="row 1: 'chosen' is an answer without its prompt; add a 'prompt' column"):
        load(tmp_path, "comparisons", {"chosen": "a", "rejected": "b"})


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons", "prompts"])
def test_missing_columns(tmp_path: Path, kind: str) -> None:
    """Bug: KeyError: 'prompt'."""
    with pytest.raises(UserError, match=rf"has columns answer, question; {kind} need 'prompt'"):
        load(tmp_path, kind, {"question": "q", "answer": "a"})


def test_missing_data_names_the_nearest(tmp_path: Path) -> None:
    """Bug: a misspelt path is looked up on the hub, which answers with a page of text."""
    file = write(tmp_path, [{"prompt": "p"}], "prompts/train.jsonl")
    with pytest.raises(UserError, match=r"no data at .*trian.jsonl \(did you mean '.*train.jsonl'\?\)"):
        load_rows(file.with_name("trian.jsonl"), "train", kind="prompts")
    with pytest.raises(UserError, match=r"no data at outputs/demo/data.*made with: rlhf data"):
        load_rows("outputs/demo/data-that-is-not-there", "train", kind="prompts")
    with pytest.raises(
        UserError,
        match=r"no comparisons for train in .*expected comparisons/train.parquet .*there are prompts/train.jsonl",
    ):
        load_rows(tmp_path, "train", kind="comparisons")
    with pytest.raises(UserError, match=r"no split 'valid'.*did you mean 'validation'"):
        load_rows(tmp_path, "valid", kind="prompts")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.json", b"[]", "is empty"),
        ("d.csv", b"prompt,completion\n", "is empty"),
        ("d.parquet", b"nothing", "not a readable Parquet file"),
        ("d.jsonl", b'{"prompt": "p"}\n{"prompt"\n', "row 2: not valid JSON"),
        ("d.json", b'[{"prompt": "p"}', "not valid JSON"),
        ("d.jsonl", b'{"prompt": "caf\xe9"}', "not UTF-8"),
        ("d.txt", b"x", "must end in one of"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Bug: a traceback of a parser."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path / name, "train", kind="prompts")


def test_all_file_formats_give_the_same_rows(tmp_path: Path) -> None:
    """Bug: a format in which lists stay text, or a line separator inside a text breaks a row."""
    rows = [
        {
            "prompt": f"p{i}\u2028 \nx",
            "responses": ["a", "b"],
            "ratings": [float(i), 0.5],
            "ratings_held_out": [1.0, i + 0.5],
        }
        for i in range(30)
    ]
    write(tmp_path, rows, "d.jsonl")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "d.parquet")
    as_text = [{k: v if k == "prompt" else json.dumps(v) for k, v in row.items()} for row in rows]
    datasets.Dataset.from_list(as_text).to_csv(tmp_path / "d.csv", index=False)
    loaded = [
        load_rows(tmp_path / f"d{s}", "train", kind="comparisons") for s in (".jsonl", ".json", ".parquet", ".csv")
    ]
    assert len({one.fingerprint for one in loaded}) == 1
    assert all(one.rows.to_list() == loaded[0].rows.to_list() for one in loaded)


def test_a_text_that_looks_like_json_stays_a_text(tmp_path: Path) -> None:
    """Bug: the CSV cell [1, 2] in a column of texts becomes a list."""
    (tmp_path / "train.csv").write_text('prompt,completion\n"[1, 2]","[3]"\n')
    (row,) = load_rows(tmp_path, "train", kind="demonstrations").rows
    assert row == {"prompt": [user("[1, 2]")], "completion": [assistant("[3]")]}


def test_fingerprint_follows_the_rows(tmp_path: Path) -> None:
    """Bug: a stage is skipped although its data changed."""
    first = load(tmp_path, "demonstrations", {"prompt": "p", "completion": "a"}).fingerprint
    assert load(tmp_path, "demonstrations", {"messages": [user("p"), assistant("a")]}).fingerprint == first
    assert load(tmp_path, "demonstrations", {"prompt": "p", "completion": "b"}).fingerprint != first


def test_one_file_is_split_by_prompt(tmp_path: Path) -> None:
    """Bug: train and validation of a single file are the same rows, so the evaluation is worth nothing."""
    file = write(tmp_path, [{"prompt": f"p{i % 100}", "completion": f"a{i}"} for i in range(300)], "all.jsonl")
    train, held_out = (load_rows(file, split, kind="demonstrations").rows for split in ("train", "validation"))
    assert len(train) + len(held_out) == 300
    assert 3 <= len(held_out) <= 75
    assert not {r["prompt"][0]["content"] for r in train} & {r["prompt"][0]["content"] for r in held_out}
    for count in range(2, 8):  # however few: some in each
        file = write(tmp_path, [{"prompt": f"q{i}"} for i in range(count)], "few.jsonl")
        assert all(len(load_rows(file, split, kind="prompts").rows) for split in ("train", "validation"))
    with pytest.raises(UserError, match="a single prompt"):
        load_rows(write(tmp_path, [{"prompt": "p"}], "one.jsonl"), "train", kind="prompts")


def test_a_prompt_in_two_spellings_is_one_prompt(tmp_path: Path) -> None:
    """Bug: validation holds a training prompt in other case or spacing; or two rows of it contradict each other unnoticed."""
    rows = [{"prompt": f"What is number {i}?", "completion": f"a{i}"} for i in range(100)]
    other = [{"prompt": f"  what IS\nnumber \uff11{row['prompt'][-2]}?", "completion": "b"} for row in rows[10:20]]
    file = write(tmp_path, rows + other, "all.jsonl")
    train, held_out = (load_rows(file, split, kind="demonstrations").rows for split in ("train", "validation"))
    assert not {prompt_key(p) for p in train["prompt"]} & {prompt_key(p) for p in held_out["prompt"]}
    plain = load_rows(write(tmp_path, rows, "plain.jsonl"), "validation", kind="demonstrations").rows
    assert {c[0]["content"] for c in plain["completion"]} <= {c[0]["content"] for c in held_out["completion"]}, (
        "a second spelling takes no prompt out of validation"
    )
    loaded = load(tmp_path, "comparisons", pair("a", "b"), {**pair("b", "a"), "prompt": " P"}, pair("c", "d"))
    assert loaded.dropped_rows == {"contradicts another row": [1, 2]}


def test_rows_that_hold_nothing_of_the_kind(tmp_path: Path) -> None:
    """Bug: a slip in one row of a user's file passes for a row of another kind; or a published set of trees, most of whose
    turns nobody ranked, cannot be given to the reward stage."""
    turn = {"role": "prompter", "replies": [{"role": "assistant", "text": "a", "rank": 0}, {"role": "assistant", "text": "b", "rank": 1}]}  # noqa: E501  # fmt: skip
    trees = [
        {"message_tree_id": str(i), "tree_state": "x", "prompt": {**turn, "text": f"p{i}", "replies": turn["replies"][:count]}}
        for i, count in enumerate((2, 1, 2, 0))
    ]  # fmt: skip
    loaded = load(tmp_path, "comparisons", *trees)
    assert loaded.numbers == [1, 3] and loaded.dropped_rows == {"nothing for comparisons": [2, 4]}
    with pytest.raises(UserError, match=r"row 2: comparisons need .* this row has prompt, completion"):
        load(tmp_path, "comparisons", pair("a", "b"), answer("c"))
    with pytest.raises(NoneOfKind, match="has columns completion, prompt; comparisons need"):
        load(tmp_path, "comparisons", answer("c"))


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a dataset whose held-out split is called test is evaluated on its training rows."""
    rows = datasets.Dataset.from_list([{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(50)])
    hub: dict[str, Any] = {"train": rows, "test": rows.select(range(3))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    assert len(load_rows("owner/name", "train", kind="comparisons").rows) == 50
    assert len(load_rows("owner/name", "validation", kind="comparisons").rows) == 3
    del hub["test"]
    sizes = [len(load_rows("owner/name", split, kind="comparisons").rows) for split in ("train", "validation")]
    assert sum(sizes) == 50 and min(sizes) > 0
    hub.clear()
    hub["default"] = rows
    with pytest.raises(UserError, match="'owner/name' has no train split; it has default"):
        load_rows("owner/name", "train", kind="comparisons")


def test_hub_columns_of_images_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a data set whose image column names a file of this machine, which is opened and read with the row."""
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "pictures": datasets.List(datasets.Image()),
            "score": datasets.Value("int64"),
        }
    )
    secret = str(tmp_path / "secret.png")
    rows = [{"prompt": f"p{i}", "pictures": [{"path": secret, "bytes": None}], "score": i} for i in range(4)]
    hub = {"train": datasets.Dataset(pa.Table.from_pylist(rows, schema=features.arrow_schema))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    loaded = load_rows("owner/name", "train", kind="prompts").rows
    assert "score" in loaded.column_names and "pictures" not in loaded.column_names


def test_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a page of connection errors."""

    def offline(name: str) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"no file or folder 'owner/name' here, .*: Couldn't reach the Hub$"):
        load_rows("owner/name", "train", kind="prompts")
