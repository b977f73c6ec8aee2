"""A layer and its adapter as one function: peft's numbers, peft's gradients, and peft itself wherever it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.models.adapters import fast_adapters
from rlhf.models.compute import Compute
from rlhf.models.fused import FusedLinear


class Net(nn.Module):
    """Two layers, of which the first has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"], **options)
    model = get_peft_model(Net().to(dtype), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.promote_types(dtype, torch.float32)) / 2
    return model


def passed(model: Any, x: torch.Tensor, *, fuse: bool, bf16: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs, and the gradients of the input and of the adapters."""
    x = x.clone().requires_grad_()
    compute = Compute(torch.device("cpu"), torch.bfloat16 if bf16 else x.dtype, fuse)
    with fast_adapters(model, compute), compute.autocast():
        assert (type(model.base_model.model.up) is FusedLinear) == fuse
        out = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), [x, *trained])
    assert type(model.base_model.model.up) is not FusedLinear, "peft's layer is back"
    return out.detach(), list(gradients)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (1, 1, 6)])
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    model, x = adapted(), torch.randn(shape, dtype=torch.float64)
    (fused, own), (usual, expected) = passed(model, x, fuse=True), passed(model, x, fuse=False)
    torch.testing.assert_close(fused, usual, rtol=1e-12, atol=1e-12)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), fast_adapters(model, Compute(torch.device("cpu"), torch.float64)):
        torch.testing.assert_close(model(x), usual, rtol=1e-12, atol=1e-12)


def test_bf16_is_closer_to_the_exact_result_than_peft() -> None:
    """The sum of the two products is rounded once."""
    model, x = adapted(torch.float32), torch.randn(512, 6)
    exact, _ = passed(model, x, fuse=False)
    narrow, errors = adapted(torch.bfloat16), []
    for fuse in (True, False):
        out, gradients = passed(narrow, x.bfloat16(), fuse=fuse, bf16=True)
        assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients[1:])
        errors.append(float((out.float() - exact).square().mean().sqrt()))
    assert errors[0] < errors[1] < 0.2


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=["dora", "bias", "dropout"]
)
def test_what_does_not_fit_is_left_to_peft(options: dict[str, Any]) -> None:
    model, x = adapted(**options), torch.randn(5, 6, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = torch.randn_like(parameter)
    results = []
    for fuse in (True, False):
        torch.manual_seed(1)
        results.append(passed(model, x, fuse=fuse)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_adapters_that_are_off_or_several_are_left_to_peft() -> None:
    model, x = adapted(), torch.randn(5, 6, dtype=torch.float64)
    net = model.base_model.model
    with torch.no_grad(), model.disable_adapter(), fast_adapters(model, Compute(torch.device("cpu"), torch.float64)):
        expected = net.down.base_layer(torch.tanh(net.up.base_layer(x)))
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(passed(model, x, fuse=True)[0], passed(model, x, fuse=False)[0], rtol=0, atol=0)


def test_only_what_trains_gets_a_gradient() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".down." in name and "lora_A" in name)
    with fast_adapters(model, Compute(torch.device("cpu"), torch.float64)):
        model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"base_model.model.down.lora_A.default.weight"}
