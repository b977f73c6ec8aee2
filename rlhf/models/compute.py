"""Where and in which type models compute."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.base.errors import UserError
from rlhf.config import ComputeConfig


@dataclass(frozen=True)
class Compute:
    """Where and in which type a run computes."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, config: ComputeConfig) -> Compute:
        """CUDA bf16 if there is a GPU; on a CPU bf16 where it has bf16 instructions (AMX or AVX512), else fp32."""
        device = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if config.device == "auto"
            else torch.device(config.device)
        )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda was asked for, but torch sees no CUDA device; use --device auto")
        if config.dtype != "auto":
            dtype = getattr(torch, config.dtype)
        elif device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        else:
            fast = torch.cpu.get_capabilities()
            dtype = torch.bfloat16 if fast.get("amx_bf16") or fast.get("avx512_bf16") else torch.float32
        # TF32 for what a bf16 run leaves in fp32; a run in float32 means all of its 24 bits.
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16
        return cls(device, dtype)

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision: the frozen base is held in bf16, adapters in fp32, products are computed in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        return f"{self.device.type} ({name}), {str(self.dtype).removeprefix('torch.')}"
