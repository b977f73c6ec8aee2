"""The device and the type that models compute in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from rlhf.base.errors import UserError
from rlhf.config import ComputeConfig

_REHEARSED: ContextVar[str | None] = ContextVar("kind of device that is rehearsed", default=None)


@contextlib.contextmanager
def rehearsed_on(kind: str) -> Iterator[None]:
    """Context in which tensors without values, which claim to be on a CPU, take the ways of another kind of device."""
    token = _REHEARSED.set(kind)
    try:
        yield
    finally:
        _REHEARSED.reset(token)


def device_kind(tensor: Tensor) -> str:
    """Return the kind of a tensor's device, by which ways are chosen: `cpu` or `cuda`."""
    return _REHEARSED.get() or tensor.device.type


@dataclass(frozen=True)
class Compute:
    """The device and the type that a run computes in."""

    device: torch.device
    dtype: torch.dtype
    fuse_adapters: bool = True
    """Compute a layer and its adapter as one function."""

    @classmethod
    def choose(cls, config: ComputeConfig) -> Compute:
        """Choose CUDA and bf16 if there is a GPU; on a CPU bf16 if it has instructions for it (AMX, AVX512), else fp32.

        Raises:
            UserError: `device` is cuda, and there is none.
        """
        device = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if config.device == "auto"
            else torch.device(config.device)
        )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no CUDA device; use --device auto")
        if config.dtype != "auto":
            dtype = getattr(torch, config.dtype)
        elif device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        else:
            instructions = torch.cpu.get_capabilities()
            fast = instructions.get("amx_bf16") or instructions.get("avx512_bf16")
            dtype = torch.bfloat16 if fast else torch.float32
        # TF32 for the fp32 products of a bf16 run; a run in float32 means all of its 24 bits.
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16
        return cls(device, dtype, config.fuse_adapters)

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of mixed precision: the frozen base is in bf16, adapters in fp32, products are computed in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        return f"{self.device.type} ({name}), {str(self.dtype).removeprefix('torch.')}"


def quiet_transformers() -> None:
    """Keep the library's progress bars, and deprecations that no user can mend, out of what commands print."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    transformers_logging.disable_progress_bar()
