"""Packing: a batch goes through the backbone without padding, and with shared prefixes computed once.

A padded batch (B, T) becomes one packed row of N real tokens, so linear layers, norms and activations do no work on
padding. Prompts of one task share a prefix (the chat header, the instruction), and K responses to one prompt share all of
it: the packed row holds those tokens once, like the nodes of a prefix tree. Only attention needs to know which token
belongs to which row; it is registered with transformers under the name `packed` and reads this from the `Layout`.

On a GPU attention is torch's variable-length flash attention where the installed torch and the device compute what the
masked kernel computes (`proven`); elsewhere rows are unpacked and masked. Keys of shared tokens are copied into each row
that attends to them: flash attention can point several rows to the same keys (block tables), but has no gradient for it. The
copies cost memory traffic in attention only; each shared token still goes through all linear layers once, which is nearly
all of the work, so prefixes stay shared on a GPU, too. `attn_implementation: sdpa` shares and packs nothing.

Legend: B rows, T padded length, P prefix shared by all rows, L longest remainder, N packed tokens, H query heads, K key
heads, D head width.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from rlhf.models.anatomy import as_output, backbone, probe_ids, run_backbone, takes
from rlhf.models.compute import device_kind

#: Name of this attention among transformers' implementations.
PACKED = "packed"


@dataclass(frozen=True)
class Segments:
    """A packed row for variable-length attention: the shared prefix, then each row's own tokens, as segments of queries.

    A segment's queries are the last of its keys: those of a row are all of its tokens, the prefix and borrowed ones included.
    """

    keys: Tensor | None
    """(K,) int64: packed positions of the keys of all segments; None if they are the packed row itself."""
    query_ends: Tensor
    """(B + 2,) int32, without a prefix (B + 1,): 0, and the end of each segment among the queries."""
    key_ends: Tensor
    """The same, among the keys."""
    longest_query: int
    """Bound of a segment's queries."""
    longest_key: int


@dataclass(frozen=True)
class Layout:
    """Positions of a padded batch's tokens in the packed row.

    The prefix of all rows comes first. Then each row adds its tokens after the longest prefix that it shares with an
    earlier row, which owns the shared ones.
    """

    shared: int
    """P, tokens of the prefix of all rows, 0 or more."""
    source: Tensor
    """(N,) int64: the packed tokens' positions in the flattened batch (B * T)."""
    target: Tensor
    """(B, T) int64: each token's position in the packed row; 0 at padding."""
    unpacked: Tensor
    """(B, L) int64: packed positions of each row's remainder, left-justified; P at padding."""
    repacked: Tensor
    """(N - P,) int64: positions in the flattened (B * L) of the tokens that their row owns, in packed order."""
    borrowed: Tensor
    """(n,) int64: positions in the flattened (B * L) of the tokens that an earlier row owns."""

    @cached_property
    def segments(self) -> Segments:
        """The rows as segments of variable-length attention; no number of it goes through the host."""
        (rows, longest), device = self.unpacked.shape, self.unpacked.device
        ends = longest * torch.arange(rows + 1, device=device)
        own, borrowed = (torch.searchsorted(cells, ends) for cells in (self.repacked, self.borrowed))
        prefix = torch.arange(self.shared, device=device)
        grid = torch.cat([prefix.expand(rows, -1), self.unpacked], dim=1)
        rest = torch.cat([self.repacked, self.borrowed])
        cells = torch.cat(
            [
                (grid.shape[1] * torch.arange(rows, device=device)[:, None] + prefix).flatten(),
                rest // longest * grid.shape[1] + self.shared + rest % longest,
            ]
        )
        alone = self.shared == 0 and len(self.borrowed) == 0
        zero = (1, 0) if self.shared else (0, 0)  # without a prefix the first row begins at 0
        keys = self.shared * torch.arange(1, rows + 2, device=device) + own + borrowed
        return Segments(
            keys=None if alone else torch.cat([prefix, grid.flatten()[cells.sort().values]]),
            query_ends=nn.functional.pad(self.shared + own, zero).int(),
            key_ends=nn.functional.pad(keys, zero).int(),
            longest_query=max(self.shared, longest),
            longest_key=self.shared + longest,
        )

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor) -> Layout:
        """Return the layout of a batch (B, T) with padding on either side; mask (B, T) bool, at least one token a row.

        It is made on the CPU, so the host waits for a GPU once, and not for each number that it needs.
        """
        if (device := mask.device).type != "cpu":
            layout = cls.of(input_ids.cpu(), mask.cpu())
            return cls(layout.shared, *(getattr(layout, field.name).to(device) for field in fields(layout)[1:]))
        shared, last = common_prefix(input_ids, mask), mask.shape[1] - 1
        start, number = mask.int().argmax(dim=1), mask.cumsum(dim=1) - 1  # of each row; of each token within its row
        owner = _owners(input_ids, mask, start).gather(1, number.clamp_min(0))
        rest = mask & (number >= shared)
        own = rest & (owner == torch.arange(len(mask), device=mask.device)[:, None])
        packed = shared - 1 + own.flatten().cumsum(dim=0).view_as(own)  # positions of the owned tokens
        of_owner = packed[owner, (start[owner] + number).clamp(0, last)]
        target = torch.where(number < shared, number, of_owner) * mask
        lengths = rest.sum(dim=1)
        column = torch.arange(int(lengths.max()), device=mask.device)
        real = column < lengths[:, None]
        columns = (start[:, None] + shared + column).clamp_max(last)
        owned = own.gather(1, columns) & real
        prefix = mask[0].nonzero().squeeze(1)[:shared]
        return cls(
            shared=shared,
            source=torch.cat([prefix, own.flatten().nonzero().squeeze(1)]),
            target=target,
            unpacked=torch.where(real, target.gather(1, columns), shared),
            repacked=owned.flatten().nonzero().squeeze(1),
            borrowed=(real & ~owned).flatten().nonzero().squeeze(1),
        )


#: Layouts that were made before a pass over these very ids (B, T), so that it does not wait for one.
LAYOUTS = WeakTensorKeyDictionary()


def _owners(input_ids: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Return the first row that equals row b up to token t, (B, T), of left-justified rows."""
    column = torch.arange(mask.shape[1], device=mask.device)
    ids = input_ids.gather(1, (start[:, None] + column).clamp_max(mask.shape[1] - 1))
    real = column < mask.sum(dim=1)[:, None]
    same = (ids[:, None] == ids) & real[:, None] & real
    return same.int().cumprod(dim=2).argmax(dim=1)  # the first of several


def common_prefix(input_ids: Tensor, mask: Tensor) -> int:
    """Return the length of the prefix that all rows (B, T) share, without padding; each row keeps a token of its own."""
    start = mask.int().argmax(dim=1)
    longest = int(mask.sum(dim=1).min()) - 1
    if len(input_ids) < 2 or longest < 1:
        return 0
    columns = start[:, None] + torch.arange(longest, device=mask.device)
    heads = input_ids.gather(1, columns)
    same = (heads == heads[:1]).all(dim=0)
    return int(same.int().cumprod(dim=0).sum())


def pack_rows(model: PreTrainedModel) -> bool:
    """Make a causal model's backbone pack the rows of every scoring pass (ids and a mask, no cache), if it can.

    Other passes do not change. Returns False, and leaves the model as it was, where packing would change hidden states
    (attention that is not of transformers' interface, or more than a masked softmax).
    """
    library = model.config._attn_implementation
    if library == PACKED:
        return True
    try:
        model.set_attn_implementation("eager")
        expected = _probe(model)
        if not pack_unprobed(model):
            model.set_attn_implementation(library)
            return False
        error = (_probe(model) - expected).norm() / expected.norm()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        error = torch.tensor(torch.inf)
    fits = bool(error < (0.05 if model.dtype == torch.bfloat16 else 1e-3))
    if not fits:
        model.set_attn_implementation(library)
    return fits


def pack_unprobed(model: PreTrainedModel) -> bool:
    """Make a backbone pack its rows if it takes positions, without the proof that this changes nothing."""
    trunk: Any = backbone(model)
    if not takes(trunk, "position_ids"):
        return False
    if not hasattr(trunk, "_forward_padded"):
        trunk._forward_padded = trunk.forward
        trunk.forward = types.MethodType(_forward, trunk)
    model.set_attn_implementation(PACKED)
    return True


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """Return hidden states of the real tokens of two short rows that share a prefix."""
    ids = probe_ids(model, 2, 7)
    ids[1, :4] = ids[0, :4]
    mask = torch.ones_like(ids)
    mask[1, 6] = 0
    return run_backbone(model, ids, mask)[mask.bool()].float()


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Stand in for a backbone's `forward`: pack a plain scoring pass, and leave any other to the library."""
    scoring = (
        self.config._attn_implementation == PACKED
        and input_ids is not None
        and attention_mask is not None
        and attention_mask.dim() == 2
        and all(value is None or value is False or key == "return_dict" for key, value in kwargs.items())
    )
    if not scoring:
        return self._forward_padded(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
    assert input_ids is not None and attention_mask is not None
    layout = LAYOUTS.get(input_ids) or Layout.of(input_ids, attention_mask.bool())
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    hidden = self._forward_padded(
        input_ids=input_ids.flatten()[layout.source][None],
        position_ids=position_ids.flatten()[layout.source][None],
        attention_mask=attention_mask.new_ones(1, 1, 1, 1, dtype=torch.bool),  # four dimensions: passed on as it is
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    padded = hidden[layout.target.flatten()].view(*input_ids.shape, -1)
    return as_output(padded)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return outputs (B, T, H, D) of query (B, H, T, D), key and value (B, K, S, D), and no weights.

    The signature is that of transformers' interface. With a layout, B = 1 and T = S = N; each token attends to itself and
    the tokens before it in its own row, the prefix included.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with a soft cap or sinks")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast their norms may be in fp32
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    with torch.autocast(query.device.type, enabled=False):
        if layout is None:
            return _attend(query, key, value, attention_mask, scaling, dropout).transpose(1, 2).contiguous(), None
        if kernel := varlen_kernel(query, key, scaling, dropout, sliding_window):
            return _attend_segments(kernel, query, key, value, layout.segments), None
        return _attend_unpacked(query, key, value, layout, scaling, dropout, sliding_window), None


def _attend_unpacked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """Return outputs (1, N, H, D) of a packed row (1, heads, N, D): rows are unpacked, and padding is masked."""
    heads, rows = query.shape[1], len(layout.unpacked)
    p, longest = layout.shared, layout.unpacked.shape[1]
    mask = _causal(p + longest, query.device, sliding_window)

    def unpack(x: Tensor) -> Tensor:  # (1, heads, N, D) -> (B, heads, L, D)
        return _Unpack.apply(x[0], layout).transpose(0, 1)

    keys, values = unpack(key), unpack(value)
    if p:
        keys = torch.cat([key[:, :, :p].expand(rows, -1, -1, -1), keys], dim=2)
        values = torch.cat([value[:, :, :p].expand(rows, -1, -1, -1), values], dim=2)
    out = _attend(unpack(query), keys, values, mask[p:], scaling, dropout)  # (B, H, L, D)
    packed = _Repack.apply(out.transpose(1, 2).reshape(rows * longest, -1), layout)  # (N - P, H * D)
    if p:
        prefix = _attend(query[:, :, :p], key[:, :, :p], value[:, :, :p], mask[:p, :p], scaling, dropout)
        packed = torch.cat([prefix.transpose(1, 2).reshape(p, -1), packed])
    return packed.view(1, len(packed), heads, -1)


def _causal(size: int, device: torch.device, sliding_window: int | None) -> Tensor:
    """Return a causal mask (size, size) bool: True where the row's query attends to the column's key."""
    position = torch.arange(size, device=device)
    distance = position[:, None] - position
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Return softmax(query key^T * scaling) value, (B, H, T, D); mask (..., T, S) bool, True = attended to."""
    if device_kind(query) != "cpu":
        return _attend_fused(query, key, value, mask, scaling, dropout)
    # On a CPU, products of the query heads that share a key head in one go beat the fused kernel and copy no keys.
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    grouped = (query * scaling).reshape(batch, key.shape[1], groups * length, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, key.shape[1], groups, length, key.shape[2])
    if mask is not None:
        unseen = ~mask if mask.dim() == 2 else ~mask[:, :, None]
        # Finite, so that a row that attends to nothing stays a number.
        scores = scores.masked_fill_(unseen, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout).view(batch, key.shape[1], groups * length, -1)
    return (weights @ value).view(batch, heads, length, width)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """Return what `_attend` does, by torch's kernel.

    With a mask and fewer key heads than query heads CUDA has no memory-efficient kernel. So the query heads of a key head
    become more queries of it, each with its line of the mask; of long queries, keys and values are repeated instead, which
    then copies less.
    """
    (batch, heads, length, width), groups = query.shape, query.shape[1] // key.shape[1]
    attend = partial(nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if mask is None or groups == 1:
        return attend(query, key, value, attn_mask=mask, enable_gqa=groups > 1)
    if groups * length > heads * width:
        return attend(query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=mask)
    grouped = query.reshape(batch, key.shape[1], groups * length, width)
    lines = mask[None, None] if mask.dim() == 2 else mask
    return attend(grouped, key, value, attn_mask=lines.repeat(1, 1, groups, 1)).reshape(query.shape)


def _attend_segments(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, segments: Segments
) -> Tensor:
    """Return outputs (1, N, H, D) of a packed row (1, heads, N, D) by variable-length attention; no key head is repeated."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    if segments.keys is not None:
        key, value = _Copy.apply(key, segments.keys), _Copy.apply(value, segments.keys)
    ends = segments.query_ends, segments.key_ends
    longest = segments.longest_query, segments.longest_key
    return kernel(query.contiguous(), key.contiguous(), value.contiguous(), *ends, *longest)[None]


def varlen_kernel(
    query: Tensor, key: Tensor, scaling: float, dropout: float, sliding_window: int | None
) -> Callable[..., Tensor] | None:
    """Return torch's causal variable-length attention for these tensors (1, heads, N, D), or None where there is none.

    It is called with query, key and value (N, heads, D), the ends of the segments of queries and keys, and their bounds.
    """
    if dropout or device_kind(query) == "cpu":
        return None
    shape = (query.shape[1], key.shape[1], query.shape[3])
    return _chosen_kernel(query.device, query.dtype, shape, scaling, sliding_window)


@cache
def _chosen_kernel(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], scaling: float, sliding_window: int | None
) -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if device.type == "cpu":  # a rehearsal
        fits = dtype in (torch.bfloat16, torch.float16)
        return with_options(varlen_attn, shape, scaling, sliding_window) if fits else None
    return proven(varlen_attn, device, dtype, shape, scaling, sliding_window)


def with_options(
    varlen_attn: Callable[..., Any], shape: tuple[int, int, int], scaling: float, sliding_window: int | None
) -> Callable[..., Tensor] | None:
    """Return causal variable-length attention with its options; None if the installed torch's has no such option.

    They changed with torch's versions: 2.10 has neither a window nor a scale, 2.12 names grouped heads.
    """
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    wanted = {"scale": scaling, "window_size": window, "is_causal": True, "enable_gqa": shape[0] != shape[1]}
    options = {name: wanted[name] for name in inspect.signature(varlen_attn).parameters if name in wanted}
    if "window_size" not in options and ("is_causal" not in options or sliding_window is not None):
        return None
    return partial(varlen_attn, **options)


def proven(
    varlen_attn: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    scaling: float,
    sliding_window: int | None,
) -> Callable[..., Tensor] | None:
    """Return `torch.nn.attention.varlen.varlen_attn` with its options if outputs and gradients of rows with a prefix are right.

    What a kernel takes depends on torch's version, the device, the type and the head's width: hence a trial.

    Args:
        shape: query heads, key heads, width of a head.
    """
    heads, key_heads, width = shape
    kernel = with_options(varlen_attn, shape, scaling, sliding_window)
    if kernel is None:
        return None
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 7, 9, 10], [5, 6, 11, 0, 0]], device=device)
    layout = Layout.of(ids, ids > 0)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, len(layout.source), width, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    try:
        with torch.enable_grad():
            outputs = [
                _attend_segments(kernel, query, key, value, layout.segments),
                _attend_unpacked(query, key, value, layout, scaling, 0.0, sliding_window),
            ]
            sides = [[x, *torch.autograd.grad(x.float().square().sum(), (query, key, value))] for x in outputs]
        errors = [
            float((a - b).detach().float().norm() / b.detach().float().norm()) for a, b in zip(*sides, strict=True)
        ]
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return kernel if max(errors) < 0.05 else None  # a window or a scale that is ignored makes them some tenths


class _Unpack(torch.autograd.Function):
    """Maps packed (heads, N, D) to rows (heads, B, L, D).

    Its gradient is a plain copy back, where indexing would add up token by token; only borrowed tokens are added to their
    owners. No real query attends to padding, so no gradient comes from there, and the prefix gets none through here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(1, layout.unpacked.flatten()).view(len(x), *layout.unpacked.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layout, flat = ctx.layout, grad.flatten(1, 2)
        total = nn.functional.pad(flat.index_select(1, layout.repacked), (0, 0, layout.shared, 0))
        if len(layout.borrowed):
            owners = layout.unpacked.flatten()[layout.borrowed]
            total.index_add_(1, owners, flat.index_select(1, layout.borrowed))
        return total, None


class _Copy(torch.autograd.Function):
    """Maps packed (N, heads, D) to copies (K, heads, D); gradients of a token's copies are summed in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        ctx.positions, ctx.size = positions, len(x)
        return x.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
        total = exact.new_zeros(ctx.size, *grad.shape[1:]).index_add_(0, ctx.positions, exact)
        return total.to(grad.dtype), None


class _Repack(torch.autograd.Function):
    """Maps rows (B * L, width) to packed (N - P, width), with zero gradient at padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.rows = layout, len(x)
        return x.index_select(0, layout.repacked)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, ctx.layout.repacked, grad), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return a boolean mask, always: a missing one would not show `packed_attention` whether it means causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _mask)
