"""Adapters: their shape, saving and reading them, and computing with one merged in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from rlhf.base.errors import UserError
from rlhf.config import StageConfig
from rlhf.models.compute import Compute

ADAPTER_FILE = "adapter_model.safetensors"


def lora_config(
    config: StageConfig,
    task_type: str,
    *,
    dropout: float | None = None,
    new_tokens: dict[str, list[int]] | None = None,
) -> LoraConfig:
    """The adapter's shape. A reward model trains and saves its score head with it.

    Args:
        new_tokens: rows of embedding layers that it trains and saves, too: what `token_rows` returns.
    """
    targets = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout if dropout is None else dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        trainable_token_indices=new_tokens,
        task_type=task_type,
    )


def token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Names of the embedding layers, the output's only where its weights are its own, -> the tokens' rows in them.

    Raises:
        UserError: the output layer has a bias, which peft's trained rows leave out.
    """
    layers = [model.get_input_embeddings()]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"the output layer of {type(model).__name__} has a bias, which rows that are trained alone would lose; "
            "leave out new_tokens and learn_tokens, or take another base model"
        )
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    return {name: list(tokens) for name, module in model.named_modules() if any(module is layer for layer in layers)}


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with one fresh trainable adapter, in fp32 whatever the base is held in.

    Raises:
        UserError: the model has no such layers.
    """
    try:
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:  # peft keeps these, and these only, in the base's type
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return cast(PeftModel, adapted)
    except ValueError as error:
        raise UserError(
            f"lora_target_modules {config.target_modules} are not in {type(model).__name__}; use all-linear, or its layer names"
        ) from error


@contextlib.contextmanager
def direct_casting(model: nn.Module, compute: Compute) -> Iterator[None]:
    """Context for adapters under bf16 autocast: leaves out PEFT's cast of each layer's input to the adapter's fp32.

    Autocast would cast it straight back to bf16, so the products are the same, and two casts a layer cheaper. (PEFT's own
    `disable_input_dtype_casting` breaks at the layers of added tokens.)
    """
    layers = list(lora_layers(model).values()) if compute.bf16 else []
    was = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, was, strict=True):
            layer.cast_input_dtype_enabled = enabled


def save_adapter(model: PeftModel, folder: Path, *, adapter: str, base_model: str) -> None:
    """A peft adapter folder (`adapter_config.json`, `adapter_model.safetensors`) that plain peft opens.

    The same adapter gives the same bytes.
    """
    # Left to itself, peft brings both whole embeddings along wherever the vocabulary is not the base model's.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / ADAPTER_FILE)
    config: Any = model.peft_config[adapter]
    changed = {"inference_mode": True, "base_model_name_or_path": base_model}
    if isinstance(config.target_modules, set):  # whose order is another one in every process
        changed["target_modules"] = sorted(config.target_modules)
    was = {name: getattr(config, name) for name in changed}
    try:
        vars(config).update(changed)
        config.save_pretrained(str(folder))
    finally:
        vars(config).update(was)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that adapters sit on, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_adapter(model: PeftModel, folder: Path, *, adapter: str) -> None:
    """Puts what `save_adapter` wrote in place of an adapter's tensors; those that the file lacks stay as they are."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE), adapter_name=adapter)


@contextlib.contextmanager
def added_to_base(layers: Sequence[LoraLayer], adapter: str) -> Iterator[None]:
    """Inside, the adapter is added to *copies* of the base weights; whoever calls this switches the adapter itself off.

    Leaving puts the very same base tensors back, so that they stay bit-identical: subtracting the adapter again would not.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            weight = cast(nn.Parameter, layer.get_base_layer().weight)
            delta = cast(Any, layer).get_delta_weight(adapter)
            kept.append((weight, weight.data))
            weight.data = (weight.data + delta).to(weight.dtype)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


@contextlib.contextmanager
def merged_adapter(model: PeftModel, adapter: str) -> Iterator[None]:
    """Inside, a model with one adapter computes with it merged in, as whoever loads it will."""
    layers = list(lora_layers(model).values())
    try:
        for layer in layers:
            layer._disable_adapters = True
        with torch.no_grad(), added_to_base(layers, adapter):
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
