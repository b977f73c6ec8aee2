"""Several processes on one rollout (`torchrun --nproc_per_node N -m rlhf.stages.ppo ...`).

Each process samples a share of the rows and takes a share of the microbatches; sums over processes give all of them the whole
rollout and the whole gradient. All else is computed by each from the same numbers, so the result is that of one process up to
the order of sums. With one process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def start() -> None:
    """Joins the other processes, if the launcher started any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; 0 writes files and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Every size()-th of the items, beginning with number rank()."""
    return items[rank() :: size()]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(x: Tensor) -> Tensor:
    """The sum over the processes; the tensor itself stays."""
    if size() == 1:
        return x
    summed = x.clone()
    dist.all_reduce(summed)
    return summed


def largest(x: float) -> float:
    """The largest over the processes."""
    if size() == 1:
        return x
    tensor = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def from_main(x: Tensor) -> Tensor:
    """The tensor of process 0; all must hold one of its shape and type."""
    if size() > 1:
        dist.broadcast(x, src=0)
    return x


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return bool(total(torch.tensor(int(flag), device=device)) > 0)


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        dist.barrier()
