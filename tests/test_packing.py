"""Packing the rows of a batch must not change what is computed, nor its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toys import FAMILIES, build_model

from rlhf.models import packing
from rlhf.models.anatomy import backbone
from rlhf.models.packing import common_prefix, pack_rows
from rlhf.models.sequences import prompt_batches

OPENING = [5, 6, 7, 8, 9, 10]
ROWS = [
    [*OPENING, 11, 12],
    [*OPENING, 11],
    [*OPENING, 13, 14, 15, 16],
    [*OPENING, 13, 14, 17],
    [*OPENING, 11, 12],
    [*OPENING, 12, 13, 14],
]


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, ROWS))
    gaps = [[0] * (width - len(row)) for row in ROWS]
    left = side == "left"
    ids = [gap + row if left else row + gap for gap, row in zip(gaps, ROWS, strict=True)]
    mask = [
        [0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for g, r in zip(gaps, ROWS, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` of torch 2.12 documents, segment by segment."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    outputs = []
    queries, keys = (part.tolist() for part in (cu_seq_q, cu_seq_k))
    for first, last, start, end in zip(queries, queries[1:], keys, keys[1:], strict=False):
        assert last - first <= min(max_q, end - start) and end - start <= max_k
        rows = torch.arange(end - start)[end - start - (last - first) :, None]  # the last of the keys
        left = window_size[0] if window_size[0] >= 0 else math.inf
        seen = (rows >= torch.arange(end - start)) & (rows - torch.arange(end - start) <= left)
        k, v = (x[start:end].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = torch.einsum("thd,shd->hts", query[first:last], k) * (scale or query.shape[2] ** -0.5)
        outputs.append(torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v))
    return torch.cat(outputs)


def without_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:
    """The form of torch 2.10."""
    window = (-1, 0) if is_causal else (-1, -1)
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window, enable_gqa=True)


def top_left(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """A kernel that counts a segment's queries from its first key."""
    counts = cu_seq_q.diff()
    key, value = (
        torch.cat([x[start : start + n] for start, n in zip(cu_seq_k.tolist(), counts.tolist(), strict=False)])
        for x in (key, value)
    )
    how: Any = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_q, max_q, max_k, **how)


def refusing(*args: Any, window_size: Any) -> torch.Tensor:
    """A kernel that does not take the type or the width of heads."""
    raise RuntimeError("FlashAttention only supports fp16 and bf16")


@pytest.mark.parametrize(
    ("kernel", "scaling", "window", "usable"),
    [
        (varlen_attn, 0.3, None, True),
        (varlen_attn, 0.3, 2, True),
        (without_window, 8**-0.5, None, True),
        (without_window, 0.3, None, False),
        (without_window, 8**-0.5, 2, False),
        (top_left, 0.3, None, False),
        (refusing, 0.3, None, False),
    ],
)
def test_a_kernel_is_taken_if_it_computes_what_the_masked_one_does(
    kernel: Callable[..., torch.Tensor], scaling: float, window: int | None, usable: bool
) -> None:
    """Catches: a version of torch whose kernel has no window or scale, or aligns the causal mask otherwise, and is believed."""
    found = packing.proven(kernel, torch.device("cpu"), torch.float32, (6, 2, 8), scaling, window)
    assert (found is not None) == usable


@pytest.mark.parametrize("varlen", [False, True], ids=["masked", "varlen"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_separate_rows(
    family: str, side: str, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong position, a mask that misses the opening, or keys repeated without gradient would all show here."""
    if varlen:

        def kernel(query: torch.Tensor, key: torch.Tensor, scaling: float, _: float, window: int | None) -> Any:
            shape = (query.shape[1], key.shape[1], query.shape[3])
            found = packing.proven(varlen_attn, query.device, query.dtype, shape, scaling, window)
            assert found is not None
            return found

        monkeypatch.setattr(packing, "varlen_kernel", kernel)
    model = build_model(family, 32, dtype=torch.float64)
    ids, mask = batch(side)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    results = []
    for shared in (False, True):
        if shared:
            assert pack_rows(model)
        model.zero_grad()
        hidden = backbone(model)(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        real = hidden[mask.bool()]
        (real**2).sum().backward()
        results.append((real.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    assert len(results[0][1]) == len(results[1][1])
    atol = 1e-4 if family == "llama" else 1e-9  # Llama's norm works in fp32 whatever the model's type
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [[OPENING, [12, 13]], ROWS], ids=["apart", "shared"])
def test_the_keys_of_rows_that_share_nothing_are_not_copied(rows: list[list[int]]) -> None:
    """Catches: a copy of all keys in every layer of every pass, which rows without a common beginning do not need."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    segments = packing.Layout.of(ids, ids > 0).segments
    assert (segments.keys is None) == (rows is not ROWS)
    lengths = list(map(len, rows)) if rows is not ROWS else [len(OPENING), *map(len, rows)]
    assert segments.key_ends.diff().tolist() == lengths


@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize("masked", ["(T, S)", "(B, 1, T, S)", ""])
def test_a_gpus_attention_is_that_of_a_cpu(masked: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key heads repeated in another order than query heads share them; grouped heads asked for together with a mask, for which
    CUDA has only the slow kernel that holds all weights; and keys repeated for few queries, as in each step of decoding."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, n, 8, generator=generator) for heads, n in ((6, length), (2, 7), (2, 7)))
    shapes = {"(T, S)": (length, 7), "(B, 1, T, S)": (3, 1, length, 7)}
    mask = torch.rand(shapes[masked], generator=generator) < 0.7 if masked else None
    kernel, asked = torch.nn.functional.scaled_dot_product_attention, list[tuple[bool, int]]()

    def spy(query: Any, key: Any, value: Any, *, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
        asked.append((enable_gqa, key.shape[1]))
        return kernel(query, key, value, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    fused = packing._attend_fused(query, key, value, mask, 0.3, 0.0)
    seen = torch.ones(3, 1, length, dtype=torch.bool) if mask is None else mask.any(dim=-1).expand(3, 1, length)
    plain = packing._attend(query, key, value, mask, 0.3, 0.0)
    rows = seen.expand(3, 6, length)  # a row that sees nothing is padding, and anything
    torch.testing.assert_close(fused[rows], plain[rows], rtol=0, atol=1e-5)
    # 2 key heads x 8 wide: of 17 queries, repeated keys are smaller than repeated lines of the mask
    assert asked == [(not masked, 6 if masked and length == 17 else 2)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_common_prefix_ignores_padding_and_leaves_every_row_a_token(side: str) -> None:
    """A row that is all opening would have nothing left to predict from."""
    ids, mask = batch(side)
    assert common_prefix(ids, mask.bool()) == len(OPENING)
    same = torch.tensor([[1, 2, 3]]).expand(2, -1)
    assert common_prefix(same, torch.ones(2, 3, dtype=torch.bool)) == 2
    assert common_prefix(ids[:1], mask[:1].bool()) == 0


def test_what_rows_begin_with_alike_is_computed_once_and_padding_never() -> None:
    """The switch could silently fall through to separate rows; the number of tokens seen by the first layer tells."""
    model = build_model("llama", 32)
    assert pack_rows(model)
    seen: list[int] = []
    backbone(model).layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    ids, mask = batch("left")
    backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    assert seen == [len({tuple(row[: end + 1]) for row in ROWS for end in range(len(row))})]


def test_responses_to_one_prompt_stay_together_where_they_fit() -> None:
    """Catches: prompts cut in two for nothing, batches over the limit, rows that are lost or scored twice."""
    prompt = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3])
    assert [batch.tolist() for batch in prompt_batches(prompt, 5)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],  # seven responses do not fit
        [10, 11, 12],
    ]
    assert [batch.tolist() for batch in prompt_batches(prompt[:5], 4)] == [[0, 1, 2], [3, 4]]
    lengths = torch.tensor([4, 5, 4, 9, 3, 3, 3, 3, 3, 3, 3, 3, 11])
    for batch in (budget := prompt_batches(prompt, 5, lengths, 10)):
        assert len(batch) == 1 or len(batch) * int(lengths[batch].max()) <= 10
    assert torch.cat(budget).tolist() == list(range(len(prompt))), "rows lost or in another order"
    assert len(budget) > len(prompt_batches(prompt, 5))
