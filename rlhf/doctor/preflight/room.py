"""Preflight, room: space on the disk for the checkpoints, and in memory for the training."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import TrainingConfig
from rlhf.doctor.preflight.check import Check
from rlhf.run import memory
from rlhf.run.optim import optimizer_bytes, parameter_bytes

#: Checkpoints on the disk at once: the last two, and the one that is being written.
CHECKPOINTS = 3
#: Copies of the result: where it is written, and in the registry.
RESULTS = 2
#: Bytes of logs, samples, tokenizer files and report.
OTHER_FILES = 50_000_000


def check_disk(parameters: Sequence[nn.Parameter], config: TrainingConfig, folder: Path, registry: Path) -> Check:
    """Check that checkpoints and result fit on the disk.

    Args:
        folder: of the run.
        registry: root of the registry, which may not exist yet.
    """
    weights = parameter_bytes(parameters)
    checkpoint = weights + optimizer_bytes(parameters, config)
    measured, fits = [], True
    for place, need in ((folder, CHECKPOINTS * checkpoint + RESULTS * weights + OTHER_FILES), (registry, weights)):
        existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        fits = fits and free >= need
        measured.append(f"{place} needs {_gigabytes(need)} and has {_gigabytes(free)} free")
    return Check(
        name="disk",
        passed=fits,
        measured="; ".join(measured),
        cause=f"{CHECKPOINTS} checkpoints of {_gigabytes(checkpoint)} and the result do not fit",
        fix="free some space, or move output_dir and registry to a larger disk",
    )


def check_memory(
    parameters: Sequence[nn.Parameter],
    config: TrainingConfig,
    device: torch.device,
    *,
    activations: float,
    tokens: int,
    cache: int = 0,
) -> Check:
    """Check that gradients, optimiser states and activations fit into memory beside what is loaded.

    Args:
        activations: bytes that a token keeps for the backward pass.
        tokens: of the largest forward pass.
        cache: bytes of keys and values while sampling, when there are no activations.
    """
    fixed = parameter_bytes(parameters) + optimizer_bytes(parameters, config)
    moving = max(int(activations * tokens), cache)
    free = memory.free_bytes(device)
    content = f"activations of {tokens:,} tokens" if moving > cache else "keys and values"
    return Check(
        name="memory",
        passed=fixed + moving <= free,
        measured=f"training takes {_gigabytes(fixed + moving)} more ({_gigabytes(moving)} of it {content}), "
        f"{_gigabytes(free)} are free",
        cause="a forward pass keeps more for its backward than there is room for",
        fix="lower the batch size of a forward pass (raise gradient_accumulation_steps as much), or set "
        "gradient_checkpointing; for keys and values, lower rollout_batch_size or response_length",
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


class ActivationMeter:
    """Counts the bytes that forward passes keep for their backward passes.

    `peak` is the most that was alive at once. Tensors in the shape of a weight (copies in another type) are not counted:
    they do not grow with the tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
        self.users: dict[int, int] = {}  # address of a storage -> tensors that use it
        self.now = self.peak = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the forward passes inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved.tensor):
            yield

    def _save(self, tensor: Tensor) -> Any:
        saved = _Saved(tensor)
        if tensor.shape not in self.shapes:
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in self.users:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            self.users[key] = self.users.get(key, 0) + 1
            weakref.finalize(saved, self._release, key, storage.nbytes())
        return saved

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


class _Saved:
    """A tensor in a graph, which drops it once its backward pass is done."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
