"""Sampling from a plain copy of a base that is held in 4 or 8 bits."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from toys import build_model

from rlhf.config import SFTConfig, build
from rlhf.models import graphs
from rlhf.models.adapters import lora_layers
from rlhf.models.base import load_base
from rlhf.models.compute import Compute
from rlhf.models.roles import SharedModels
from rlhf.models.sampling import sample


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_samples_from_a_plain_copy(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a copy without the adapter, with it twice or of other weights, one that stays after the rollout, and one that is
    made where there is no memory. The oracle holds the dequantised weights, and adds the adapter by hand."""
    compute = Compute(torch.device("cpu"), torch.float32)
    build_model("llama", 64).save_pretrained(tmp_path)
    required = {"name": "toy", "dataset": "none", "model_name_or_path": str(tmp_path)}
    configs = [build(SFTConfig, {**required, "quantization": kind}, "test") for kind in (quantization, "none")]
    base, plain = (load_base(str(tmp_path), config, compute) for config in configs)
    models = SharedModels(base, LoraConfig(r=4, target_modules="all-linear"), compute)
    for parameter in models.trainable("policy").values():
        torch.nn.init.normal_(parameter, std=0.3)
    before = {name: id(module) for name, module in models.causal.named_modules()}
    size = 0
    adapted: dict[str, Any] = dict(lora_layers(models.causal))
    for name, layer in adapted.items():
        held = layer.get_base_layer()
        kind = bitsandbytes.functional
        weight = (
            kind.dequantize_4bit(held.weight.data, held.weight.quant_state)
            if quantization == "4bit"
            else kind.int8_vectorwise_dequant(held.weight.data, held.state.SCB)
        )
        delta = layer.lora_B["policy"].weight @ layer.lora_A["policy"].weight * layer.scaling["policy"]
        plain.get_parameter(f"{name}.weight").data.copy_(weight + delta)
        size += 4 * weight.numel()

    def draws(model: Any) -> list[list[int]]:
        ids, mask = torch.tensor([[5, 6, 7], [20, 21, 22]]), torch.ones(2, 3, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        return sample(
            model,
            ids,
            mask,
            max_new_tokens=12,
            temperature=1.0,
            stop_token_ids=[2],
            pad_token_id=0,
            generator=generator,
        ).responses.tolist()

    expected = draws(plain)
    for total, copied in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(graphs, "total_bytes", lambda device, total=total: total)
        with torch.no_grad(), models.merged_policy() as policy:
            kinds = {type(layer.get_base_layer()) for layer in lora_layers(policy).values()}
            assert (kinds == {torch.nn.Linear}) == copied
            if copied:
                assert draws(policy) == expected
                copies = [weakref.ref(layer.get_base_layer().weight) for layer in lora_layers(policy).values()]
        assert {name: id(module) for name, module in models.causal.named_modules()} == before
    gc.collect()
    assert not any(copy() is not None for copy in copies)
    with models.role("reference"), torch.no_grad():
        assert draws(models.causal) != expected, "the adapter must make a difference"
