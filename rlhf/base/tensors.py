"""Shapes and types of tensors, checked and raised."""

from __future__ import annotations

import torch
from torch import Tensor


def _check(shape: torch.Size, mask: Tensor | None = None, **tensors: Tensor) -> None:
    """Raises `ValueError` unless all tensors have this shape and the mask, if any, is a boolean non-empty prefix."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.numel() == 0:
        raise ValueError(f"mask must be a non-empty boolean (B, R), got {mask.dtype} {tuple(shape)}")
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(1)  # (B,): a True after a False
    wrong = holes | ~mask[:, 0]
    if wrong.any():  # the one wait for the device
        row = int(wrong.int().argmax())
        problem = "is not a prefix True ... True False ... False" if mask[row].any() else "has no token (all False)"
        raise ValueError(f"mask {tuple(shape)}: row {row} {problem}")


def _upcast(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
