"""Heads on a model's last hidden states: to logits, and to one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.anatomy import anatomy, head, run_backbone
from rlhf.models.compute import device_kind


def states_and_head(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the last hidden states (B, T, d) of right-padded rows, and the function that maps any of them to logits.

    So callers can skip the logits of tokens that they do not need.
    """
    anatomy(model)
    return run_backbone(model, input_ids, attention_mask), head(model)


class ScalarHead(nn.Linear):
    """A linear head to one number, computed in its own type: autocast would round scores to bf16. It starts at 0.

    On a GPU it is a sum of products: matrix products in fp32 are rounded to TF32's 10 bits there, in both passes.
    """

    def __init__(self, width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(width, 1, bias=bias, dtype=dtype)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            states = input.to(self.weight.dtype)
            if device_kind(states) == "cpu":
                return super().forward(states)
            score = (states * self.weight[0]).sum(dim=-1, keepdim=True)
            return score if self.bias is None else score + self.bias
