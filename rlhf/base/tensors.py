"""Checks of shapes and masks, and the precision of fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: Masks that were found sound, with the number of changes that had been made to each.
_CHECKED = WeakTensorKeyDictionary()


def check_shapes(shape: torch.Size, mask: Tensor | None = None, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors have this shape and each row of the mask is a non-empty prefix of True."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if mask is None or _CHECKED.get(mask) == mask._version:
        return
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.numel() == 0:
        raise ValueError(f"mask must be a non-empty boolean (B, R), got {mask.dtype} {tuple(shape)}")
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(1)  # (B,): a True after a False
    wrong = holes | ~mask[:, 0]
    if wrong.any():  # the only synchronisation with the device, once for each mask
        row = int(wrong.int().argmax())
        problem = "is not a prefix True ... True False ... False" if mask[row].any() else "has no token (all False)"
        raise ValueError(f"mask {tuple(shape)}: row {row} {problem}")
    _CHECKED[mask] = mask._version


def upcast(x: Tensor) -> Tensor:
    """Return x in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
