"""Base models: loading, quantisation, merging finished adapters, context length."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.config import ComputeConfig
from rlhf.models.adapters import attach_adapter, read_adapter_config
from rlhf.models.anatomy import anatomy
from rlhf.models.catalogue import resolve_model
from rlhf.models.compute import Compute, quiet_transformers
from rlhf.models.inputs import require_same_base
from rlhf.models.packing import pack_rows
from rlhf.models.tokenization import load_tokenizer
from rlhf.models.vocabulary import fit_embeddings
from rlhf.registry import Artifact

#: Classes of models for which the notice of eager attention was printed.
_EAGER: set[type] = set()


def load_base(
    name_or_path: str,
    config: ComputeConfig,
    compute: Compute,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in the run's type, quantised if the config asks for it.

    Args:
        name_or_path: hub name, folder, `pypi:NAME` or `pretrain/NAME`.

    Raises:
        UserError: the model cannot be loaded.
    """
    quiet_transformers()
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        resolve_model(name_or_path, config.registry),
        revision=revision,
        dtype=compute.dtype,
        quantization_config=_quantization(config, compute),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # a pickle can run code
    )
    try:
        model = load_with_attention(load, config)
    except (OSError, ValueError) as error:
        allow = "; if you have read it and trust it: --trust_remote_code true" if "custom code" in str(error) else ""
        raise UserError(f"cannot load the model '{name_or_path}': {str(error).splitlines()[0]}{allow}") from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights for a CPU kernel that has no backward pass: gradients silently wrong.
            cast(Any, module).support_avx512bf16_for_cpu = False
    model.config.use_cache = True
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        model.config.get_text_config().output_router_logits = False  # no stage has a loss on them
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = (
            0  # RWKV would halve weights whenever it leaves training, under adapters and saved files
        )
    if config.quantization == "none":
        cast(nn.Module, model).to(compute.device)
    anatomy(model)  # raises now for a model that would train wrongly
    if config.attn_implementation == "auto" and not pack_rows(model):
        print(f"{type(model).__name__} cannot be packed: padding and shared prefixes of prompts cost time")
    return model


def load_with_attention(load: Callable[..., PreTrainedModel], config: ComputeConfig) -> PreTrainedModel:
    """Return what `load(attn_implementation=...)` returns; `auto` is sdpa, or eager for models that have no other."""
    if config.attn_implementation != "auto":
        return load(attn_implementation=config.attn_implementation)
    try:
        return load(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    model = load(attn_implementation="eager")
    if type(model) not in _EAGER:
        _EAGER.add(type(model))
        print(
            f"{type(model).__name__} has no sdpa attention: it is computed eagerly, which takes more memory", flush=True
        )
    return model


def _quantization(config: ComputeConfig, compute: Compute) -> BitsAndBytesConfig | None:
    if config.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute.dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if config.quantization == "8bit" else None


def load_policy(
    artifact: Artifact, config: ComputeConfig, compute: Compute, adapter: Path | None = None
) -> PreTrainedModel:
    """Load the policy of an `sft` artefact as a plain causal model: its base with the adapter merged.

    Args:
        adapter: folder of a finished PPO policy, which is merged on top.
    """
    require_same_base(artifact, config.registry)
    folders = [artifact.path] if adapter is None else [artifact.path, adapter]
    m = artifact.manifest
    return load_merged(m.base_model, folders, config, compute, revision=m.base_model_revision)


def load_merged(
    name_or_path: str,
    adapters: Sequence[Path],
    config: ComputeConfig,
    compute: Compute,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model with the adapters of several folders merged, one on top of the other, and freeze it.

    Quantisation comes after merging in full precision: merging into 4-bit weights would round the adapters away.
    """
    plain = copy.copy(config)
    plain.quantization = "none"
    merged = load_base(name_or_path, plain, compute, revision=revision, trust_remote_code=trust_remote_code)
    for folder in adapters:
        merged = merge_adapter(merged, folder)
    if config.quantization == "none":
        return merged
    with tempfile.TemporaryDirectory() as saved:
        merged.save_pretrained(saved)
        return load_base(saved, config, compute, trust_remote_code=trust_remote_code).requires_grad_(False)


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a finished adapter into the model's weights, for good, and freeze it.

    Raises:
        UserError: the folder holds no adapter for this model.
    """
    fit_vocabulary(base, folder)
    return cast(Any, attach_adapter(base, folder)).merge_and_unload().requires_grad_(False)


def fit_vocabulary(base: PreTrainedModel, folder: Path) -> None:
    """Add embedding rows for the tokens that an adapter has added; the adapter brings their values.

    Raises:
        UserError: the folder holds no adapter, or the tokenizer in it has more or fewer tokens than the adapter.
    """
    new_rows = read_adapter_config(folder).trainable_token_indices
    if not new_rows:
        return
    largest = max(max(rows) for rows in (new_rows.values() if isinstance(new_rows, dict) else [new_rows]))
    tokens = len(load_tokenizer(str(folder), chat_template="plain"))  # any template will do: tokens are counted
    if largest != tokens - 1:
        raise UserError(
            f"the tokenizer of {folder} has {tokens} tokens, and its adapter was trained with {largest + 1}: "
            "the vocabularies differ; train it again"
        )
    fit_embeddings(base, tokens)


def context_length(model: PreTrainedModel) -> int:
    """Return the tokens that a model has positions for: `sys.maxsize` where its config names no limit (ALiBi)."""
    return _positions(model.config)


def base_context_length(artifact: Artifact, registry: str) -> int:
    """Return the `context_length` of an artefact's base model, from its config alone.

    Raises:
        UserError: the base model's config cannot be loaded.
    """
    m = artifact.manifest
    source = resolve_model(m.base_model, registry)
    try:
        return _positions(AutoConfig.from_pretrained(source, revision=m.base_model_revision, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model '{m.base_model}': {str(error).splitlines()[0]}") from error


def _positions(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
