"""Packing the rows of a batch must not change what is computed, nor its gradients."""

from __future__ import annotations

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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_separate_rows(family: str, side: str) -> None:
    """A wrong position, a mask that misses the opening, or keys repeated without gradient would all show here."""
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


@pytest.mark.parametrize("mask_shape", [(5, 7), (3, 1, 5, 7), None])
def test_a_gpus_attention_is_that_of_a_cpu(mask_shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key heads repeated in another order than query heads share them; and grouped heads asked for together with a mask, for
    which CUDA has only the slow kernel that holds all weights."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, n, 8, generator=generator) for heads, n in ((6, 5), (2, 7), (2, 7)))
    mask = None if mask_shape is None else torch.rand(mask_shape, generator=generator) < 0.7
    kernel, asked = torch.nn.functional.scaled_dot_product_attention, list[bool]()

    def spy(*args: Any, enable_gqa: bool, **kwargs: Any) -> torch.Tensor:
        asked.append(enable_gqa)
        return kernel(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    fused = packing._attend_fused(query, key, value, mask, 0.3, 0.0)
    seen = torch.ones(3, 1, 5, dtype=torch.bool) if mask is None else mask.any(dim=-1).expand(3, 1, 5)
    plain = packing._attend(query, key, value, mask, 0.3, 0.0)
    rows = seen.expand(3, 6, 5)  # a row that sees nothing is padding, and anything
    torch.testing.assert_close(fused[rows], plain[rows], rtol=0, atol=1e-5)
    assert asked == [mask is None]


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
