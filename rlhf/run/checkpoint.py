"""Checkpoints: written under another name, synced, and renamed into place; safetensors and JSON only.

Each holds the sha256 of its files, which are compared when they are read. The last two are kept. Snapshots are in the same
folder: the policy's adapter alone, all of them kept, for the reward-KL frontier.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.base.reading import fit

_NUM_KEPT = 2
CHECKSUMS = "checksums.json"
"""File with the sha256 of the others by name; checkpoints of versions before it have none."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    texts: Mapping[str, str] | None = None,
    keep: Path | None = None,
) -> Path:
    """Write `folder/checkpoint-STEP` with one safetensors file for each group of tensors, and `state.json`; return its path.

    Tensors are cloned: the optimiser states of bitsandbytes share their quantisation maps, which safetensors refuses.

    Args:
        texts: further files, by name.
        keep: an older checkpoint that is kept as well as the last two.

    Raises:
        UserError: the disk is full or gone, or the folder cannot be written; earlier checkpoints are untouched.
    """

    def write(partial: Path) -> None:
        for name, group in tensors.items():
            save_file(
                {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in group.items()},
                partial / f"{name}.safetensors",
            )
        for name, text in {**(texts or {}), "state.json": json.dumps({**state, "step": step})}.items():
            (partial / name).write_text(text, encoding="utf-8")

    target = _write_folder(folder, f"checkpoint-{step}", write)
    prune(folder, keep)
    return target


def prune(folder: Path, keep: Path | None = None) -> None:
    """Remove all checkpoints but the last two and `keep`; a run that was killed may have left one more."""
    for old in _checkpoints(folder)[:-_NUM_KEPT]:
        if old != keep:
            with contextlib.suppress(OSError):  # one too many is no failure
                _remove(old)


def save_snapshot(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write `folder/snapshot-STEP`, whose files `write` puts into the folder it is called with; raises the errors of `save`."""
    return _write_folder(folder, f"snapshot-{step}", write)


def snapshots(folder: Path) -> dict[int, Path]:
    """Return the complete snapshots by step, in increasing order."""
    paths = sorted((path for path in folder.glob("snapshot-*") if path.is_dir()), key=_step)
    return {_step(path): path for path in paths}


def _write_folder(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Write `folder/NAME` as a whole or not at all; an older one stays until the new one is complete."""
    target, partial = folder / name, folder / f".partial-{name}"
    try:
        clear(folder)
        partial.mkdir(parents=True)
        write(partial)
        checksums = {file.relative_to(partial).as_posix(): storage.sha256_file(file) for file in _files(partial)}
        (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
        storage.sync(*partial.iterdir(), partial)
        _replace(partial, target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or storage.is_failure(error):
            raise not_written(target, error) from error
        raise
    return target


def _replace(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".replaced-{target.name}")
    if target.exists():
        target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    storage.sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a folder, renamed first: a deletion killed half-way must not leave what looks like a checkpoint."""
    removed = path.with_name(f".removed-{path.name}")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what killed processes left half-written or half-deleted, and put back what they had moved aside."""
    for path in folder.glob(".replaced-*"):
        target = folder / path.name.removeprefix(".replaced-")
        if not target.exists():
            path.rename(target)
    for pattern in (".partial-*", ".replaced-*", ".removed-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def not_written(target: Path, error: Exception) -> UserError:
    """Return the error about a checkpoint that could not be written."""
    return UserError(
        f"cannot write checkpoint {target} ({storage.free(target)}): {storage.reason(error)}; "
        "what was saved before is intact: mend the disk or free some space, then --resume true"
    )


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(_checkpoints(folder)), None)


def last_before(folder: Path, step: int) -> Path | None:
    """Return the newest complete checkpoint of a step below `step`, or None."""
    return next((path for path in reversed(_checkpoints(folder)) if _step(path) < step), None)


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints and snapshots of later steps."""
    for path in (*_checkpoints(folder), *snapshots(folder).values()):
        if _step(path) > step:
            _remove(path)


class OptimizerSettings(TypedDict):
    """The part of an optimiser's state that is no tensor."""

    state: dict[str, dict[str, Any]]
    param_groups: list[dict[str, Any]]


def load(path: Path, kind: Any = dict[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors by group, and the state of this kind, that `save` wrote."""
    state = load_state(path, kind)
    return {file.stem: load_tensors(path, file.stem) for file in sorted(path.glob("*.safetensors"))}, state


def load_tensors(path: Path, group: str) -> dict[str, Tensor]:
    """Return one group of the tensors that `save` wrote."""
    file = f"{group}.safetensors"
    verify(path, [file])
    try:
        return load_file(path / file)
    except Exception as error:
        raise _damaged(path, error) from error


def load_state(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """Return the state of this kind that `save` wrote, and its `step`, after verifying all files but the tensors."""
    verify(path, [file.name for file in _files(path) if file.suffix != ".safetensors"])
    try:
        state = read_object(path / "state.json")
    except (OSError, UserError) as error:
        raise _damaged(path, error) from error
    if problems := fit(state, kind)[1]:
        raise _damaged(path, UserError(f"state.json: {problems[0]}"))
    return state


def verify(path: Path, names: Sequence[str] | None = None) -> None:
    """Raise `UserError` unless a checkpoint or snapshot has all its files, and those of these names are unchanged.

    Args:
        names: paths relative to the folder; None for all.
    """
    if not (path / CHECKSUMS).exists():  # of a version before there were any
        return
    try:
        checksums, present = read_object(path / CHECKSUMS), {file.relative_to(path).as_posix() for file in _files(path)}
        if differing := sorted(present ^ checksums.keys()):
            raise ValueError(f"{differing[0]} is {'not listed' if differing[0] in present else 'missing'}")
        for name in sorted(present) if names is None else names:
            if name != CHECKSUMS and storage.sha256_file(path / name) != checksums[name]:
                raise ValueError(f"the sha256 of {name} is not the one in {CHECKSUMS}")
    except (OSError, UserError, ValueError) as error:
        raise _damaged(path, error) from error


def _files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint or snapshot, without their checksums."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error}); delete it to resume from the one before")


def pack_generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of Python's, numpy's and torch's random generators: tensors, and the rest for JSON."""
    version, words, python_gauss = random.getstate()
    name, keys, *numpy_rest = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, python_gauss], "numpy": [name, *numpy_rest]}


def unpack_generators(tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Set the random generators to what `pack_generators` returned."""
    version, python_gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    name, *numpy_rest = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state: tensors by path, and the rest for JSON; bitsandbytes nests 8-bit states one level deeper."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}

    def strip(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return None
        if isinstance(node, dict):
            return {str(key): strip(value, f"{path}/{key}" if path else str(key)) for key, value in node.items()}
        return node

    return tensors, {"state": strip(state["state"], ""), "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Set an optimiser to what `pack_optimizer` returned."""
    state = {int(index): entries for index, entries in rest["state"].items()}
    for path, tensor in tensors.items():
        index, *keys = path.split("/")
        node = state[int(index)]
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = tensor
    groups = [{**g, "betas": tuple(g["betas"])} for g in rest["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("checkpoint-*") if (path / "state.json").is_file()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
