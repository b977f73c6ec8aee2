"""`rlhf init`: files of many shapes become configs that load and pass the preflight; what is missing is said."""

from __future__ import annotations

import csv
import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from toys import Call

from rlhf import pipeline
from rlhf.config import EvaluationConfig, build, read_yaml
from rlhf.init import survey
from rlhf.registry import Registry

Init = Callable[..., Call]
THINGS = ("film", "plot", "river", "stone", "cloud", "table", "horse", "apple", "train", "house")
COUNT = 40
ROLES = {"user": "human", "assistant": "gpt"}


def ask(i: int) -> str:
    return f"{THINGS[i % 10]} {THINGS[i // 10 % 10]} {i * 7919 % 1000} {THINGS[i * 3 % 7]}?"


def good(i: int) -> str:
    return f"a good {THINGS[i * 7 % 10]} {i}"


def bad(i: int) -> str:
    return f"a bad {THINGS[i * 3 % 10]} {i}"


def turns(i: int, answer: str = "", role: str = "role", content: str = "content") -> list[dict[str, str]]:
    names = (lambda name: name) if role == "role" else ROLES.__getitem__
    asked = [{role: names("user"), content: ask(i)}]
    return asked + ([{role: names("assistant"), content: answer}] if answer else [])


#: A row of each shape: of preferences, and of answers.
PREFERENCES: dict[str, Callable[[int], Any]] = {
    "pairs.jsonl": lambda i: {"prompt": ask(i), "chosen": good(i), "rejected": bad(i)},
    "pairs.csv": lambda i: {"prompt": ask(i), "chosen": good(i), "rejected": bad(i), "margin": 1 + i % 3},
    "conversations.parquet": lambda i: {"chosen": turns(i, good(i)), "rejected": turns(i, bad(i))},
    "transcripts.jsonl.gz": lambda i: {
        "chosen": f"\n\nHuman: {ask(i)}\n\nAssistant: {good(i)}",
        "rejected": f"\n\nHuman: {ask(i)}\n\nAssistant: {bad(i)}",
    },
    "sharegpt.json": lambda i: {
        "conversations": turns(i, role="from", content="value"),
        "chosen": {"from": "gpt", "value": good(i)},
        "rejected": {"from": "gpt", "value": bad(i)},
    },
    "rankings.jsonl": lambda i: {"prompt": ask(i), "responses": [good(i), bad(i), ask(i + 1)], "ratings": [0.9, 0.1, 0.4]},
    "two_answers.tsv": lambda i: {"prompt": ask(i), "response_a": good(i), "response_b": bad(i), "winner": "a"},
}  # fmt: skip
ANSWERS: dict[str, Callable[[int], Any]] = {
    "alpaca.json": lambda i: {"instruction": ask(i), "input": "", "output": good(i)},
    "chats.jsonl": lambda i: {"messages": turns(i, good(i))},
    "labelled.jsonl": lambda i: {"prompt": ask(i), "completion": good(i) if i % 2 else bad(i), "label": bool(i % 2)},
}


def write(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else lines)


@pytest.fixture
def init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Call], toy_base: Callable[[str], Path]
) -> Init:
    """`init("pairs.jsonl", "--output", "mine")` writes the file, unless it is there, and runs `rlhf init` with a toy model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str, *words: str, model: str = "") -> Call:
        shape = {**PREFERENCES, **ANSWERS}.get(name)
        if shape and not Path(name).exists():
            write(Path(name), [shape(i) for i in range(COUNT)])
        return call("rlhf.init", name, "--model", model or toy_base("llama"), *words)

    return run


def preflight(call: Callable[..., Call], stage: str, folder: str, registry: Path, *words: str) -> None:
    done = call("rlhf.doctor.preflight.command", "--config", f"{folder}/{stage}.yaml", "--registry", registry, *words)
    assert done.code == 0 and "preflight passed" in done.out, done.err[-2000:]


@pytest.mark.parametrize("name", [*PREFERENCES, *ANSWERS])
def test_every_shape_passes_the_preflight(
    init: Init, call: Callable[..., Call], finished: tuple[Path, Path], name: str
) -> None:
    """Configs that do not load, batches that do not fit, prompts that are too long for PPO, a set without held-out rows."""
    done = init(name, "--output", "mine")
    assert done.code == 0, done.err[-2000:]
    assert f"{name}: {COUNT} rows, read as " in done.out and "of the first 20 rows" in done.out
    assert call("rlhf.data_prep", "--config", "mine/data.yaml").code == 0
    preflight(call, "sft", "mine", finished[0])
    stages = {file.stem for file in Path("mine").iterdir()}
    if name not in PREFERENCES:
        assert stages == {"data", "sft"} and "no comparisons: PPO needs a judge" in done.out
        return
    assert stages == {"data", "sft", "reward", "ppo", "evaluate"} and "rlhf pipeline --config mine" in done.out
    if name in ("pairs.jsonl", "rankings.jsonl"):
        preflight(call, "reward", "mine", finished[0], "--policy", "sft/toy")
        preflight(call, "ppo", "mine", finished[0], "--policy", "sft/toy", "--reward", "reward/toy")
    assert build(EvaluationConfig, read_yaml("mine/evaluate.yaml"), "").models == ["sft/mine", "ppo/mine"]


def test_every_line_has_its_reason_and_none_names_the_run(init: Init) -> None:
    """A number that nobody can judge. Name and output_dir come from the folder, so that a copy of it is another run."""
    assert init("pairs.jsonl").code == 0
    for file in Path("pairs").iterdir():
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# ") and all("  # " in line for line in lines[1:] if line != "sources:"), file
    stages = {stage: read_yaml(f"pairs/{stage}.yaml") for stage in ("sft", "reward", "ppo")}
    assert not any({"name", "output_dir"} & values.keys() for values in stages.values())
    assert {values["dataset"] for values in stages.values()} == {"outputs/pairs/data"}
    assert (stages["ppo"]["policy"], stages["ppo"]["reward"]) == ("sft/pairs", "reward/pairs")


def test_what_is_missing_is_said(init: Init, finished: tuple[Path, Path]) -> None:
    """A folder whose first run fails, or stages that are left out without a word."""
    write(Path("prompts.jsonl"), [{"prompt": ask(i)} for i in range(COUNT)])
    complaint = init("prompts.jsonl").complaint
    assert "--policy sft/NAME" in complaint and "no comparisons" in complaint and not Path("prompts").exists()
    Path("registry").symlink_to(finished[0])
    Path("judge.py").write_text("def short(responses):\n    return [-len(response) for response in responses]\n")
    assert "no artefact 'sft/none'" in init("prompts.jsonl", "--policy", "sft/none").complaint
    assert "judge" in init("prompts.jsonl", "--policy", "sft/toy", "--reward", "judge:long").complaint
    done = init("prompts.jsonl", "--policy", "sft/toy", "--reward", "judge:short")
    assert done.code == 0, done.err
    assert {file.stem for file in Path("prompts").iterdir()} == {"data", "ppo", "evaluate"}
    assert (
        read_yaml("prompts/ppo.yaml")["reward"] == "judge:short"
        and read_yaml("prompts/ppo.yaml")["policy"] == "sft/toy"
    )
    folder, overrides = pipeline.parse(["--config", "prompts"])
    assert [*pipeline._stage_configs(folder, overrides)] == ["ppo"]


def test_answers_with_a_reward_become_the_whole_chain(init: Init) -> None:
    """Demonstrations and a judge of one's own need no reward model."""
    Path("judge.py").write_text("def short(responses):\n    return [-len(response) for response in responses]\n")
    assert init("chats.jsonl", "--reward", "judge:short").code == 0
    assert {file.stem for file in Path("chats").iterdir()} == {"data", "sft", "ppo", "evaluate"}


@pytest.mark.parametrize(
    "words, part",
    [
        (["none.jsonl"], "none.jsonl"),
        (["notes.txt"], "notes.txt"),
        (["empty.jsonl"], "empty.jsonl is empty"),
        (["pairs.jsonl", "--output", "full"], "full exists and is not empty"),
        (["pairs.jsonl", "--output", "a b"], "letters, digits"),
        (["pairs.jsonl", "--columns", "prompt"], "write OURS=THEIRS"),
        (["pairs.jsonl", "--reader", "pears"], "no reader 'pears'"),
        (["numbers.jsonl"], "no row can be read"),
        (["other.jsonl"], "no reader knows rows with the columns x"),
    ],
)
def test_inputs_that_cannot_be_used(init: Init, words: list[str], part: str) -> None:
    """A traceback, or a folder of configs on top of somebody's files."""
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    for name, text in {
        "notes.txt": "hello",
        "empty.jsonl": "",
        "numbers.jsonl": "1\n2\n",
        "other.jsonl": '{"x": 1}\n',
    }.items():
        Path(name).write_text(text)
    before = {file.name for file in Path().iterdir()} | {"pairs.jsonl"}
    assert part in init(*words).complaint
    assert {file.name for file in Path().iterdir()} <= before and Path("full/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "count, words, part",
    [
        (1, [], "at least two different ones"),
        (40, ["--model", "../no model"], "no model '../no model'"),
        (40, ["--columns", "prompt=nothing"], "nothing"),
    ],
)
def test_mistakes_are_answered_for_this_command(init: Init, count: int, words: list[str], part: str) -> None:
    """Bug: advice to change a data.yaml that was not written, and a traceback for a folder's name with a typing mistake."""
    write(Path("pairs.jsonl"), [PREFERENCES["pairs.jsonl"](i) for i in range(count)])
    complaint = init("pairs.jsonl", *words).complaint
    assert part in complaint and "validation_share" not in complaint and not Path("pairs").exists()


def test_two_rows_are_enough_for_configs_that_tell_the_truth(init: Init) -> None:
    """Bug: "the 1 comparisons 64 times; a second time reward models overfit"."""
    write(Path("two.jsonl"), [PREFERENCES["pairs.jsonl"](i) for i in range(2)])
    assert init("two.jsonl").code == 0
    assert "1 comparisons, each 64 times, as fewer updates teach nothing" in Path("two/reward.yaml").read_text()


def test_prompts_that_are_all_too_long_keep_their_ends(init: Init, call: Callable[..., Call]) -> None:
    """Bug: "no row is left", and no option of init to do anything about it."""
    long = [
        {"prompt": " ".join(ask(i + 50 * k) for k in range(60)), "chosen": good(i), "rejected": bad(i)}
        for i in range(COUNT)
    ]
    write(Path("long.jsonl"), long)
    done = init("long.jsonl")
    recipe = read_yaml("long/data.yaml")
    assert recipe["long_prompts"] == "truncate_left" and f"their last {recipe['max_prompt_length']} tokens" in done.out
    assert call("rlhf.data_prep", "--config", "long/data.yaml").code == 0


def test_commands_can_be_copied_where_folders_have_spaces(init: Init) -> None:
    """Bug: `rlhf pipeline --config my place/pairs`."""
    done = init("pairs.jsonl", "--output", "my place/pairs")
    lines = [shlex.split(line) for line in done.out.splitlines() if line.startswith("  rlhf p")]
    assert lines == [["rlhf", verb, "--config", "my place/pairs"] for verb in ("plan", "pipeline")]


def test_columns_with_other_names(init: Init) -> None:
    """The error message's own advice has to work before there is a data.yaml."""
    write(Path("qa.csv"), [{"question": ask(i), "best": good(i), "worst": bad(i)} for i in range(COUNT)])
    done = init("qa.csv", "--columns", "prompt=question", "chosen=best", "rejected=worst")
    assert done.code == 0, done.err
    (source,) = yaml.safe_load(Path("qa/data.yaml").read_text())["sources"]
    assert source["columns"] == {"prompt": "question", "chosen": "best", "rejected": "worst"}


def test_several_files(init: Init) -> None:
    """Answers and preferences often lie in two files: together they feed all stages."""
    write(Path("chats.jsonl"), [ANSWERS["chats.jsonl"](i + COUNT) for i in range(COUNT)])
    done = init("pairs.jsonl", "chats.jsonl", "--output", "both")
    assert done.code == 0 and f"chats.jsonl: {COUNT} rows" in done.out and f"pairs.jsonl: {COUNT} rows" in done.out
    assert [source["path"] for source in yaml.safe_load(Path("both/data.yaml").read_text())["sources"]] == [
        "pairs.jsonl", "chats.jsonl",
    ]  # fmt: skip


def test_prompts_of_one_template_and_long_files(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near-duplicates that would all land in one split; and a file of which only the beginning is looked at."""
    monkeypatch.setattr(survey, "LARGEST_SAMPLE", 80)
    start = "Write one short sentence of a friendly review of the product with the number"
    write(Path("same.jsonl"), [{"prompt": f"{start} {i}", "chosen": good(i), "rejected": bad(i)} for i in range(160)])
    done = init("same.jsonl")
    assert done.code == 0, done.err
    assert read_yaml("same/data.yaml")["similarity"] == 1.0
    assert "same.jsonl: 160 rows" in done.out and "estimates from the first rows" in done.out
    sizes = [
        int(word)
        for line in done.out.splitlines()
        if "prompts (PPO)" in line
        for word in line.split()
        if word.isdigit()
    ]
    assert sum(sizes) == 160


def test_a_model_that_is_not_here(init: Init) -> None:
    """Nothing is downloaded to look at a file: lengths are estimated, and it is said."""
    done = init("pairs.jsonl", model="somebody/model-7b")
    assert done.code == 0, done.err
    assert "estimated: the tokenizer is not on this machine" in done.out and "about 7,000M parameters" in done.out
    assert read_yaml("pairs/sft.yaml")["learning_rate"] == 2e-4 and "chat_template" not in read_yaml("pairs/sft.yaml")


def test_the_pipeline_compares_policy_and_sft(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """A chain that ends with a policy nobody compared. The stages are registered already, so only the comparison runs."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for file in toy_config.iterdir():
        (folder / file.name).write_text(file.read_text())
    dataset = read_yaml(folder / "ppo.yaml")["dataset"]
    (folder / "evaluate.yaml").write_text(
        f"models: [sft/toy, ppo/toy]\ndataset: {dataset}\nnum_prompts: 1\nsamples_per_prompt: 2\nresponse_length: 4\nbest_of: 0\n"
    )
    words = ("--registry", finished[0], "--output_dir", tmp_path / "out", "--wandb_mode", "disabled")
    done = call("rlhf.pipeline", "--config", folder, *words)
    assert done.code == 0, done.err[-2000:]
    result = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    assert [model["name"] for model in result["models"]] == ["sft/toy@1", "ppo/toy@1"]
    assert result["win_rates"][0]["model"] == "ppo/toy@1" and "report: " in done.out

    for stage in ("sft", "reward"):  # their results are registered, so PPO needs no files of theirs
        (folder / f"{stage}.yaml").unlink()
    assert [*pipeline._stage_configs(folder, {"registry": str(finished[0])})] == ["ppo"]
    assert Registry(finished[0]).get("sft/toy").version == 1
    assert (
        "no artefact 'sft/toy'" in call("rlhf.pipeline", "--config", folder, "--registry", tmp_path / "none").complaint
    )
