"""Checkpoints: whole or not there, the last two, and optimiser states that come back byte for byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.run import checkpoint
from rlhf.run.optim import forget_overrides


def save(folder: Path, step: int, value: float | None = None) -> Path:
    weights = {"a": torch.full((3,), float(step if value is None else value)), "b": torch.arange(4.0)}
    return checkpoint.save(folder, step, {"weights": weights, "optimizer": {}}, {"note": f"step {step}"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Catches: a type or shape that changes on the way, groups that are mixed up, and tensors that share memory (safetensors
    refuses those; bitsandbytes' states have them)."""
    shared = torch.randn(4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "weights": {"a": shared, "b": shared, "view": torch.arange(6).reshape(2, 3).T, "bf16": shared.bfloat16()},
        "optimizer": {"0/step": torch.tensor(3), "0/codes": torch.tensor([0, 255], dtype=torch.uint8)},
    }
    path = checkpoint.save(tmp_path / "new" / "folder", 7, tensors, {"recipe": {"lr": 0.1, "name": None}})
    assert path == checkpoint.latest(tmp_path / "new" / "folder")
    loaded, state = checkpoint.load(path)
    assert state == {"recipe": {"lr": 0.1, "name": None}, "step": 7}
    assert loaded.keys() == tensors.keys()
    for group, entries in tensors.items():
        assert loaded[group].keys() == entries.keys()
        for name, tensor in entries.items():
            assert loaded[group][name].dtype == tensor.dtype and torch.equal(loaded[group][name], tensor)


def test_the_last_two_are_kept_and_counted_as_numbers(tmp_path: Path) -> None:
    """Catches: a disk that fills with checkpoints, and sorting by name, where 9 comes after 10."""
    assert checkpoint.latest(tmp_path) is None
    for step in (8, 9, 10, 11):
        path = save(tmp_path, step)
        assert checkpoint.latest(tmp_path) == path
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """Catches: a rename that fails because the folder is there, and files of both versions side by side."""
    save(tmp_path, 3, value=1.0)
    (tmp_path / "checkpoint-3" / "old.safetensors").write_bytes(b"")
    save(tmp_path, 3, value=2.0)
    tensors, _ = checkpoint.load(tmp_path / "checkpoint-3")
    assert tensors["weights"]["a"].tolist() == [2.0] * 3 and tensors.keys() == {"weights", "optimizer"}


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    """Catches: resuming from what a killed process left behind."""
    save(tmp_path, 2)
    for name in (".partial-4", "checkpoint-4"):  # killed while writing; and one of a copy that was cut off
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"
    save(tmp_path, 4)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-4"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert checkpoint.load(tmp_path / "checkpoint-4")[0]["weights"]["a"].tolist() == [4.0] * 3


@pytest.mark.parametrize("file", ["state.json", "weights.safetensors"])
def test_a_damaged_checkpoint_is_one_clear_line(file: str, tmp_path: Path) -> None:
    """Catches: a traceback, or a silent start from the beginning, when a file was cut."""
    path = save(tmp_path, 2)
    (path / file).write_bytes((path / file).read_bytes()[:20])
    with pytest.raises(UserError, match=r"checkpoint-2.*delete it"):
        checkpoint.load(path)


def test_no_flipped_bit_is_resumed_from(tmp_path: Path) -> None:
    """Catches: a bit that changed in weights, optimiser states, random states, the trainer's account or the checksums
    themselves, from which a run would go on and register its result."""
    texts = {"trainer_state.json": json.dumps({"global_step": 2, "log_history": [{"loss": 1.5}]})}
    groups = {name: {"a": torch.arange(64.0)} for name in ("weights", "optimizer", "generators")}
    path = checkpoint.save(tmp_path, 2, groups, {"scheduler": {"last_epoch": 2}}, texts=texts)
    checkpoint.load(path)
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(40):
            place = draw.randrange(len(original))
            file.write_bytes(
                original[:place] + bytes([original[place] ^ 1 << draw.randrange(8)]) + original[place + 1 :]
            )
            with pytest.raises(UserError, match=r"checkpoint-2 cannot be read .*delete it"):
                checkpoint.load(path)
        file.write_bytes(original)
    checkpoint.load(path)


@pytest.mark.parametrize("file", ["weights.safetensors", "trainer_state.json"])
def test_a_file_that_is_missing_or_new_is_found(file: str, tmp_path: Path) -> None:
    """Catches: a group of tensors that was lost and would stay at its fresh values, and one that somebody put there."""
    path = checkpoint.save(tmp_path, 2, {"weights": {"a": torch.ones(3)}}, {}, texts={"trainer_state.json": "{}"})
    moved = (path / file).rename(tmp_path / file)
    with pytest.raises(UserError, match=f"{file} is missing"):
        checkpoint.load(path)
    moved.rename(path / file)
    (path / f"more-{file}").write_bytes((path / file).read_bytes())
    with pytest.raises(UserError, match=f"more-{file} is not listed"):
        checkpoint.load(path)


def test_a_checkpoint_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Catches: a run that was stopped before an update of this package and cannot go on after it."""
    path = save(tmp_path, 2)
    (path / "checksums.json").unlink()
    assert checkpoint.load(path)[1] == {"note": "step 2", "step": 2}


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("fails_at", ["weights", "optimizer", "state.json", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    fails_at: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a good checkpoint removed before the new one is whole, a half-written one left in its place, and a traceback.
    The step may be one that is there already (a resumed run saves it again)."""
    save(tmp_path, 1)
    good = save(tmp_path, 2)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    write, write_text = checkpoint.save_file, Path.write_text

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        if Path(path).stem == fails_at:
            Path(path).write_bytes(b"half")
            raise full
        write(tensors, path)

    def failing_write_text(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == fails_at:
            raise full
        return write_text(self, *args, **kwargs)

    def rename(self: Path, target: Path) -> Path:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        patch.setattr(Path, "write_text", failing_write_text)
        if fails_at == "rename":
            patch.setattr(Path, "rename", rename)
        with pytest.raises(UserError, match=r"No space left.*then --resume"):
            save(tmp_path, step)
    assert checkpoint.latest(tmp_path) == good
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    """Catches: a bug in the caller reported as a disk that is full, which nobody will find."""
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, {}, {"state": object()})
    assert checkpoint.latest(tmp_path) is None and names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EROFS, errno.EACCES])
def test_a_drive_that_is_gone(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a traceback, or a second error from asking the drive for its free space, when a network drive vanishes or
    turns read-only."""
    good = save(tmp_path, 1)

    def gone(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", gone)
        patch.setattr(shutil, "disk_usage", gone)
        with pytest.raises(UserError, match=rf"checkpoint-2.*{os.strerror(number)}.*saved before is intact"):
            save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == good and names(tmp_path) == ["checkpoint-1"]


def test_all_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a rename that overtakes the data, so that a power cut leaves a checkpoint of empty files."""
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(storage, "sync", lambda *paths: events.extend(f"sync {path.name}" for path in paths))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"rename {self.name}"), rename(self, to))[1])
    save(tmp_path, 1)
    files = ["weights.safetensors", "optimizer.safetensors", "state.json", "checksums.json", ".partial-checkpoint-1"]
    assert sorted(events[:5]) == sorted(f"sync {file}" for file in files)
    assert events[5:] == ["rename .partial-checkpoint-1", f"sync {tmp_path.name}"]


def test_killed_between_two_renames(tmp_path: Path) -> None:
    """Catches: the only checkpoint lost while it was being replaced, and half-deleted ones taken for whole."""
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".replaced-checkpoint-1")
    (tmp_path / ".removed-0").mkdir()
    assert checkpoint.latest(tmp_path) is None
    checkpoint.clear(tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1" and names(tmp_path) == ["checkpoint-1"]


def test_deleting_starts_with_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a deletion that is killed half-way and leaves a checkpoint without its weights as the one to go back to."""
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before the first file
    save(tmp_path, 3)
    assert checkpoint.last_before(tmp_path, 2) is None
    assert names(tmp_path) == [".removed-checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_one_more_is_kept_when_asked_for(tmp_path: Path) -> None:
    """Catches: the best checkpoint deleted because it is old."""
    best = save(tmp_path, 1)
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, {}, {}, keep=best, texts={"note.json": str(step)})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "note.json").read_text() == "4"


def test_one_too_many_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    """Catches: a checkpoint left for ever by a run that was killed before it removed it and was finished otherwise."""
    for step in (1, 2, 3):
        shutil.copytree(save(tmp_path / str(step), step), tmp_path / f"checkpoint-{step}")
    checkpoint.prune(tmp_path, tmp_path / "checkpoint-1")
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]
    checkpoint.prune(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]


def test_random_generators_come_back(tmp_path: Path) -> None:
    """Catches: a generator left out, or one whose state changes on its way through JSON: dropout would draw other numbers."""

    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), np.random.randn(), float(torch.rand(()))]

    draws()  # an odd number of normal draws: their generators keep one in hand
    tensors, rest = checkpoint.pack_generators()
    path = checkpoint.save(tmp_path, 1, {"generators": tensors}, {"generators": rest})
    expected = draws()
    loaded, state = checkpoint.load(path)
    checkpoint.unpack_generators(loaded["generators"], state["generators"])
    assert draws() == expected


# ---- optimisers -----------------------------------------------------------------------------------------------------


def parameters() -> list[torch.nn.Parameter]:
    """One large enough for 8-bit states, one too small."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (5,))]


def optimizer(kind: str, of: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": of[:1]}, {"params": of[1:], "lr": 3e-2}]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if kind == "adamw_8bit":
        forget_overrides()  # of tests before this one
        return bitsandbytes.optim.AdamW8bit(groups, min_8bit_size=4096, **settings)
    return torch.optim.AdamW(groups, **settings)


def train(of: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in of:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by path."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else None
    if items is None:
        return {path: node}
    return {k: v for key, child in items for k, v in flat(child, f"{path}/{key}").items()}


@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw_torch"])
def test_optimiser_states_come_back_byte_for_byte(kind: str, tmp_path: Path) -> None:
    """Catches: 8-bit codes cast to float by `load_state_dict`, scales or maps left behind, a step count that restarts
    (Adam's bias correction), and groups that lose their own step size."""
    one = parameters()
    first = optimizer(kind, one)
    train(one, first, range(3))
    tensors, rest = checkpoint.pack_optimizer(first)
    assert (torch.uint8 in {t.dtype for t in tensors.values()}) == (kind == "adamw_8bit")
    path = checkpoint.save(tmp_path, 3, {"optimizer": tensors}, {"optimizer": rest})
    json.loads((path / "state.json").read_text())
    loaded, state = checkpoint.load(path)

    two = parameters()
    for parameter, source in zip(two, one, strict=True):
        parameter.data.copy_(source.data)
    second = optimizer(kind, two)
    checkpoint.unpack_optimizer(second, loaded["optimizer"], state["optimizer"])
    expected, got = flat(first.state_dict()), flat(second.state_dict())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
        else:
            assert got[name] == value, name
    train(one, first, range(3, 6))
    train(two, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_snapshots_are_all_kept_beside_the_checkpoints(tmp_path: Path) -> None:
    """Catches: snapshots that are cleared away with old checkpoints or taken for one, sorted by name (10 before 9), left there
    half, or left behind when the run goes back to before them."""

    def write(folder: Path) -> None:
        (folder / "adapter.json").write_text("{}")

    def fail(folder: Path) -> None:
        write(folder)
        raise ZeroDivisionError

    for step in (8, 9, 10, 11):
        save(tmp_path, step)
        checkpoint.save_snapshot(tmp_path, step, write)
    checkpoint.save_snapshot(tmp_path, 9, write)  # once more, as a resumed run does
    with pytest.raises(ZeroDivisionError):
        checkpoint.save_snapshot(tmp_path, 12, fail)
    assert list(checkpoint.snapshots(tmp_path)) == [8, 9, 10, 11]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-11"
    assert names(checkpoint.snapshots(tmp_path)[9]) == ["adapter.json", "checksums.json"]
    checkpoint.discard_after(tmp_path, 9)
    assert names(tmp_path) == ["snapshot-8", "snapshot-9"]
