"""Registered models opened and computed plainly: with transformers, peft and safetensors, and nothing of `rlhf.models`.

A fault in the package's own loading, merging, packing or heads shows as a difference from these.

Legend: M rows, T tokens of the longest, d width.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from rlhf.base.assets import cache_dir

ADAPTER = "adapter_model.safetensors"
HEAD = "base_model.model.score.weight"
"""Name of the score head in an adapter's file."""
ROWS_AT_ONCE = 16
"""Rows of one forward pass."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Context of a loading that prints nothing and leaves torch's random numbers as they were; fresh adapters draw some."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    level = logging.root.manager.disable
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artefact's folder as it stands there."""
    return cast(dict[str, Any], json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def parent_folder(folder: Path, registry: Path, stage: str = "sft") -> Path:
    """Return the folder of the artefact of a stage that another one was made from."""
    parent = next(one for one in read_manifest(folder)["parents"] if one["stage"] == stage)
    return registry / stage / parent["name"] / f"v{parent['version']}"


def model_folder(name: str, registry: Path) -> str:
    """Return the folder of `pypi:NAME` or `pretrain/NAME@VERSION`; other names unchanged."""
    if name.startswith("pypi:"):
        return str(max((cache_dir() / "models").glob(f"{name.removeprefix('pypi:')}-*-v*[0-9]/")))
    path, _, version = name.partition("@")
    if path.startswith("pretrain/") and not Path(name).is_dir():
        versions = [
            int(place.name[1:]) for place in (registry / path).glob("v*") if (place / "manifest.json").is_file()
        ]
        return str(registry / path / f"v{version or max(versions)}")
    return name


def load_causal(
    folder: Path, registry: Path, dtype: torch.dtype, device: torch.device | str = "cpu", quantization: str = "none"
) -> Any:
    """Load a registered policy as one causal model, frozen, with its own adapter and its ancestors' merged.

    A quantised one is rounded after the merging, as in a run, and expanded to plain layers.
    """
    with undisturbed():
        model = _merged(folder, registry, dtype, device)
        if quantization != "none":
            with tempfile.TemporaryDirectory() as rounded:
                model.save_pretrained(rounded)
                model = load_base(rounded, registry, dtype, device, quantization=quantization)
    return model.eval().requires_grad_(False)


def _merged(folder: Path, registry: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    manifest = read_manifest(folder)
    if manifest["kind"] == "full":
        return load_base(str(folder), registry, dtype, device)
    if manifest["stage"] == "sft":
        model = load_base(manifest["base_model"], registry, dtype, device, revision=manifest["base_model_revision"])
    else:
        model = _merged(parent_folder(folder, registry), registry, dtype, device)
    fit_vocabulary(model, cast(Any, LoraConfig.from_pretrained(str(folder))))
    return cast(Any, PeftModel.from_pretrained(model, str(folder))).merge_and_unload()


def load_base(
    name: str,
    registry: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> Any:
    """Load a base model, frozen; a quantised one is rounded to 4 or 8 bits and expanded to plain layers."""
    settings = {
        "none": None,
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }
    with undisturbed():
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(name, registry),
            revision=revision,
            dtype=dtype,
            quantization_config=settings[quantization],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        if quantization != "none":
            model = model.dequantize().to(dtype)
    return model.to(device).eval().requires_grad_(False)


def fit_vocabulary(model: Any, config: LoraConfig) -> None:
    """Add embedding rows for the tokens whose values an adapter brings."""
    rows: Any = config.trainable_token_indices
    if rows:
        largest = max(max(numbers) for numbers in (rows.values() if isinstance(rows, dict) else [rows]))
        if largest >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(largest + 1, mean_resizing=False)


def adapted(model: Any, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Any:
    """Return a causal model with an adapter of given tensors, named as in an adapter's file; `HEAD` is passed over.

    Raises:
        ValueError: tensors are missing, or belong to no layer.
    """
    settings = {**config.to_dict(), "modules_to_save": None, "task_type": None, "base_model_name_or_path": None}
    plain = LoraConfig.from_peft_type(**settings)
    with undisturbed():
        adapter: Any = get_peft_model(model, cast(Any, plain))
    # peft also saves a copy of whatever is called `classifier`, which is frozen.
    own = {k: v for k, v in tensors.items() if k != HEAD and (".classifier." not in k or ".lora_" in k)}
    result: Any = set_peft_model_state_dict(adapter, own)
    missing = [name for name in result.missing_keys if ".lora_" in name or "trainable_tokens" in name]
    if wrong := [*result.unexpected_keys, *missing]:
        raise ValueError(f"the adapter is of another model: {wrong[0]} is on one side only")
    return adapter.eval()


@dataclass(frozen=True, kw_only=True)
class PlainScorer:
    """A linear score of the last hidden state of a row's last token, or of each token."""

    backbone: Any
    """Token ids to last hidden states."""
    head: Tensor
    """(1, d)."""
    bias: Tensor | float = 0.0
    mean: float = 0.0
    std: float = 1.0

    def raw(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores (M,) of rows of prompt and answer, read at the last token, without mean and spread."""
        return torch.cat([scores[-1:] for scores in self.by_token(rows)])

    def by_token(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the scores that would be read at each token of each row."""
        scores = []
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            ids, mask = padded(part, self.head.device)
            with precision(self.backbone):
                states = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            values = (states.to(self.head.dtype) @ self.head[0]) + self.bias
            scores += [value[: len(row)] for value, row in zip(values, part, strict=True)]
        return scores

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return normalised scores (M,): 0 is the mean of the demonstrations."""
        return (self.raw(rows) - self.mean) / self.std


def load_reward(
    folder: Path, registry: Path, dtype: torch.dtype, device: torch.device | str = "cpu", quantization: str = "none"
) -> PlainScorer:
    """Load a registered reward model, frozen: an adapter and a head on the merged SFT policy, or a whole model."""
    manifest = read_manifest(folder)
    if manifest["kind"] == "full":
        dtype = torch.promote_types(dtype, torch.float32)  # as it was trained
        with undisturbed():
            backbone: Any = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
        tensors = {
            name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()
        }
        head = tensors["score.weight"]
    else:
        causal = load_causal(parent_folder(folder, registry), registry, dtype, device, quantization)
        tensors = load_file(folder / ADAPTER)
        backbone = backbone_of(adapted(causal, cast(Any, LoraConfig.from_pretrained(str(folder))), tensors))
        head = tensors[HEAD]
    mean, std = manifest["reward_mean"], manifest["reward_std"]
    return PlainScorer(
        backbone=backbone.eval().requires_grad_(False),
        head=head.to(device, torch.promote_types(head.dtype, torch.float32)),
        mean=0.0 if mean is None else mean,
        std=1.0 if std is None else std,
    )


def backbone_of(model: Any) -> Any:
    """Return the part of a causal model, adapted or not, that ends in its last hidden states."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    return causal.base_model


def padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return rows as ids and mask (M, T), filled up on the right, where no token of a causal model sees it."""
    tensors = [torch.tensor(list(row), device=device) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return ids, mask


def token_logprobs(model: Any, rows: Sequence[Sequence[int]], temperature: float = 1.0) -> list[Tensor]:
    """Return the log-probability of each token but the first of each row, nats, given the tokens before it."""
    device, logprobs = next(model.parameters()).device, list[Tensor]()
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[first : first + ROWS_AT_ONCE]
        ids, mask = padded(part, device)
        with precision(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        distribution = (logits[:, :-1].float() / temperature).log_softmax(dim=-1)
        values = distribution.gather(2, ids[:, 1:, None]).squeeze(2)
        logprobs += [value[: len(row) - 1] for value, row in zip(values, part, strict=True)]
    return logprobs


def precision(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context of mixed precision where the model's weights are in bf16."""
    parameters = list(model.parameters())
    if not any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return contextlib.nullcontext()
    return torch.autocast(parameters[0].device.type, torch.bfloat16)
