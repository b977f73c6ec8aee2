"""Every published shape, as published, with invented texts: what is read, how the reader is found, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import Built, text

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.readers import READERS, choose_reader, mapped, read_row
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import Malformed, Untrainable
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.prepare.recipe import Source


def user(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


def assistant(said: str) -> dict[str, str]:
    return {"role": "assistant", "content": said}


POST = {"id": "t3_a1", "subreddit": "tea", "title": "Too hot", "post": "My tea was too hot. I waited."}
POST_PROMPT = "SUBREDDIT: r/tea\n\nTITLE: Too hot\n\nPOST: My tea was too hot. I waited.\n\nTL;DR:"
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea or coffee?\n\nAssistant:"


def aspects(*ratings: str) -> dict[str, Any]:
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {name: {"Rating": r, "Rationale": "because"} for name, r in zip(names, ratings, strict=True)}


def completion(model: str, response: str, *ratings: str) -> dict[str, Any]:
    return {
        "annotations": aspects(*ratings), "critique": "fine", "custom_system_prompt": "Be good.", "fine-grained_score": 1.0,
        "model": model, "overall_score": 10.0, "principle": "helpfulness", "response": response,
    }  # fmt: skip


def message(
    number: int, parent: int | None, role: str, said: str, rank: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "message_id": f"m{number}", "parent_id": None if parent is None else f"m{parent}", "user_id": f"u{number}",
        "created_date": "2023-02-05T14:23:50+00:00", "text": said, "role": role, "lang": "en", "review_count": 3,
        "deleted": False, "rank": rank, "synthetic": False, "model_name": None, "message_tree_id": "m1",
        "tree_state": "ready_for_export", **more,
    }  # fmt: skip


FLAT = [
    message(1, None, "prompter", "Why is tea hot?"),
    message(2, 1, "assistant", "It is made with boiling water.", rank=1),
    message(3, 1, "assistant", "Boiling water brings out the taste.", rank=0),
    message(4, 3, "prompter", "And iced tea?"),
    message(5, 4, "assistant", "It is cooled afterwards."),
]


def tree() -> dict[str, Any]:
    nodes = {m["message_id"]: {k: v for k, v in m.items() if k != "message_tree_id"} | {"replies": []} for m in FLAT}
    for node in nodes.values():
        if node["parent_id"]:
            nodes[node["parent_id"]]["replies"].append(node)
    return {"message_tree_id": "m1", "tree_state": "ready_for_export", "prompt": nodes["m1"]}


OASST = [
    ([user("Why is tea hot?")], ["Boiling water brings out the taste.", "It is made with boiling water."], [0.0, -1.0]),
    (
        [user("Why is tea hot?"), assistant("Boiling water brings out the taste."), user("And iced tea?")],
        ["It is cooled afterwards."],
        None,
    ),
]

#: name of the reader, a row as published, [(prompt, responses, ratings)]
SAMPLES: list[tuple[str, dict[str, Any], list[tuple[Any, list[str], list[float] | None]]]] = [
    (
        "hh_rlhf",
        {"chosen": TURNS + " Tea.", "rejected": TURNS + " Go away."},
        [([user("Hi"), assistant("Hello."), user("Tea or coffee?")], ["Tea.", "Go away."], [1.0, 0.0])],
    ),
    ("tldr_posts", {**POST, "summary": " Waited for tea."}, [([user(POST_PROMPT)], [" Waited for tea."], None)]),
    (
        "tldr_comparisons",
        {
            "info": POST, "split": "train", "summaries": [
                {"text": " Tea was hot", "policy": "sup2", "note": "ok"}, {"text": " Waiting", "policy": "ref", "note": "short"},
            ],
            "choice": 1, "worker": "w7", "batch": "batch3", "extra": {"confidence": 8},
        },
        [([user(POST_PROMPT)], [" Tea was hot", " Waiting"], [0.0, 1.0])],
    ),
    (
        "webgpt",
        {
            "question": {"dataset": "eli5", "id": "q1", "full_text": "Why is tea hot?"},
            "quotes_0": {"title": ["Tea (tea.org)"], "extract": ["Tea is hot."]}, "answer_0": "Water boils [1].",
            "tokens_0": {"prefix": [1], "completion": [2]}, "score_0": -0.5,
            "quotes_1": {"title": [], "extract": []}, "answer_1": "Nobody knows.",
            "tokens_1": {"prefix": [1], "completion": [2]}, "score_1": 0.5,
        },
        [([user("Why is tea hot?")], ["Water boils [1].", "Nobody knows."], [-0.5, 0.5])],
    ),
    (
        "arena",
        {
            "id": 30192, "model_a": "a", "model_b": "b", "prompt": '["Hi", "Tea?"]', "response_a": '["Hello.", "No."]',
            "response_b": '["Hello.", "Yes."]', "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
        },
        [([user("Hi"), assistant("Hello."), user("Tea?")], ["No.", "Yes."], [0.0, 1.0])],
    ),
    (
        "shp",
        {
            "post_id": "p1", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": "How hot should tea be?",
            "c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 3, "score_B": 20,
            "human_ref_A": "Hot.", "human_ref_B": "Eighty degrees.", "labels": 0, "seconds_difference": 1.0, "score_ratio": 6.7,
        },
        [([user("How hot should tea be?")], ["Hot.", "Eighty degrees."], [0.0, 1.0])],
    ),
    (
        "ultrafeedback",
        {
            "source": "evol_instruct", "instruction": "Praise tea.", "models": ["a", "b", "c", "d"],
            "completions": [
                completion("a", "Tea!", "1", "2", "2", "1"), completion("b", "Tea is warm.", "5", "5", "4", "5"),
                completion("c", "I like tea.", "3", "N/A", "4", "3"), completion("d", "No.", "N/A", "N/A", "N/A", "N/A"),
            ],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        },
        [([user("Praise tea.")], ["Tea!", "Tea is warm.", "I like tea."], [1.5, 4.75, 10 / 3])],
    ),
    (
        "ultrafeedback_binarized",
        {
            "prompt": "Praise tea.", "prompt_id": "f00", "chosen": [user("Praise tea."), assistant("Tea is warm.")],
            "rejected": [user("Praise tea."), assistant("No.")], "messages": [user("Praise tea."), assistant("Tea is warm.")],
            "score_chosen": 8.5, "score_rejected": 2.0,
        },
        [([user("Praise tea.")], ["Tea is warm.", "No."], [8.5, 2.0])],
    ),
    ("oasst_trees", tree(), OASST),
    (
        "nectar",
        {
            "prompt": "\n\nHuman: Tea?\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["lmsys"], "good_natured": True,
            "answers": [
                {"answer": "Please.", "model": "a", "rank": 2.0}, {"answer": " Tea is fine.", "model": "b", "rank": 1.0},
            ],
        },
        [([user("Tea?")], ["Please.", "Tea is fine."], [-2.0, -1.0])],
    ),
    (
        "helpsteer",
        {"prompt": "Tea?", "response": "No.", "helpfulness": 1, "correctness": 2, "coherence": 4},
        [([user("Tea?")], ["No."], [1.0])],
    ),
    (
        "pandalm",
        {
            "idx": 4, "motivation_app": "Grammarly", "cmp_key": "a_b", "instruction": "Shorten.", "input": "Tea is very hot.",
            "response1": "Tea is hot.", "response2": "Tea.", "annotator1": 1, "annotator2": 0, "annotator3": 1,
        },
        [([user("Shorten.\n\nTea is very hot.")], ["Tea is hot.", "Tea."], [2.5 / 3, 0.5 / 3])],
    ),
    (
        "alpaca",
        {"instruction": "Name a drink.", "input": "", "output": "Tea.", "text": "Below is an instruction..."},
        [([user("Name a drink.")], ["Tea."], None)],
    ),
    (
        "sharegpt",
        {
            "id": "s1",
            "conversations": [
                {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Please."},
                {"from": "human", "value": "Milk?"}, {"from": "gpt", "value": "No, thanks."},
            ],
        },
        [([{"role": "system", "content": "Be kind."}, user("Tea?"), assistant("Please."), user("Milk?")], ["No, thanks."], None)],
    ),
    (
        "messages",
        {"messages": [user("Tea?"), {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]},
        [([user("Tea?")], ["Yes."], None)],
    ),
    (
        "columns",
        {"prompt": "Tea?", "responses": ["Yes.", "No.", "Later."], "ranks": [1, 3, 2]},
        [([user("Tea?")], ["Yes.", "No.", "Later."], [-1.0, -3.0, -2.0])],
    ),
    ("columns", {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}, [([user("Tea?")], ["Yes.", "No."], [1.0, 0.0])]),
    ("columns", {"prompt": "Tea?", "completion": "Yes."}, [([user("Tea?")], ["Yes."], None)]),
    ("columns", {"prompt": "Tea?", "response": "Yes.", "rater": "r1", "rating": "4"}, [([user("Tea?")], ["Yes."], [4.0])]),
    ("columns", {"prompt": "Tea?"}, [([user("Tea?")], [], None)]),
]  # fmt: skip


def seen(records: list[Record]) -> list[tuple[Any, list[str], list[float] | None]]:
    return [(record.prompt, record.responses, record.ratings) for record in records]


@pytest.mark.parametrize(("name", "row", "expected"), SAMPLES, ids=[f"{s[0]}{i}" for i, s in enumerate(SAMPLES)])
def test_published_shapes(name: str, row: dict[str, Any], expected: Any) -> None:
    """Catches: chosen and rejected swapped, a rank read as a rating, the prompt left in the answer, a turn lost; and a shape
    that is taken for another one, which has some of the same columns."""
    chosen, evidence = choose_reader(Source(path="x"), [row])
    assert chosen == name and evidence
    assert seen(read_row(READERS[name], row)) == expected


@pytest.mark.parametrize(("name", "row", "expected"), SAMPLES, ids=[f"{s[0]}{i}" for i, s in enumerate(SAMPLES)])
def test_stages_read_the_same_shapes(tmp_path: Path, name: str, row: dict[str, Any], expected: Any) -> None:
    """Catches: a file that `rlhf data` reads and a stage does not, or reads otherwise."""
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert load_rows(tmp_path, "train", kind="prompts").rows["prompt"] == [prompt for prompt, _, _ in expected]
    rated = [(p, [[assistant(r)] for r in responses], ratings) for p, responses, ratings in expected if ratings]
    if rated and len(rated[0][1]) > 1:
        rows = load_rows(tmp_path, "train", kind="comparisons").rows
        assert list(zip(rows["prompt"], rows["responses"], rows["ratings"], strict=True)) == rated
    answers = [
        (prompt, [assistant(responses[ratings.index(max(ratings)) if ratings else 0])])
        for prompt, responses, ratings in expected
        if len(responses) > 1 or (responses and not ratings)
    ]
    if answers:
        rows = load_rows(tmp_path, "train", kind="demonstrations").rows
        assert list(zip(rows["prompt"], rows["completion"], strict=True)) == answers


def test_every_reader_has_a_sample() -> None:
    """Catches: a reader that nobody tests. Those that take several rows have tests of their own."""
    assert {name for name, _, _ in SAMPLES} | {"oasst_messages", "numbered"} == set(READERS)


def test_what_people_said_is_kept() -> None:
    """Catches: workers, confidence, annotators and the ids by which splits are made, lost on the way."""
    records = {name: read_row(READERS[name], row)[0] for name, row, _ in SAMPLES[:12]}
    tldr, panda, shp = records["tldr_comparisons"], records["pandalm"], records["shp"]
    assert (tldr.raters, tldr.rater_ratings, tldr.confidence, tldr.document) == (["w7"], [[0.0], [1.0]], 8.0, "t3_a1")
    assert panda.raters == ["annotator1", "annotator2", "annotator3"]
    assert panda.rater_ratings == [[1.0, 0.5, 1.0], [0.0, 0.5, 0.0]] and panda.id == "4"
    assert shp.document == "p1" and records["webgpt"].document == "q1"
    thread = read_row(READERS["oasst_trees"], tree())
    assert [(r.user, r.document, r.ranked) for r in thread] == [("u1", "m1", True), ("u4", "m1", False)]


def test_oasst_messages_are_put_together(build_data: Callable[..., Built], write_jsonl: Callable[..., Path]) -> None:
    """Catches: the flat form of OASST read as rows without context; a tree that runs into the next."""
    rows = []
    for number in range(40):
        own = {m["message_id"]: f"{m['message_id']}-{number}" for m in FLAT}
        rows += [
            {
                **m,
                "text": f"{m['text']} {text(number)}",
                "message_tree_id": own["m1"],
                "message_id": own[m["message_id"]],
                "parent_id": own.get(m["parent_id"]),
            }
            for m in FLAT
        ]
    file = write_jsonl(rows, "oasst.messages.jsonl")
    built = build_data(None, Source(path=str(file)), stages="shared", validation_share=0.2)
    assert built.card["sources"][0]["reader"] == "oasst_messages"
    assert len(built.rows("comparisons")) == 40 and len(built.rows("demonstrations")) == 80
    assert all(row["ranks"] == [1, 2] and row["ratings"] is None for row in built.rows("comparisons"))
    assert {len(row["messages"]) for row in built.rows("demonstrations")} == {2, 4}


def test_a_deleted_message_is_no_answer() -> None:
    """Catches: text that moderators took out comes back as an answer, or as the way to a later turn."""
    row = tree()
    row["prompt"]["replies"][1]["deleted"] = True
    assert [r.responses for r in read_row(READERS["oasst_trees"], row)] == [["It is made with boiling water."]]


@pytest.mark.parametrize(
    ("reader", "row", "error", "message"),
    [
        ("hh_rlhf", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, Untrainable, "does not end with an answer"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
            Malformed, "roles out of order: turn 1 is of 'assistant', expected 'system'",
        ),
        (
            "messages", {"messages": [user("a"), user("b"), assistant("c")]},
            Malformed, "roles out of order: turn 2 is of 'user', expected 'assistant'",
        ),
        ("messages", {"messages": [assistant("a")]}, Untrainable, "empty prompt"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "a"}]}, Malformed, "a message of role 'robot'; known: system"),
        (
            "tldr_comparisons", {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2},
            Malformed, "0 or 1, got int 2",
        ),
        ("alpaca", {"instruction": "a", "output": None}, Malformed, "'output' must be a text, got NoneType"),
        ("alpaca", {"instruction": "a"}, Malformed, "no column 'output'; this row has instruction"),
        ("alpaca", ["a"], Malformed, "must be an object with named columns"),
        ("shp", {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": None}, Malformed, "'labels' must be 1"),
        ("columns", {"prompt": "a", "responses": ["b", "c"], "ratings": [1]}, Malformed, "2 responses but 1 ratings"),
        ("columns", {"prompt": "a", "responses": ["b", "c"], "ratings": [1, None]}, Untrainable, "ratings that are missing or"),
        ("columns", {"prompt": "a", "responses": ["b", "c"], "ratings": ["1", "2"]}, Malformed, "must be a list of numbers"),
        ("columns", {"prompt": "a", "response": "b", "rating": "good"}, Malformed, "'rating' must be a number, got str 'good'"),
        ("columns", {"prompt": "a", "chosen": "b", "rejected": "b"}, Untrainable, "chosen and rejected are the same"),
        ("columns", {"prompt": "a", "chosen": "b", "rejected": " "}, Untrainable, "empty response"),
        (
            "webgpt",
            {"question": {"full_text": "a"}, "answer_0": "b", "answer_1": "c", "score_0": True, "score_1": 0},
            Malformed, "'score_0' must be a number",
        ),
        ("oasst_messages", {"rows": [message(2, 1, "assistant", "a")]}, Malformed, "answers m1, which is not among"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(reader: str, row: Any, error: type[Exception], message: str) -> None:
    """Catches: KeyError from deep inside; or a row that is guessed into something."""
    with pytest.raises(error) as caught:
        read_row(READERS[reader], row)
    assert message in str(caught.value)


def test_a_tie_is_no_preference() -> None:
    """Catches: of two answers that people liked equally, the first is trained on as the better, or as a demonstration."""
    row = {**SAMPLES[3][1], "score_0": 0.0, "score_1": 0.0}
    (record,) = read_row(READERS["webgpt"], row)
    assert record.serves == 4


def test_plain_columns_that_stand_together() -> None:
    """Catches: a demonstration with a rating refused for its missing response; the messages beside a pair, which is lost; the
    system message, the margin or the raters of a ranking left out; a prompt in messages refused for having no answer."""
    pair = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
    turns = [user("Tea?"), assistant("Yes.")]
    rated = {"prompt": "Tea?", "responses": ["Yes.", "No."], "rater_ratings": [[3, 1], [0, None, 2]]}

    def only(row: dict[str, Any]) -> Record:
        name, _ = choose_reader(Source(path="x"), [row])
        (record,) = read_row(READERS[name], row)
        return record

    assert seen([only({"prompt": "Tea?", "completion": "Yes.", "rating": 2})]) == [([user("Tea?")], ["Yes."], None)]
    assert only({**pair, "messages": turns}).responses == ["Yes.", "No."]
    assert only({**pair, "margin": 2.5, "system": "Be kind."}).ratings == [2.5, 0.0]
    assert only({**pair, "system": "Be kind."}).prompt[0] == {"role": "system", "content": "Be kind."}
    assert only({"messages": turns[:1]}).serves == 4 and only({"messages": turns}).serves == 5
    record = only(rated)
    assert record.ratings == [2.0, 1.0] and record.raters == ["rater 1", "rater 2", "rater 3"]
    assert record.rater_ratings == [[3, 1, None], [0, None, 2]]
    assert only({**rated, "raters": ["a", "b", "c"]}).raters == ["a", "b", "c"]


def test_rows_of_another_form_in_one_file(build_data: Callable[..., Built]) -> None:
    """Catches: rows lost because most of the file is written otherwise; or read as plain columns against a reader that the
    recipe names."""
    rows: list[Any] = [{"messages": [user(text(i)), assistant(text(i + 500))]} for i in range(30)]
    rows += [{"prompt": text(i), "completion": text(i + 500)} for i in range(100, 110)]
    built = build_data(rows, validation_share=0.3)
    assert built.card["sources"][0]["reader"] == "messages" and built.card["sources"][0]["records"] == 40
    source = Source(path=str(built.folder.parent / "in" / "rows.jsonl"), reader="messages")
    with pytest.raises(UserError, match=r"10 of 40 rows are malformed.* no column 'messages'"):
        build_data(None, source, folder="strict")


def test_column_map_and_evidence() -> None:
    """Catches: a mapped column that stays under its old name as well, and one inside an object that is not found."""
    row = {"q": "Tea?", "a": {"text": "Yes."}, "lang": "en"}
    renamed = mapped(row, {"prompt": "q", "completion": "a.text"})
    assert renamed == {"a": {"text": "Yes."}, "lang": "en", "prompt": "Tea?", "completion": "Yes."}
    assert choose_reader(Source(path="x"), [renamed]) == (
        "columns",
        "columns prompt, completion (1 of the first 1 rows)",
    )
    with pytest.raises(Malformed, match=r"no column 'answer' \(for completion\); this row has q, a, lang"):
        mapped(row, {"completion": "answer"})


def test_missing_column_says_which_exist(write_jsonl: Callable[..., Path], build_data: Callable[..., Built]) -> None:
    """Catches: KeyError: 'output'."""
    source = Source(path=str(write_jsonl([{"question": "a", "answer": "b"}])), reader="alpaca")
    with pytest.raises(
        UserError, match=r"no column 'instruction', which reader alpaca needs; there are: question, answer"
    ):
        build_data(None, source)
    with pytest.raises(
        UserError,
        match=r"no reader knows rows with the columns question, answer \(if the answers .*\); name one with reader",
    ):
        build_data(None, Source(path=source.path))
    with pytest.raises(UserError, match=r"no column 'text' \(for prompt\); this row has question, answer"):
        build_data(None, Source(path=source.path, columns=["prompt=text"]))
    with pytest.raises(UserError, match=r"no reader 'alpaka' \(did you mean 'alpaca'\?\)"):
        build_data(None, Source(path=source.path, reader="alpaka"))


def test_all_file_forms_give_the_same_rows(tmp_path: Path, build_data: Callable[..., Built]) -> None:
    """Catches: a form in which lists stay text, a line separator inside a text breaks a row, or .gz is not unpacked."""
    import datasets

    rows = [{"question": f"{text(i)}\u2028\n{i}", "good": text(-i - 1), "bad": text(i + 1000)} for i in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "d.jsonl").write_text(lines)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.write(lines)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"d.{ending}").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "saved")
    columns = ["prompt=question", "chosen=good", "rejected=bad"]
    made = {}
    for name in ("d.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.tsv", "d.parquet", "saved"):
        source = Source(path=str(tmp_path / name), name="d", columns=columns)
        made[name] = build_data(None, source, folder=f"out-{name}", validation_share=0.3)
    hashes = {name: built.card["row_hashes"] for name, built in made.items()}
    assert all(value == hashes["d.jsonl"] for value in hashes.values()), hashes


def test_hub_dataset_streams(build_data: Callable[..., Built], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a hub dataset that is downloaded whole; its split, subset and revision not passed on; an error of a page."""
    import datasets

    asked: list[Any] = []

    def load_dataset(*words: Any, **options: Any) -> Any:
        asked.append((words, options))
        rows = [{"prompt": text(i), "completion": text(i + 500)} for i in range(40)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="owner/name", subset="small", split="first", revision="abc")
    built = build_data(None, source, validation_share=0.3)
    assert asked == [(("owner/name", "small"), {"split": "first", "revision": "abc", "streaming": True})]
    assert built.card["sources"][0]["hub"] == "owner/name" and built.card["records"] == 40

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"'owner/other' here, and the hub dataset .* row 0: Couldn't reach the Hub$"):
        build_data(None, Source(path="owner/other"), folder="out2")


def test_real_pandalm(build_data: Callable[..., Built]) -> None:
    """Catches: the real file differs from what this test makes up (six of its responses are JSON true, not texts)."""
    file = Path(__file__).parents[3] / "shared" / "data" / "pandalm" / "testset-v1.json"
    if not file.is_file():
        pytest.skip("the PandaLM test set is not here")
    built = build_data(None, Source(path=str(file), uses=["comparisons", "prompts"]))
    source = built.card["sources"][0]
    assert (source["reader"], source["rows"], source["malformed"]) == ("pandalm", 999, 6)
    rows = built.rows("comparisons")
    assert len(rows) > 300 and all(len(row["raters"]) == 3 for row in rows)
    assert {len(row["rater_ratings"][0]) for row in rows} == {3}
