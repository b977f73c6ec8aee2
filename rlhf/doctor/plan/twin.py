"""Models without weights, made from a config: what a stage would load, in shape, type and place."""

from __future__ import annotations

import copy
from typing import Any, cast

import bitsandbytes  # noqa: F401  registers the operators of quantised layers
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.config import ComputeConfig
from rlhf.models.anatomy import assume_usual, backbone
from rlhf.models.base import load_with_attention
from rlhf.models.catalogue import resolve_model
from rlhf.models.compute import quiet_transformers
from rlhf.models.packing import pack_unprobed

#: Elements that share a scale in 4 bits.
_BLOCK = 64


def read_shape(
    name_or_path: str, registry: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return a model's config, from its folder or the hub; no weights are read.

    Raises:
        UserError: there is none that can be reached.
    """
    try:
        source = resolve_model(name_or_path, registry)
        return cast(
            PreTrainedConfig, AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of '{name_or_path}': {str(error).splitlines()[0]}") from error


def layers(shape: PreTrainedConfig) -> int:
    """Return the number of layers; 0 where the config does not name it."""
    return int(getattr(shape.get_text_config(), "num_hidden_layers", 0) or 0)


def shortened(shape: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Return the config of a model with fewer layers that is the same otherwise."""
    short = copy.deepcopy(shape)
    text, whole = short.get_text_config(), layers(shape)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole and name.startswith("layer"):
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return short


def twin(shape: PreTrainedConfig, config: ComputeConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a causal model on the meta device that is packed and quantised as `load_base` would do it."""

    def build(attn_implementation: str) -> PreTrainedModel:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return cast(
                PreTrainedModel,
                AutoModelForCausalLM.from_config(
                    copy.deepcopy(shape), attn_implementation=attn_implementation, dtype=dtype
                ),
            )

    quiet_transformers()
    model = load_with_attention(lambda attn_implementation: build(attn_implementation), config)
    model.config.use_cache = True
    assume_usual(model)
    if config.quantization != "none":
        quantise(model, four_bit=config.quantization == "4bit")
    if config.attn_implementation == "auto":
        pack_unprobed(model)
    return model.requires_grad_(False)


class Quantised(nn.Linear):
    """A linear layer whose weight is held in 4 or 8 bits and expanded for each product, as bitsandbytes does it."""

    def __init__(self, layer: nn.Linear, *, four_bit: bool) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, "meta", layer.weight.dtype)
        self.four_bit, self.kind, size = four_bit, layer.weight.dtype, layer.weight.numel()
        held = torch.empty((size + 1) // 2 if four_bit else size, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(held, requires_grad=False)
        scales = -(-size // _BLOCK) if four_bit else 4 * layer.out_features
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the expanded weight."""
        return cast(Tensor, _Expanded.apply(x.to(self.kind), self.weight, self)) + (
            0 if self.bias is None else self.bias
        )

    def expanded(self) -> Tensor:
        """Return the whole weight."""
        shape = (self.out_features, self.in_features)
        if self.four_bit:
            scales = self.weight.new_empty(-(-self.weight.numel() * 2 // _BLOCK), dtype=torch.float32)
            return torch.ops.bitsandbytes.dequantize_4bit(self.weight, scales, _BLOCK, "nf4", shape, self.kind)
        return self.weight.view(shape).to(self.kind)


class _Expanded(torch.autograd.Function):
    """The product with a weight that is expanded in both passes and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(held)
        return nn.functional.linear(x, layer.expanded())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.layer.expanded(), None, None


def quantise(model: PreTrainedModel, *, four_bit: bool) -> None:
    """Replace the linear layers of the backbone by quantised ones."""
    for parent in list(backbone(model).modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Quantised(child, four_bit=four_bit))
    cast(Any, model).is_quantized = True
