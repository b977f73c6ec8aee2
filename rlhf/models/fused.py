"""A linear layer and its LoRA adapter as one function: the adapter's product is added to the layer's own, in place.

peft makes the adapter's output, scales it and adds it, each a pass over a tensor of the layer's output; on a CPU that can
take as long as the layer. The result is the same but for rounding: the sum is rounded to bf16 once, not three times.

Legend: N tokens, i and o the layer's inputs and outputs, r the adapter's rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FusedLinear(lora.Linear):
    """peft's layer, which computes with one plain adapter as one function; any other case is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x W^T + b + scaling (x A^T) B^T, (..., o) of x (..., i)."""
        adapter = self._only_adapter() if not args and not kwargs else None
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.base_layer)
        down, up = (cast(Tensor, part[adapter].weight) for part in (self.lora_A, self.lora_B))
        device = x.device.type
        casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device) if casts else x.dtype
        with torch.autocast(device, enabled=False):
            rows, weight, a, b = (t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), base.weight, down, up))
            bias = None if base.bias is None else base.bias.to(dtype)
            out = _AdaptedProduct.apply(rows, weight, bias, a, b, self.scaling[adapter])
        return out.view(*x.shape[:-1], -1)

    def _only_adapter(self) -> str | None:
        """Return the name of the adapter to compute with, if it is a single plain one on a plain frozen layer."""
        base, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        plain = (
            not self.disable_adapters
            and not self.merged
            and len(active) == 1
            and active[0] not in self.lora_variant
            and type(base) is nn.Linear
            and "forward" not in vars(base)  # its weight is in another order, or elsewhere between its passes
            and not base.weight.requires_grad
            and self.lora_B[active[0]].bias is None
            and not (self.training and getattr(self.lora_dropout[active[0]], "p", 0.0) > 0)
        )
        return active[0] if plain else None


class _AdaptedProduct(torch.autograd.Function):
    """Product with a frozen weight and its adapter.

    Maps x (N, i) to x W^T + b + scaling (x A^T) B^T, (N, o); A (r, i) and B (o, r) may train.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        narrow = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, narrow)
        ctx.scaling = scaling
        return nn.functional.linear(x, weight, bias).addmm_(narrow, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, weight, a, b, narrow = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        grad_narrow = grad @ b  # (N, r), to be scaled
        return (
            (grad @ weight).addmm_(grad_narrow, a, alpha=ctx.scaling) if of_x else None,
            None,
            None,
            (grad_narrow.t() @ x).mul_(ctx.scaling) if of_a else None,
            (grad.t() @ narrow).mul_(ctx.scaling) if of_b else None,
            None,
        )
