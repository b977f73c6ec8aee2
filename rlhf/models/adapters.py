"""LoRA adapters: adding, saving and reading them, and computing with one merged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.config import StageConfig
from rlhf.models.anatomy import anatomy
from rlhf.models.compute import Compute
from rlhf.models.fused import FusedLinear
from rlhf.models.heads import ScalarHead

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_LAYER_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def lora_config(
    config: StageConfig,
    task_type: str,
    *,
    dropout: float | None = None,
    new_tokens: dict[str, list[int]] | None = None,
) -> LoraConfig:
    """Return the configuration of a stage's adapter; a reward model's (`SEQ_CLS`) includes the score head.

    Args:
        dropout: replaces the stage's `lora_dropout`.
        new_tokens: rows of embedding layers that train with it, as `token_rows` returns them.
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


def fitted(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """Return the config of an adapter on all linear layers with what a causal model needs besides.

    Fused experts are parameters of three dimensions, which peft adapts by name. Linear layers after the backbone, and those
    whose weights are read without calling the layer, get no adapter.

    Raises:
        UserError: the model has fused experts, and the config has what peft cannot give them.
    """
    if config.target_modules != "all-linear":
        return config
    experts = fused_experts(model)
    for option, value in (("lora_dropout", config.lora_dropout), ("use_dora", config.use_dora)):
        if experts and value:
            raise UserError(
                f"the experts of {type(model).__name__} are fused, and peft adapts those without {option}; leave it out"
            )
    trunk, output = f"{anatomy(model).trunk}.", model.get_output_embeddings()
    after = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and not name.startswith(trunk)
        and ".lora_" not in name
    }
    config = copy.copy(config)
    excluded = after | anatomy(model).unused
    if experts:
        config.target_parameters = sorted({_target_name(name) for name in experts})
        excluded |= _lost_by_peft(model, config)
    if excluded:
        config.exclude_modules = _ends_of_names(excluded, {name for name, _ in model.named_modules()} - excluded)
    return config


def _ends_of_names(names: set[str], others: set[str]) -> list[str]:
    """Return the shortest ends of names, of two words or more, that none of the other names has."""
    taken = {tuple(other.split(".")[-size:]) for other in others for size in range(2, other.count(".") + 2)}
    ends = set()
    for name in names:
        words = name.split(".")
        size = next((n for n in range(2, len(words)) if tuple(words[-n:]) not in taken), len(words))
        ends.add(".".join(words[-size:]))
    return sorted(ends)


def _lost_by_peft(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """Return the layers whose adapters peft saves but does not load: it renames layers that are called like old experts."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        twin: Any = get_peft_model(cast(Any, type(model))(copy.deepcopy(model.config)), copy.deepcopy(config))
    state = get_peft_model_state_dict(twin, save_embedding_layers=False)
    missing = cast(Any, set_peft_model_state_dict(twin, state)).missing_keys
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in missing if ".lora_" in key}


def fused_experts(model: PreTrainedModel) -> list[str]:
    """Return the names of parameters that hold the weights of all experts of a layer, (experts, ..., ...)."""
    settings = vars(model.config.get_text_config())
    counts = {value for name, value in settings.items() if "expert" in name and type(value) is int}
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.") and not isinstance(module, LoraLayer)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) in counts and min(parameter.shape) > 1
    ]


def matrices_without_adapter(model: nn.Module) -> list[str]:
    """Return the names of the weight matrices without an adapter, numbers as `*`; embeddings and heads are not meant."""
    adapted = {id(adapted_weight(layer)) for layer in lora_layers(model).values()}
    outputs = {id(m.get_output_embeddings()) for m in model.modules() if isinstance(m, PreTrainedModel)}
    names = dict[str, None]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | ScalarHead) or id(module) in outputs or ".lora_" in name:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in adapted:
                shown = re.sub(r"^(peft\.)?base_model\.model\.|\.base_layer", "", f"{name}.{own}")
                names[re.sub(r"\.\d+\.", ".*.", shown)] = None
    return list(names)


def _target_name(name: str) -> str:
    """Return the end of a parameter's name by which peft finds it: one word, as peft names them itself, if it tells enough."""
    words = name.split(".")
    return words[-1] if words[-1] != "weight" else ".".join(words[-2:])


def adapted_weight(layer: LoraLayer) -> nn.Parameter:
    """Return the weight of the base that an adapter is added to."""
    if isinstance(layer, ParamWrapper):
        return cast(nn.Parameter, layer.get_param())
    return cast(nn.Parameter, layer.get_base_layer().weight)


def token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return the tokens' rows by name of embedding layer; an output layer counts if its weights are its own.

    Raises:
        UserError: the output layer has a bias, which peft leaves out of trained rows.
    """
    layers = [model.get_input_embeddings()]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"the output layer of {type(model).__name__} has a bias, which would be lost; "
            "leave out new_tokens and learn_tokens, or take another base model"
        )
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    return {name: list(tokens) for name, module in model.named_modules() if any(module is layer for layer in layers)}


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add a fresh trainable adapter to the model, in fp32 whatever the base's type; return the adapted model.

    Raises:
        UserError: the model has none of the adapter's layers.
    """
    try:
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:  # peft leaves only these in the base's type
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            if ".modules_to_save." in name and ".score." not in name:  # any `classifier`, as some routers are called
                parameter.requires_grad_(False)
        return cast(PeftModel, adapted)
    except ValueError as error:
        raise UserError(
            f"{type(model).__name__} cannot have adapters on lora_target_modules {config.target_modules}: "
            f"{str(error).splitlines()[0]}; use all-linear, or its layer names"
        ) from error


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _LAYER_NAME.fullmatch(name) for name in value)


def _is_sizes(value: Any, is_size: Callable[[Any], bool]) -> bool:
    """Return True for sizes by the patterns that peft makes of the names of fused experts, and for none."""
    if value is None:
        return True
    names = [key.removeprefix(r".*\.") for key in value] if isinstance(value, dict) else None
    return _is_names(names) and all(map(is_size, value.values()))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 16


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def _is_rows_by_name(value: Any) -> bool:
    return isinstance(value, dict) and _is_names([*value]) and all(map(_is_rows, value.values()))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value in ("CAUSAL_LM", "SEQ_CLS"),
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "lora_dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "target_modules": lambda value: value == "all-linear" or _is_names(value),
    "target_parameters": lambda value: value is None or _is_names(value),
    "exclude_modules": lambda value: value is None or _is_names(value),
    "rank_pattern": lambda value: _is_sizes(value, _is_rank),
    "alpha_pattern": lambda value: _is_sizes(value, _is_alpha),
    "modules_to_save": lambda value: value is None or _is_names(value),
    "trainable_token_indices": lambda value: value is None or _is_rows(value) or _is_rows_by_name(value),
    "fan_in_fan_out": lambda value: type(value) is bool,
    "use_rslora": lambda value: type(value) is bool,
    "use_dora": lambda value: type(value) is bool,
}
"""Fields of an adapter's configuration that are read, each with the test of its value."""
_NOTES = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
"""Fields that change nothing in how an adapter computes; they are not read."""


def read_adapter_config(folder: Path) -> LoraConfig:
    """Return the configuration of a saved LoRA adapter, checked field by field before peft sees it.

    Other fields of peft's name modules that it imports, patterns that it matches and layers that it copies; they must have
    their defaults.

    Raises:
        UserError: there is no configuration, or one that this package does not write.
    """
    file = folder / ADAPTER_CONFIG
    try:
        fields = read_object(file, fix="it is no LoRA adapter of this package")
    except OSError as error:
        raise UserError(
            f"{folder} holds no adapter: {ADAPTER_CONFIG} cannot be read ({storage.reason(error)})"
        ) from error
    defaults: dict[str, Any] = {
        field.name: getattr(LoraConfig(), field.name) for field in dataclasses.fields(LoraConfig)
    }
    for name, value in fields.items():
        accepted = (
            _FIELDS[name](value) if name in _FIELDS else name in _NOTES or value == defaults.get(name) or not value
        )
        if not accepted:
            raise UserError(
                f"{file}: {name} is {value!r:.80}, which no LoRA adapter of this package has; it is not loaded"
            )
    if missing := sorted({"peft_type", "r", "lora_alpha", "target_modules"} - fields.keys()):
        raise UserError(f"{file} has no {missing[0]}; it is no LoRA adapter of this package")
    return LoraConfig(**{name: value for name, value in fields.items() if name in _FIELDS and name != "peft_type"})


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the model with a saved adapter, frozen.

    Raises:
        UserError: the folder holds no adapter for this model, or one that lacks tensors.
    """
    config = read_adapter_config(folder)
    config.inference_mode = True
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
        with safe_open(folder / ADAPTER_FILE, "pt") as file:
            names = set(file.keys())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no adapter for this model: {str(error).splitlines()[-1].strip()}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if different := sorted(names ^ expected):
        raise UserError(f"{folder} holds no adapter for this model: {different[0]} is on one side only")
    return cast(PeftModel, adapted)


@contextlib.contextmanager
def fast_adapters(model: nn.Module, compute: Compute) -> Iterator[None]:
    """Context in which adapters compute faster than peft's own layers, with the same results but for rounding.

    Plain adapters of plain layers are one function with their layer (`fuse_adapters`). Under bf16 autocast peft does not
    cast the inputs of the others to fp32, from which autocast would cast them straight back. (PEFT's own
    `disable_input_dtype_casting` breaks at the layers of added tokens.) A backward pass that recomputes activations belongs
    into the context, too: peft's layers save other tensors.
    """
    layers = list(lora_layers(model).values())
    before = [(type(layer), layer.cast_input_dtype_enabled) for layer in layers]
    for layer in layers:
        if compute.fuse_adapters and type(layer) is Linear:
            layer.__class__ = FusedLinear
        if compute.bf16:
            layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, (kind, cast_input) in zip(layers, before, strict=True):
            layer.__class__, layer.cast_input_dtype_enabled = kind, cast_input


def save_adapter(model: PeftModel, folder: Path, *, adapter: str, base_model: str) -> None:
    """Write an adapter folder (`adapter_config.json`, `adapter_model.safetensors`) that plain peft opens.

    Equal adapters give equal bytes.
    """
    # By default peft saves both whole embeddings wherever the vocabulary is not the base model's.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for name, parameter in model.named_parameters():  # peft leaves out layers that are called as another adapter
        if match := re.fullmatch(rf"(.*\.lora_[AB])\.{adapter}\.weight", name):
            state.setdefault(f"{match[1]}.weight", parameter)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / ADAPTER_FILE)
    config: Any = model.peft_config[adapter]
    saved = copy.copy(config)
    saved.inference_mode, saved.base_model_name_or_path = True, base_model
    if isinstance(config.target_modules, set):  # its order differs from process to process
        saved.target_modules = sorted(config.target_modules)
    saved.save_pretrained(str(folder))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_adapter(model: PeftModel, folder: Path, *, adapter: str) -> None:
    """Replace an adapter's tensors by those that `save_adapter` wrote; tensors that the file lacks stay."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE), adapter_name=adapter)


@contextlib.contextmanager
def added_to_base(
    layers: Sequence[LoraLayer], adapter: str, copies: MutableMapping[LoraLayer, Tensor] | None = None
) -> Iterator[None]:
    """Context in which an adapter is added to *copies* of the base weights; the caller switches the adapter off.

    Leaving restores the base tensors themselves, bit for bit, which subtracting the adapter again would not. `copies` keeps
    the copies' memory, so that the next ones lie in the same places.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            weight = adapted_weight(layer)
            delta = cast(Any, layer).get_delta_weight(adapter)
            originals.append((weight, weight.data))
            total = (weight.data + delta).to(weight.dtype)
            if copies is not None:
                total = copies.setdefault(layer, total).copy_(total)
            weight.data = total
        yield
    finally:
        for weight, data in originals:
            weight.data = data


@contextlib.contextmanager
def dequantised(model: nn.Module, adapter: str, dtype: torch.dtype) -> Iterator[None]:
    """Context in which 4-bit and 8-bit layers are plain ones of a type, with an adapter added; the caller switches it off.

    Products with plain weights are several times faster than those that expand the weights each time. The copies are gone
    afterwards, and the layers are those that were there before.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent, name, layer in _quantised_layers(model):
            weight = _expanded(layer).to(dtype)
            if isinstance(parent, LoraLayer) and adapter in parent.lora_A:
                weight = (weight + cast(Any, parent).get_delta_weight(adapter)).to(dtype)
            plain: Any = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
            replaced.append((parent, name, layer))
            parent._modules[name] = plain
        yield
    finally:
        for parent, name, layer in replaced:
            parent._modules[name] = layer


def dequantised_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the copies that `dequantised` makes; 0 where nothing is quantised."""
    layers = [layer for _, _, layer in _quantised_layers(model)]
    return sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize


def _quantised_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return the layers that are held in 4 or 8 bits, each with its parent and its name there."""
    return [(m, name, layer) for m in model.modules() for name, layer in m.named_children() if _is_quantised(layer)]


def _is_quantised(layer: nn.Module) -> bool:
    """Return True for bitsandbytes' layers, and for a plan's, which have `expanded`."""
    kind = type(layer)
    bitsandbytes = kind.__module__.startswith("bitsandbytes.") and kind.__name__ in ("Linear4bit", "Linear8bitLt")
    return bitsandbytes or hasattr(kind, "expanded")


def _expanded(layer: Any) -> Tensor:
    """Return the whole weight of a quantised layer."""
    if hasattr(type(layer), "expanded"):
        return cast(Tensor, layer.expanded())
    return cast(Tensor, dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)))


@contextlib.contextmanager
def merged_adapter(model: PeftModel, adapter: str) -> Iterator[None]:
    """Context in which a model with one adapter computes with it merged, as a loaded model does."""
    layers = list(lora_layers(model).values())
    try:
        for layer in layers:
            layer._disable_adapters = True
        with torch.no_grad(), added_to_base(layers, adapter):
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
