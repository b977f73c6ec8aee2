"""Next-token logits over a KV cache: prefilling prompts, faster products on a CPU.

Legend: B responses, P padded prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.models.anatomy import backbone, head, hidden_states, probe_ids, same_numbers, takes
from rlhf.models.packing import common_prefix

#: Bytes of weights that are held a second time, in the order of a CPU's products.
_ORDERED_AT_MOST = 2_000_000_000
#: Columns by which a cache with room grows at once.
_GROWTH = 16

#: A backbone, and the head that maps its states to logits.
Parts = tuple[Callable[..., Any], Callable[[Tensor], Tensor]]


def parts(model: PreTrainedModel) -> Parts:
    """Return the model's backbone and head, to be called with the arguments of `last_logits`."""
    trunk: Any = backbone(model)
    if takes(trunk, "position_ids"):
        return trunk, head(model)
    return lambda position_ids, **arguments: trunk(**arguments), head(model)


def last_logits(model: Parts, input_ids: Tensor, attention: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
    """Return next-token logits (B, V) after the last column, and append all columns to the cache."""
    trunk, to_logits = model
    hidden = trunk(
        input_ids=input_ids, attention_mask=attention, position_ids=position_ids, past_key_values=cache, use_cache=True
    ).last_hidden_state
    # Flat: from a strided slice the head's product would copy the embedding matrix for every row.
    return to_logits(hidden[:, -1].contiguous())


@torch.no_grad()
def cache_is_sound(model: PreTrainedModel, *, share: bool, room: bool = False) -> bool:
    """Return True if logits over a cache, after left padding, equal those of a plain pass.

    Args:
        share: as in `prefill`.
        room: the cache has free columns (`with_room`).
    """
    ids, cache = probe_ids(model, 2, 8), DynamicCache(config=model.config)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    ids[1, :2] = ids[0, 3:5]  # a shared prefix: padding then stands between it and what follows
    expected = head(model)(hidden_states(model, ids, mask)[:, -1])
    try:
        _, attention = prefill(model, ids[:, :-1], mask[:, :-1], cache, share=share)
        if room:
            with_room(cache, _GROWTH)
        attention = nn.functional.pad(attention, (0, 1), value=1)
        logits = last_logits(parts(model), ids[:, -1:], attention, mask.sum(dim=1, keepdim=True) - 1, cache)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    return same_numbers(model, logits, expected)


def prefill(
    model: PreTrainedModel, prompts: Tensor, mask: Tensor, cache: DynamicCache, *, share: bool
) -> tuple[Tensor, Tensor]:
    """Fill the cache with the prompts; return their logits (B, V), and the mask (B, columns) of the cache.

    A prompt that gets several responses is computed once, and so is a prefix that all prompts `share`. Padding then stands
    between it and shorter prompts' remainders, which spoils distances that are counted in columns of the cache.
    """
    whole, (first, copy_of) = parts(model), _distinct(prompts, mask)
    prompts, mask = prompts[first], mask[first]
    shared, positions = common_prefix(prompts, mask) if share else 0, mask.long().cumsum(dim=1) - 1
    rest = mask & (positions >= shared)
    if shared:
        prefix = prompts[0][mask[0]][:shared][None]
        last_logits(whole, prefix, torch.ones_like(prefix), torch.arange(shared, device=mask.device)[None], cache)
        cache.batch_repeat_interleave(len(prompts))
        # Prompts end in the last column, and so do their remainders.
        width = int(rest.sum(dim=1).max())
        prompts, rest, positions = prompts[:, -width:], rest[:, -width:], positions[:, -width:]
    attention = torch.cat([rest.new_ones(len(prompts), shared), rest], dim=1).long()
    logits = last_logits(whole, prompts, attention, positions.clamp_min(0), cache)
    if len(first) < len(copy_of):
        cache.batch_select_indices(copy_of)
    return logits[copy_of], attention[copy_of]


def with_room(cache: DynamicCache, length: int) -> None:
    """Let a cache that holds prompts take `length` tokens more without copying its keys and values for each."""
    for number, layer in enumerate(cache_layers(cache)):
        if type(layer) is DynamicLayer:
            cast(Any, cache.layers)[number] = _RoomyLayer(layer, length)


class _RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, W, D) of a layer, the last columns of which are free, and written one by one.

    Attention reads the free columns, too, and masks them: products of a CPU copy whatever is cut out of a larger tensor.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.filled = self.keys.shape[2]
        self.longest = self.filled + length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new tokens; return all columns."""
        count = key_states.shape[2]
        if width := self._missing(count):
            self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, width)) for x in (self.keys, self.values))
        self.keys.narrow(2, self.filled, count).copy_(key_states)
        self.values.narrow(2, self.filled, count).copy_(value_states)
        self.filled += count
        return self.keys, self.values

    def _missing(self, count: int) -> int:
        """Return the columns to add for `count` tokens: none where they fit."""
        short = self.filled + count - self.keys.shape[2]
        return max(short, min(_GROWTH, self.longest - self.keys.shape[2])) if short > 0 else 0

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that attention will read, and the first of them."""
        return self.keys.shape[2] + self._missing(query_length), 0


def _distinct(prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row numbers (D,) of distinct prompts (B, P), and for each row (B,) which of the D it equals."""
    rows = torch.arange(len(prompts), device=prompts.device)
    _, number = torch.unique(torch.cat([prompts * mask, mask.long()], dim=1), dim=0, return_inverse=True)
    first = torch.full_like(rows, len(rows)).scatter_reduce(0, number, rows, "amin")[number]  # of each row's equals
    is_first = first == rows
    return is_first.nonzero().squeeze(1), (is_first.cumsum(dim=0) - 1)[first]


def cache_layers(cache: DynamicCache) -> list[Any]:
    """Return a cache's layers; keys and values are (rows, heads, tokens, width)."""
    return cast(list[Any], cache.layers)


@contextlib.contextmanager
def ordered_weights(model: PreTrainedModel) -> Iterator[None]:
    """Context in which linear layers hold their weights in the order that a CPU's bf16 products read.

    Otherwise each step reorders them, which takes longer than the product of a few rows with them.
    """
    layers = _ordered_layers(model)
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = functools.partial(_ordered_product, weight, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _ordered_layers(model: nn.Module) -> list[nn.Linear]:
    layers = [layer for layer in model.modules() if _can_be_ordered(layer)] if has_ordered_products() else []
    return layers if sum(layer.weight.nbytes for layer in layers) <= _ORDERED_AT_MOST else []


def ordered_bytes(model: nn.Module) -> int:
    """Return the bytes that `ordered_weights` holds a second time."""
    return sum(layer.weight.nbytes for layer in _ordered_layers(model))


def has_ordered_products() -> bool:
    """Return True if this build of torch, on this CPU, multiplies bf16 with weights in an order of its own."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _can_be_ordered(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return True for plain layers: quantised ones are of other types, offloaded ones have a forward of their own."""
    return (
        type(layer) is nn.Linear
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.bfloat16)
        and "forward" not in vars(layer)
    )


def _ordered_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return a linear layer's output by its ordered weight, in the weight's type: autocast does not know this product."""
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
