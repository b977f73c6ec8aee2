"""Several processes that share a rollout (`torchrun --nproc_per_node N -m rlhf.stages.ppo ...`).

Each process samples its share of the rows and computes its share of the microbatches. Sums over the processes then give
each of them the whole rollout and the whole gradient. Everything else is computed by all from equal numbers, so the result
differs from that of one process only by the order of sums. With one process these functions change nothing.
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
    """Connect to the other processes, if the launcher started any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0; process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Return every size()-th item, starting at index rank()."""
    return items[rank() :: size()]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over the processes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(x: Tensor) -> Tensor:
    """Return the sum over the processes, and leave the tensor unchanged."""
    if size() == 1:
        return x
    summed = x.clone()
    dist.all_reduce(summed)
    return summed


def largest(x: float) -> float:
    """Return the largest value over the processes."""
    if size() == 1:
        return x
    tensor = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def from_main(x: Tensor) -> Tensor:
    """Overwrite the tensor with that of process 0, and return it; shape and dtype must agree."""
    if size() > 1:
        dist.broadcast(x, src=0)
    return x


def any_true(flag: bool, device: torch.device) -> bool:
    """Return True if the flag is set in any process."""
    return bool(total(torch.tensor(int(flag), device=device)) > 0)


def wait() -> None:
    """Wait for all processes to arrive here."""
    if size() > 1:
        dist.barrier()
