"""A registered artefact, made again from its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import Call

from rlhf.registry import Registry
from rlhf.sharing.reproduce import replayed_config


def test_the_whole_chain_comes_out_the_same(
    finished: tuple[Path, Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Files that hold the time, an order of a set, or anything else that no option decides; a replay with other options."""
    into = tmp_path / "again"
    done = call(
        "rlhf.sharing.__main__", "reproduce", "ppo/toy", "--ancestors", "--into", into, "--registry", finished[0]
    )
    assert done.code == 0, done.err[-3000:] + done.out[-2000:]
    assert [line for line in done.out.splitlines() if line.startswith(("same", "DIFFERS"))] == [
        f"same  {stage}/toy@1" for stage in ("sft", "reward", "ppo")
    ]
    original, made = (Registry(root).get("ppo/toy") for root in (finished[0], into / "ppo-toy-1" / "registry"))
    assert made.manifest.files == original.manifest.files and made.manifest.recipe == original.manifest.recipe
    assert made.path != original.path and made.manifest.created >= original.manifest.created


def test_data_that_changed_are_refused_before_the_training(
    finished: tuple[Path, Path],
    toy_data: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of training on other data, and then the news that the hashes differ."""
    registry = tmp_path / "registry"
    shutil.copytree(finished[0], registry)
    artifact = Registry(registry).read("sft/toy")
    assert Path(artifact.manifest.config["dataset"]) == toy_data
    rows = toy_data / "demonstrations" / "train.jsonl"
    before = rows.read_text()
    try:
        rows.write_text(before + json.dumps(json.loads(before.splitlines()[0])) + "\n")
        complaint = call(
            "rlhf.sharing.__main__", "reproduce", "sft/toy", "--into", tmp_path / "x", "--registry", registry
        ).complaint
    finally:
        rows.write_text(before)
    assert "fingerprint" in complaint and not (tmp_path / "x").exists()


def test_a_folder_with_something_in_it_is_not_written_into(
    finished: tuple[Path, Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """A replay that finds, and returns, the result of the replay before."""
    (tmp_path / "note.txt").write_text("mine")
    done = call("rlhf.sharing.__main__", "reproduce", "sft/toy", "--into", tmp_path, "--registry", finished[0])
    assert "not empty" in done.complaint


def test_only_places_change(finished: tuple[Path, Path]) -> None:
    """An option that the replay takes from its defaults in place of the record."""
    artifact = Registry(finished[0]).read("ppo/toy")
    config, recorded = replayed_config(artifact, Path("here")), artifact.manifest.config
    changed = {name for name, value in recorded.items() if getattr(config, name) != value}
    assert changed <= {"registry", "output_dir", "resume", "trackers", "wandb_group"}
    assert config.recipe() == type(config)(**recorded).recipe()
