"""Bad input: a clear line with file and row, a bad row counted and kept, nothing half-written left behind."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import Built, pairs, text

from rlhf.base.errors import UserError
from rlhf.data_prep import Source
from rlhf.data_prep.formats import files
from rlhf.data_prep.formats.files import read_file
from rlhf.data_prep.load import load_rows

Build = Callable[..., Built]
Write = Callable[..., Path]
MB = 1_000_000


def demonstrations(count: int) -> list[dict[str, Any]]:
    return [{"prompt": text(2 * i), "completion": text(2 * i + 1)} for i in range(count)]


def refused(build: Build, place: Path, *, match: str, **options: Any) -> None:
    """The build must be refused with this line, and must leave no folder; rows left out are kept beside its place."""
    with pytest.raises(UserError, match=match):
        build(None, Source(path=str(place)), **options)
    left = [p.name for p in place.parents[1].iterdir() if p.name not in ("in", "cache", "out.rejected.jsonl")]
    assert left == []


def test_truncated_gzip(tmp_path: Path, write_jsonl: Write, build_data: Build) -> None:
    """Catches: half a download taken for the whole data, or EOFError."""
    whole = gzip.compress(write_jsonl(demonstrations(4000)).read_bytes())
    file = tmp_path / "in" / "rows.jsonl.gz"
    file.write_bytes(whole[: len(whole) // 2])
    refused(build_data, file, match=r"rows.jsonl.gz ends in the middle of its compressed data after row \d\d+ .*again")
    file.write_bytes(b"no gzip at all")
    refused(
        build_data, file, match=r"rows.jsonl.gz ends in the middle of its compressed data after row 0 .*Not a gzipped"
    )


def test_invalid_utf8_is_one_row(write_jsonl: Write, build_data: Build) -> None:
    """Catches: one bad byte that ends the file, or is silently replaced by a question mark."""
    file = write_jsonl(demonstrations(40))
    file.write_bytes(file.read_bytes() + b'{"prompt": "caf\xe9", "completion": "x"}\n')
    built = build_data(None, Source(path=str(file)), validation_share=0.3)
    (bad,) = built.rejected
    assert (bad["file"], bad["row"], bad["reason"]) == ("rows.jsonl", 41, "not UTF-8 (byte 16 of the line)")
    assert bad["data"] == '{"prompt": "caf\\xe9", "completion": "x"}'
    assert built.card["rows_read"] == 41 and built.card["records"] == 40


def test_invalid_utf8_in_csv_is_one_row(tmp_path: Path, build_data: Build) -> None:
    """Catches: the same in a CSV file, where the decoder sees many lines at once."""
    rows = "".join(f"{text(i)},{text(-i - 1)}\n" for i in range(40))
    file = tmp_path / "in" / "rows.csv"
    file.parent.mkdir()
    file.write_bytes(b"prompt,completion\n" + rows.encode() + b"caf\xe9,x\nlonely\na,b,c\n")
    built = build_data(None, Source(path=str(file)), validation_share=0.3)
    reasons = [
        "not UTF-8 (character 4 of 'prompt')",
        "the row ends before column 'completion'",
        "1 more cells than columns",
    ]
    assert [(bad["row"], bad["reason"]) for bad in built.rejected] == list(zip((41, 42, 43), reasons, strict=True))


def test_mixed_schemas(build_data: Build) -> None:
    """Catches: rows of another shape that are read as empty ones, vanish, or end the file."""
    rows = [*pairs(40), {"question": "q", "answer": "a"}, {"prompt": "p", "chosen": "c"}, ["a", "list"], "7"]
    built = build_data(rows, validation_share=0.3, stages="shared")
    assert [(bad["row"], bad["reason"][:40]) for bad in built.rejected] == [
        (41, "'prompt' must be a string or a list of {"),
        (42, "no 'rejected' for a pair; this row has p"),
        (43, "must be an object with named columns, go"),
        (44, "must be an object with named columns, go"),
    ]


def test_conversations_that_teach_nothing(build_data: Build) -> None:
    """Catches: a transcript without an assistant turn, or with two answers in a row, that ends the build or is trained on."""
    good = [
        {
            "chosen": f"\n\nHuman: {text(i)}\n\nAssistant: {text(-i - 1)}",
            "rejected": f"\n\nHuman: {text(i)}\n\nAssistant: no",
        }
        for i in range(40)
    ]
    silent = {"chosen": "\n\nHuman: anyone?", "rejected": "\n\nHuman: anyone?"}
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c"
    built = build_data([*good, silent, {"chosen": twice, "rejected": twice[:-1] + "d"}], validation_share=0.3)
    assert [bad["reason"] for bad in built.rejected if bad["step"] == "read"] == [
        "the conversation does not end with an answer",
        "roles out of order: the prompt ends with 'assistant'",
    ]
    assert [bad["row"] for bad in built.rejected if bad["step"] == "read"] == [41, 42]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Inside, this process cannot get more than 60 MB on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages + 60 * MB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_100_mb_on_one_line(tmp_path: Path, little_memory: None) -> None:
    """Catches: a line that is read whole before anybody looks at its length."""
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as out:
        out.write(b'{"prompt": "before"}\n{"prompt": "')
        for _ in range(100):
            out.write(b"x" * MB)
        out.write(b'"}\n{"prompt": "after"}\n')
    before, long, after = read_file(file, 16 * MB)
    assert (before.value, after.value, after.number) == ({"prompt": "before"}, {"prompt": "after"}, 3)
    assert long.number == 2 and long.problem == "100.0 MB on one line, more than max_row_megabytes allows"
    assert long.raw.startswith('{"prompt": "xxx') and len(long.raw) == 2000


def test_an_unclosed_quote_in_csv(tmp_path: Path) -> None:
    """Catches: a missing quote that swallows the rest of the file into one cell."""
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\n"a,b\n' + "c,d\n" * 10_000)
    with pytest.raises(UserError, match=r"rows.csv is not a readable CSV file: field larger .*is a quote not closed\?"):
        list(read_file(file, 1000))


def test_duplicate_ids(build_data: Build) -> None:
    """Catches: two different rows of one id both used, though one of them must be wrong; or rows without ids dropped."""
    rows = [{"id": i, **row} for i, row in enumerate(demonstrations(40))]
    rows += [{"id": 7, "prompt": text(900), "completion": text(901)}, *demonstrations(43)[41:]]
    built = build_data(rows, validation_share=0.3, stages="shared")
    (bad,) = (bad for bad in built.rejected if bad["step"] == "read")
    assert (bad["row"], bad["reason"], bad["data"]["note"]) == (
        41,
        "id of an earlier row",
        "first in rows.jsonl, row 8",
    )
    assert bad["data"]["responses"] == [text(901)]
    assert text(900) not in built.prompts("demonstrations") and text(82) in built.prompts("demonstrations")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_empty_file(tmp_path: Path, build_data: Build, name: str) -> None:
    """Catches: an empty data set and no word."""
    file = tmp_path / "in" / name
    file.parent.mkdir()
    content = {"rows.json": b"[]", "rows.csv": b"prompt,completion\n"}.get(name, b"")
    file.write_bytes(content)
    if name == "rows.parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), file)
    refused(build_data, file, match=f"{name} is empty: it holds no rows")


@pytest.mark.parametrize("change", ["append", "remove"])
def test_file_that_changes_while_it_is_read(
    write_jsonl: Write, build_data: Build, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Catches: a card whose sha256 is of another file than the rows came from."""
    file = write_jsonl(demonstrations(400))
    original = files._json_line

    def meddling(name: str, number: int, raw: bytes) -> Any:
        if number == 200 and file.exists():
            if change == "append":
                file.write_bytes(file.read_bytes() + b'{"prompt": "late"}\n')
            else:
                file.unlink()
        return original(name, number, raw)

    monkeypatch.setattr(files, "_json_line", meddling)
    refused(
        build_data, file, match=rf"rows.jsonl was {'changed' if change == 'append' else 'removed'} while it was read"
    )


def test_broken_json_array(tmp_path: Path, build_data: Build) -> None:
    """Catches: rows after a slip in an array lost without a word: what follows cannot be told apart."""
    file = tmp_path / "in" / "rows.json"
    file.parent.mkdir()
    file.write_text(json.dumps(demonstrations(30))[:-40])
    refused(build_data, file, match=r"rows.json is not valid JSON after row 29")


def test_mostly_malformed_is_refused(write_jsonl: Write, build_data: Build) -> None:
    """Catches: the wrong reader, which makes a small data set of the few rows that fit by chance."""
    file = write_jsonl([*demonstrations(40), *["{"] * 10])
    refused(
        build_data,
        file,
        match=r"10 of 50 rows are malformed, more than max_rejected_share 0.1 allows; most often: not valid.*; "
        r"the rows left out are in .*out.rejected.jsonl$",
    )
    rejected = file.parents[1] / "out.rejected.jsonl"
    assert len(rejected.read_text().splitlines()) == 10
    built = build_data(None, Source(path=str(file)), max_rejected_share=0.5, validation_share=0.3)
    assert len(built.rejected) == 10 and not rejected.exists()


def test_nothing_there(tmp_path: Path, build_data: Build) -> None:
    """Catches: a misspelt path looked up on the hub; an empty folder; a file nobody can read."""
    (tmp_path / "in").mkdir()
    refused(build_data, tmp_path / "in" / "rows.jsonl", match="no data at .*rows.jsonl")
    (tmp_path / "in" / "folder").mkdir()
    with pytest.raises(UserError, match=r"no data files in .*folder; expected names ending in"):
        build_data(None, Source(path=str(tmp_path / "in" / "folder")))
    (tmp_path / "in" / "rows.docx").write_bytes(b"x")
    refused(build_data, tmp_path / "in" / "rows.docx", match="cannot read .*rows.docx: its name must end in")


def test_folder_with_splits(tmp_path: Path, write_jsonl: Write, build_data: Build) -> None:
    """Catches: the test file of a folder read as training data although only train was asked for."""
    write_jsonl(demonstrations(40), "train-00000-of-00001.jsonl")
    write_jsonl([{"prompt": text(9000), "completion": "x y z"}], "test.jsonl")
    folder = str(tmp_path / "in")
    assert build_data(None, Source(path=folder, split="train"), validation_share=0.3).card["rows_read"] == 40
    both = build_data(None, Source(path=folder), folder="both", validation_share=0.3)
    assert list(both.card["sources"][0]["files"]) == ["test.jsonl", "train-00000-of-00001.jsonl"]
    assert both.card["rows_read"] == 41


def test_half_a_surrogate_pair(build_data: Build) -> None:
    """Catches: a text that JSON allows and no file can hold, which ends the build in UnicodeEncodeError."""
    rows = [*demonstrations(40), '{"prompt": "broken \\ud83d here", "completion": "a fine answer"}']
    built = build_data(rows, clean=[], validation_share=0.3)
    (bad,) = built.rejected
    assert (bad["row"], bad["reason"][:28]) == (41, "holds half of a surrogate pa")
    assert build_data(rows, folder="out2", validation_share=0.3).rejected == [], "the step encoding mends it"


def test_on_the_command_line(tmp_path: Path, write_jsonl: Write) -> None:
    """Catches: a traceback, another exit code than 2, more than one line of error; and options that do not arrive."""
    file, recipe = write_jsonl(demonstrations(40)), tmp_path / "data.yaml"
    recipe.write_text(f"sources: [{file}]\nvalidation_share: 0.3\noutput_dir: {tmp_path / 'out'}\n")
    command = [sys.executable, "-m", "rlhf.data_prep", "--config", str(recipe)]
    done = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "out")]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["recipe"]["seed"] == 3
    file.write_text("")
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == f"error: {file} is empty: it holds no rows\n"
    assert Built(tmp_path / "out").card["records"] == 40, "the data of before is still there"


def test_half_a_surrogate_pair_straight_into_a_stage(tmp_path: Path) -> None:
    """Catches: a traceback of the tokenizer in a stage that reads the raw file, where data preparation counts the row."""
    file = tmp_path / "rows.jsonl"
    good = [json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) for i in range(40)]
    file.write_text("\n".join([*good, '{"prompt": "half \\ud83d of one", "completion": "yes"}']))
    reason = "holds half of a surrogate pair; the step encoding would replace it"
    for kind in ("demonstrations", "prompts"):
        loaded = [load_rows(file, split, kind=kind) for split in ("train", "validation")]  # type: ignore[arg-type]
        assert sum(len(of.rows) for of in loaded) == 40 and loaded[0].dropped == {reason: 1}


@pytest.mark.parametrize("column", ["completion", "note", "system"])
def test_half_a_surrogate_pair_in_any_column(tmp_path: Path, column: str) -> None:
    """Catches: a traceback of the table that rows are kept in, or of the tokenizer, for a column beside the texts."""
    rows = [{"system": "Be brief.", "note": "n", "prompt": f"q {i}", "completion": "yes"} for i in range(40)]
    rows[7][column] = "half \ud83d"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = [load_rows(file, split, kind="demonstrations") for split in ("train", "validation")]
    assert sum(len(of.rows) for of in loaded) == 39 and list(loaded[0].dropped.values()) == [1]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_encodings(tmp_path: Path, encoding: str, ending: str) -> None:
    """Catches: UTF-32 taken for UTF-16, whose mark begins like its own, and characters taken for the ends of lines."""
    value = "é你\u2028a\u0085b\x1cc\x0bd\x0ce😀"
    rows = [{"prompt": value, "completion": "x"}, {"prompt": "b", "completion": "y"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    if ending == ".json":
        content = json.dumps(rows, ensure_ascii=False)
    elif ending == ".csv":
        content = f"prompt,completion\r\n{value},x\r\nb,y\r\n"
    file = tmp_path / f"rows{ending}"
    file.write_bytes((("\ufeff" if encoding.endswith("be") else "") + content).encode(encoding))
    assert [line.value for line in read_file(file)] == rows
    packed = tmp_path / f"rows{ending}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert [line.value for line in read_file(packed)] == rows


def test_csv_with_newlines_and_quotes(tmp_path: Path) -> None:
    """Catches: a cell cut at a newline in it, a doubled quote, and a quote that swallows the rest of the file."""
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\n"a\nb,""c""\r\n",d\n\ne,"f"\n', newline="")
    assert [line.value for line in read_file(file)] == [
        {"prompt": 'a\nb,"c"\r\n', "completion": "d"},
        {"prompt": "e", "completion": "f"},
    ]
    for open_quote, row in (('a,b\nc,"d\ne,f\n', 2), ('a,"', 1)):
        file.write_text("prompt,completion\n" + open_quote)
        with pytest.raises(UserError, match=f"a quote in row {row} is not closed"):
            list(read_file(file))
    file.write_text('prompt,"completion\na,b\n')
    with pytest.raises(UserError, match="a quote in row 0 is not closed"):
        list(read_file(file))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"prompt": "a\0"}\n', "byte 14 of the line is zero"),
        ("a.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "not UTF-8 (byte 13 of the line)"),
        ("a.csv", b"prompt\nab\0\n", "a zero byte (character 3 of 'prompt')"),
        ("a.csv", "prompt\nabé\n".encode("latin-1"), "not UTF-8 (character 3 of 'prompt')"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    """Catches: a row read with something else in its place, or named without the place."""
    (tmp_path / name).write_bytes(content)
    assert [problem in line.problem for line in read_file(tmp_path / name)] == [True]


def test_latin1_in_a_json_array(tmp_path: Path) -> None:
    """Catches: the parser's words, which name no place."""
    file = tmp_path / "a.json"
    file.write_bytes('[{"prompt": "a"},\n {"prompt": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"a.json is not UTF-8: line 2, byte 14 \(0xe9, 'é' in Latin-1\)"):
        list(read_file(file))


def test_stages_and_rows_need_neither_ijson_nor_plotly(tmp_path: Path, write_jsonl: Write) -> None:
    """A GPU machine without a network lacks them; only a .json file and a page with charts need them."""
    file = write_jsonl(demonstrations(3))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['ijson', 'plotly']))\n"
        "import rlhf.pipeline, rlhf.stages.pretrain\n"
        "from rlhf.data_prep.load import load_rows\n"
        f"print(len(load_rows({str(file)!r}, 'train', kind='demonstrations').rows))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 1
