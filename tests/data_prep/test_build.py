"""The whole way through: TRL's formats, accounts that add up, the same bytes again, nothing half-written, fingerprints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prepared import Built, pairs, text

from rlhf.base.errors import UserError
from rlhf.config import build as build_config
from rlhf.data_prep import DataConfig, ReviewsConfig, Source, prepare, read_recipe
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.prepare import build as build_module
from rlhf.data_prep.prepare.card import fingerprint
from rlhf.data_prep.prepare.recipe import Options, parse_recipe
from rlhf.stages.data import describe_data

Build = Callable[..., Built]
Write = Callable[..., Path]


def mixed_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pairs(80)
    rows += [
        {"prompt": text(5000 + 5 * i), "responses": [text(5000 + 5 * i + k) for k in (1, 2, 3)], "ratings": [3, 1, 2]}
        for i in range(40)
    ]
    rows += [{"prompt": text(9000 + i), "completion": text(9500 + i)} for i in range(40)]
    return [*rows, rows[0], {"prompt": "<|im_end|>"}, {"prompt": ""}]


def test_formats_are_trls(build_data: Build) -> None:
    """Catches: a column renamed, a text where TRL wants messages, a ranking without its ratings; and rows that this project's
    own stages read otherwise than they were written."""
    built = build_data(mixed_rows(), stages="shared", validation_share=0.2)
    turn = [{"role": "user", "content": str}]
    columns = {kind: set(built.rows(kind)[0]) for kind in ("demonstrations", "comparisons", "prompts")}
    assert columns == {
        "demonstrations": {"messages", "source", "id"},
        "comparisons": {
            "prompt",
            "responses",
            "ratings",
            "ranks",
            "raters",
            "rater_ratings",
            "confidence",
            "source",
            "id",
        },
        "prompts": {"prompt", "source", "id"},
    }
    row = next(r for r in built.rows("comparisons") if len(r["responses"]) == 3)
    assert [[m["role"] for m in row["prompt"]], [m["role"] for m in row["responses"][0]]] == [["user"], ["assistant"]]
    assert dict(zip(row["ratings"], row["ranks"], strict=True)) == {3: 1, 2: 2, 1: 3} and len(turn) == 1
    for kind in ("demonstrations", "comparisons", "prompts"):
        loaded = load_rows(built.folder, "train", kind=kind)  # type: ignore[arg-type]
        assert len(loaded.rows) == built.card["rows"][f"{kind}/train"] and loaded.dropped == {}
        assert loaded.prepared == built.card["fingerprint"]


def test_the_best_response_is_the_demonstration(build_data: Build) -> None:
    """Catches: the first, or the worst, of a ranking taught as the example to follow."""
    rows = [
        {"prompt": text(5 * i), "responses": [text(5 * i + k) for k in (1, 2, 3)], "ratings": [1, 3, 2]}
        for i in range(40)
    ]
    built = build_data(rows, stages="shared", validation_share=0.3)
    taught = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in built.rows("demonstrations")}
    assert taught == {text(5 * i): text(5 * i + 2) for i in range(40)}


def test_accounts_add_up(build_data: Build) -> None:
    """Catches: a row that is neither used nor left out with a reason."""
    built = build_data(mixed_rows(), validation_share=0.2)
    card = built.card
    counted = sum(drop["count"] for step in card["steps"].values() for drop in step["dropped"].values())
    assert card["rows_read"] == 163 == card["records_used"] + counted
    assert counted == len(built.rejected)
    assert sum(card["rows"].values()) == card["records_used"]
    text_of = (built.folder / "card.md").read_text()
    for reason in ("copy of an earlier row", "holds the mark '<|im_end|>' of a template", "empty prompt"):
        assert reason.replace("|", "\\|") in text_of and any(bad["reason"] == reason for bad in built.rejected)
    for name, count in card["rows"].items():
        assert pq.read_metadata(built.folder / f"{name}.parquet").num_rows == count
        assert f"| {name} | {count:,} |" in text_of
    assert card["lengths"]["prompts/train"]["prompt_characters"]["max"] > 50
    assert card["sources"][0]["licence"] == "not stated" and len(card["sources"][0]["files"]["rows.jsonl"]) == 64


def test_same_recipe_same_bytes(tmp_path: Path, write_jsonl: Write, build_data: Build) -> None:
    """Catches: an order that depends on hashes of this process, a date or a path in the files."""
    file = write_jsonl(mixed_rows())
    elsewhere = tmp_path / "in" / "deep" / "down" / file.name
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(file, elsewhere)
    made = [
        build_data(None, Source(path=str(place)), folder=folder, validation_share=0.2)
        for place, folder in ((file, "a"), (elsewhere, "b"))
    ]
    names = sorted(str(p.relative_to(made[0].folder)) for p in made[0].folder.rglob("*") if p.is_file())
    assert len(names) == 12
    for name in names:
        assert (made[0].folder / name).read_bytes() == (made[1].folder / name).read_bytes(), name


def test_fingerprint_follows_rows_recipe_and_libraries(build_data: Build) -> None:
    """Catches: a fingerprint that stays when one of its three parts changes."""
    base = build_data(mixed_rows(), validation_share=0.2).card
    option = build_data(mixed_rows(), folder="b", validation_share=0.2, max_row_megabytes=2.0).card
    rows = build_data(mixed_rows()[:-3], folder="c", validation_share=0.2).card
    assert len({card["fingerprint"] for card in (base, option, rows)}) == 3
    assert base["row_hashes"] == option["row_hashes"]
    again = fingerprint(base["recipe"], base["libraries"], base["row_hashes"])
    assert again == base["fingerprint"]
    assert fingerprint(base["recipe"], {**base["libraries"], "ftfy": "0"}, base["row_hashes"]) != again


def test_fingerprint_reaches_the_manifest(build_data: Build) -> None:
    """Catches: a model of which nobody can tell the data card; and a file that was changed behind its card's back."""
    built = build_data(mixed_rows(), validation_share=0.2)
    sets = {split: load_rows(built.folder, split, kind="comparisons") for split in ("train", "validation")}
    described = describe_data(sets)
    assert described["prepared"] == dict.fromkeys(("train", "validation"), built.card["fingerprint"])
    train, validation = (built.folder / "comparisons" / f"{s}.parquet" for s in ("train", "validation"))
    shutil.copy(validation, train)
    with pytest.raises(UserError, match=r"comparisons/train.parquet is not what its card .* was written for"):
        load_rows(built.folder, "train", kind="comparisons")
    (built.folder / "card.json").unlink()
    assert load_rows(built.folder, "train", kind="comparisons").prepared is None


def test_a_second_run_skips_and_other_inputs_build_again(write_jsonl: Write, build_data: Build, capsys: Any) -> None:
    """Catches: every pipeline run preparing anew; or data of an older file taken for that of the new one."""
    source = Source(path=str(write_jsonl(mixed_rows())))
    first = build_data(None, source, validation_share=0.2)
    stamp = (first.folder / "card.json").stat().st_mtime_ns
    assert build_data(None, source, validation_share=0.2).card == first.card
    assert "is up to date" in capsys.readouterr().err
    assert (first.folder / "card.json").stat().st_mtime_ns == stamp
    write_jsonl(mixed_rows()[1:])
    assert build_data(None, source, validation_share=0.2).card["rows_read"] == 162
    damaged = first.folder / "prompts" / "train.parquet"
    damaged.write_bytes(b"x")
    build_data(None, source, validation_share=0.2)
    assert pq.read_metadata(damaged).num_rows > 0


@pytest.mark.parametrize("where", ["write_sets", "gate", "render"])
def test_interrupted_build_leaves_what_was_there(
    build_data: Build, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Catches: Ctrl-C that leaves half a folder, a scratch file, or no folder where there was one."""
    built = build_data(mixed_rows(), validation_share=0.2)
    before = {p: p.read_bytes() for p in built.folder.rglob("*") if p.is_file()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_data(mixed_rows(), validation_share=0.2, seed=1)
    assert {p: p.read_bytes() for p in built.folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in built.folder.parent.iterdir()) == ["cache", "in", "out"]


def test_a_full_disk_leaves_what_was_there(build_data: Build) -> None:
    """Catches: half a Parquet file published because writing failed quietly."""
    import resource

    built = build_data(mixed_rows(), validation_share=0.2)
    before = {p: p.read_bytes() for p in built.folder.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError):
            build_data(None, Source(path=str(built.folder.parent / "in" / "rows.jsonl")), validation_share=0.2, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in built.folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in built.folder.parent.iterdir()) == ["cache", "in", "out"]


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, build_data: Build) -> None:
    """Catches: `output_dir: .` that deletes the user's work."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        build_data(mixed_rows(), validation_share=0.2)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


# Recipes


def test_recipe_in_yaml(tmp_path: Path, write_jsonl: Write) -> None:
    """Catches: a mapping of columns, a list or a bare path that is read wrongly; the command line not winning."""
    file = tmp_path / "data.yaml"
    file.write_text(
        f"sources:\n  - {write_jsonl(pairs(3))}\n  - path: b.jsonl\n    columns: {{prompt: q, completion: a.text}}\n"
        "    weight: 2\nseed: 4\nclean: [encoding, html]\n"
    )
    config = parse_recipe(["--config", str(file), "--seed", "5", "--stage_weights", "1", "2", "3"])
    assert isinstance(config, DataConfig)
    assert (config.seed, config.clean, config.stage_weights) == (5, ["encoding", "html"], [1, 2, 3])
    assert [source.name for source in config.sources] == ["rows.jsonl", "b.jsonl"]
    assert config.sources[1].column_map == {"prompt": "q", "completion": "a.text"} and config.sources[1].weight == 2
    assert isinstance(parse_recipe([]), ReviewsConfig)
    with pytest.raises(UserError, match=r"unknown option --sead \(did you mean 'seed'\?\)"):
        parse_recipe(["--config", str(file), "--sead", "5"])
    with pytest.raises(UserError, match="sources cannot be given on the command line"):
        parse_recipe(["--config", str(file), "--sources", "x"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "no sources: list at least one"),
        ({"sources": "a.jsonl"}, "data.yaml: 'sources' must be a list"),
        ({"sources": [3]}, "data.yaml, source 1: must be a path, or a mapping"),
        (
            {"sources": [{"path": "a", "raeder": "x"}]},
            r"data.yaml, source 1: unknown key 'raeder' \(did you mean 'reader'",
        ),
        ({"sources": ["a/x.jsonl", "b/x.jsonl"]}, "two sources are called 'x.jsonl'; give them a name"),
        ({"sources": [{"path": "a", "uses": ["prompt"]}]}, r"no kind 'prompt' \(did you mean 'prompts'"),
        ({"sources": [{"path": "a", "weight": 0}]}, "weight of a must be above 0"),
        ({"sources": [{"path": "a", "columns": ["prompt"]}]}, "columns of a: write OURS=THEIRS"),
        ({"sources": ["a"], "clean": ["encodign"]}, r"clean: no step 'encodign' \(did you mean 'encoding'"),
        ({"sources": ["a"], "clean": ["simplified", "traditional"]}, "choose one of simplified and traditional"),
        ({"sources": ["a"], "max_prompt_length": 100}, "a length limit in tokens needs a tokenizer"),
        ({"sources": ["a"], "validation_share": 0}, "validation_share must be above 0"),
        ({"sources": ["a"], "validation_share": 0.6, "test_share": 0.5}, "leave nothing to train on"),
        ({"sources": ["a"], "similarity": 0.1}, "similarity must be between 0.3 and 1, got 0.1"),
        ({"sources": ["a"], "stage_weights": [1, 2]}, "stage_weights must be three numbers"),
        ({"sources": ["a"], "split_by": "moon"}, "invalid choice: 'moon'"),
        ({"sources": ["a"], "simularity": 0.5}, r"unknown key 'simularity' \(did you mean 'similarity'"),
    ],
)
def test_bad_recipes(values: dict[str, Any], message: str) -> None:
    """Catches: an impossible option that is found out after an hour of reading, or never."""
    with pytest.raises(UserError, match=message):
        read_recipe(values, "data.yaml")


def test_defaults_are_valid_and_in_python(write_jsonl: Write, tmp_path: Path) -> None:
    """Catches: a function that needs a file; a default that its own check refuses."""
    assert build_config(Options, {}, "x") == Options()
    folder = prepare(DataConfig(sources=[Source(path=str(write_jsonl(pairs(400))))], output_dir=str(tmp_path / "out")))
    assert json.loads((folder / "card.json").read_text())["records_used"] == 400
