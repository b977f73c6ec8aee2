"""Checkpoints of PPO: written beside, renamed into place, safetensors and JSON only; the last two are kept.

Snapshots lie beside them: the policy's adapter alone, small, and all of them kept, for the reward-KL frontier of a run.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import UserError

_KEEP = 2


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Writes `folder/checkpoint-STEP` with one safetensors file for each group of tensors, and `state.json`.

    Tensors are cloned: the optimiser states of bitsandbytes share their quantisation maps, which safetensors refuses.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """

    def write(partial: Path) -> None:
        for name, group in tensors.items():
            save_file(
                {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in group.items()},
                partial / f"{name}.safetensors",
            )
        (partial / "state.json").write_text(json.dumps({**state, "step": step}), encoding="utf-8")

    target = _put(folder, "checkpoint", step, write)
    for old in _all(folder)[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_snapshot(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Fills `folder/snapshot-STEP` with what `write` puts into the folder it is called with; errors as of `save`."""
    return _put(folder, "snapshot", step, write)


def snapshots(folder: Path) -> dict[int, Path]:
    """The complete snapshots by their step, in its order."""
    found = sorted((path for path in folder.glob("snapshot-*") if path.is_dir()), key=_step)
    return {_step(path): path for path in found}


def _put(folder: Path, kind: str, step: int, write: Callable[[Path], None]) -> Path:
    """Writes `folder/KIND-STEP` whole or not at all; what was there before is replaced."""
    target, partial = folder / f"{kind}-{step}", folder / f".partial-{step}"
    replaced = folder / f".replaced-{step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or is_storage_failure(error):
            raise not_written(target, error) from error
        raise
    return target


def is_storage_failure(error: Exception) -> bool:
    """Whether the system refused to write: an OSError of that kind, or what safetensors and torch.save make of it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    told = ("Error while serializing", "I/O error", "PytorchStreamWriter", "unexpected pos")
    return any(words in str(error) for words in told)


def not_written(target: Path, error: Exception) -> UserError:
    """The complaint about a checkpoint that could not be written."""
    free = shutil.disk_usage(next(p for p in target.absolute().parents if p.exists())).free / 1e9
    reason = str(error).splitlines()[0]
    return UserError(
        f"cannot write checkpoint {target} ({free:.1f} GB free): {reason}; free some space, then --resume true"
    )


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = _all(folder)
    return found[-1] if found else None


def last_before(folder: Path, step: int) -> Path | None:
    """The newest complete checkpoint of a step below `step`, or None."""
    found = [path for path in _all(folder) if _step(path) < step]
    return found[-1] if found else None


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints and snapshots of later steps."""
    for path in (*_all(folder), *snapshots(folder).values()):
        if _step(path) > step:
            shutil.rmtree(path)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` was given."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}, state
    except Exception as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}); delete it to resume from the one before"
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by path and a JSON-able rest. bitsandbytes nests its 8-bit states one level deeper."""
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
    """Puts back what `pack_optimizer` took."""
    state = {int(index): entries for index, entries in rest["state"].items()}
    for path, tensor in tensors.items():
        index, *keys = path.split("/")
        node = state[int(index)]
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = tensor
    groups = [{**g, "betas": tuple(g["betas"])} for g in rest["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if (p / "state.json").is_file()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
