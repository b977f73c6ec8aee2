"""What all rows of a batch begin with is computed once.

Prompts of one task share their opening (the chat header, the instruction), and K responses to one prompt share all of it.
The opening goes through the backbone as one row; its keys and values are repeated for
the rows' remainders. Gradients flow through the repetition, so the result is the same up to rounding.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

#: Sharing pays only when it leaves out at least this share of the tokens.
_WORTHWHILE = 0.1


def share_prefixes(backbone: nn.Module) -> None:
    """Makes a backbone's forward share the rows' common opening; called again it does nothing.

    Only plain scoring passes are changed (token ids and a mask, no cache); all others go through untouched.
    """
    if hasattr(backbone, "_forward_each_row"):
        return
    backbone._forward_each_row = backbone.forward  # type: ignore[assignment]
    backbone.forward = types.MethodType(_forward, backbone)


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    plain = (
        input_ids is not None
        and attention_mask is not None
        and attention_mask.dim() == 2
        and past_key_values is None
        and not use_cache
        and not (self.training and getattr(self, "gradient_checkpointing", False))
        and all(value is None or value is False or key == "return_dict" for key, value in kwargs.items())
    )
    if plain:
        assert input_ids is not None and attention_mask is not None
        shared = common_prefix(input_ids, attention_mask.bool())
        if shared * (len(input_ids) - 1) >= _WORTHWHILE * input_ids.numel():
            hidden = _hidden(self, input_ids, attention_mask.bool(), shared)
            return BaseModelOutputWithPast(last_hidden_state=hidden)
    return self._forward_each_row(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        **kwargs,
    )


def common_prefix(input_ids: Tensor, mask: Tensor) -> int:
    """Number of tokens that all rows (B, T) begin with, padding on either side left out; each keeps one of its own."""
    start = mask.int().argmax(dim=1)
    longest = int(mask.sum(dim=1).min()) - 1
    if len(input_ids) < 2 or longest < 1:
        return 0
    columns = start[:, None] + torch.arange(longest, device=mask.device)
    heads = input_ids.gather(1, columns)
    same = (heads == heads[:1]).all(dim=0)
    return int(same.int().cumprod(dim=0).sum())


def _hidden(backbone: Any, input_ids: Tensor, mask: Tensor, shared: int) -> Tensor:
    """Last hidden states (B, T, d): the opening's once, repeated; the remainders' after it. Columns of padding hold zeros."""
    size, width = input_ids.shape
    start = mask.int().argmax(dim=1)
    cache = DynamicCache(config=backbone.config)
    opening = input_ids[0, start[0] : start[0] + shared][None]
    first = backbone._forward_each_row(
        input_ids=opening,
        attention_mask=torch.ones_like(opening),
        position_ids=torch.arange(shared, device=opening.device)[None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    cache.batch_repeat_interleave(size)

    # The remainders keep their padding and their order: column j of `rest` is column `source[j]` of the row.
    column = torch.arange(width - shared, device=mask.device)
    source = torch.where(column < start[:, None], column, column + shared)
    rest_mask = mask.gather(1, source)
    rest = backbone._forward_each_row(
        input_ids=input_ids.gather(1, source),
        attention_mask=torch.cat([rest_mask.new_ones(size, shared), rest_mask], dim=1).long(),
        position_ids=(rest_mask.long().cumsum(dim=1) - 1).clamp_min(0) + shared,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state

    hidden = rest.new_zeros(size, width, rest.shape[-1])
    hidden = hidden.scatter(1, source[..., None].expand(-1, -1, rest.shape[-1]), rest)
    where = start[:, None] + torch.arange(shared, device=mask.device)
    return hidden.scatter(1, where[..., None].expand(-1, -1, rest.shape[-1]), first.to(rest.dtype).expand(size, -1, -1))
