"""Preflight, room: whether the checkpoints fit on the disk, and the training into memory."""

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
from rlhf.run.optim import MIN_8BIT_SIZE

#: Checkpoints on the disk at once: two that are kept, and the one that is being written.
_CHECKPOINTS = 3
#: Copies of the result: where it is written, and in the registry.
_RESULTS = 2
#: Logs, samples, tokenizer files, report.
_REST = 50_000_000


def parameter_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def optimizer_bytes(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> int:
    """Bytes of Adam's two moments of each parameter."""
    eight_bit = config.optim == "adamw_8bit"
    return sum(
        2 * p.numel() * (1 if eight_bit and p.numel() >= MIN_8BIT_SIZE else p.element_size()) for p in parameters
    )


def check_disk(parameters: Sequence[nn.Parameter], config: TrainingConfig, folder: Path, registry: Path) -> Check:
    """That checkpoints and result fit.

    Args:
        folder: of the run.
        registry: root of the registry, which may not exist yet.
    """
    weights = parameter_bytes(parameters)
    checkpoint = weights + optimizer_bytes(parameters, config)
    needs = {folder: _CHECKPOINTS * checkpoint + _RESULTS * weights + _REST, registry: weights}
    told: list[str] = []
    short = False
    for place, need in needs.items():
        existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        short = short or free < need
        told.append(f"{place} needs {_gb(need)} and has {_gb(free)} free")
    return Check(
        name="disk",
        passed=not short,
        measured="; ".join(told),
        cause=f"{_CHECKPOINTS} checkpoints of {_gb(checkpoint)} and the result do not fit",
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
    """That gradients, optimiser states and what one forward pass keeps for the backward fit beside what is loaded.

    Args:
        activations: bytes that a token keeps for the backward pass.
        tokens: of the largest forward pass.
        cache: bytes of keys and values while sampling, when there are no activations.
    """
    fixed = parameter_bytes(parameters) + optimizer_bytes(parameters, config)
    moving = max(int(activations * tokens), cache)
    free = memory.free_bytes(device)
    what = f"activations of {tokens:,} tokens" if moving > cache else "keys and values"
    return Check(
        name="memory",
        passed=fixed + moving <= free,
        measured=f"training takes {_gb(fixed + moving)} more ({_gb(moving)} of it {what}), {_gb(free)} are free",
        cause="a forward pass keeps more for its backward than there is room for",
        fix="lower the batch size of a forward pass (raise gradient_accumulation_steps as much), or set "
        "gradient_checkpointing; for keys and values, lower rollout_batch_size or response_length",
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


class ActivationMeter:
    """What forward passes keep for their backward passes.

    `peak` is the most that was alive at once, bytes. Tensors in the shape of a weight (copies in another type) are not
    counted: they do not grow with the tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, it counts."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda held: held.tensor):
            yield

    def _keep(self, tensor: Tensor) -> Any:
        held = _Held(tensor)
        if tensor.shape not in self.shapes:
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in self.alive:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            self.alive[key] = self.alive.get(key, 0) + 1
            weakref.finalize(held, self._release, key, storage.nbytes())
        return held

    def _release(self, key: int, size: int) -> None:
        self.alive[key] -= 1
        if not self.alive[key]:
            del self.alive[key]
            self.now -= size


class _Held:
    """A tensor that a graph keeps; the graph lets go of it once its backward pass is done."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
