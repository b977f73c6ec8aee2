"""Artefacts as plain folders that transformers, or peft, opens without this package: `python -m rlhf.registry export`

`merged` holds the whole model: the base with the adapters of the SFT policy and of the artefact added in. `adapter` holds one
adapter on the *base model*. An artefact's own adapter sits on its SFT policy; as both change the same weights by a low-rank
product, W + B1 A1 + B2 A2 = W + [B1 B2] [A1; A2], the two are exactly one adapter of the added rank.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from rlhf.base.errors import UserError
from rlhf.base.json_files import decode, read_object
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.registered import MANIFESTS, merged_model, policy_of
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.registry.lineage import ancestors
from rlhf.sharing.model_card import model_card

Form = Literal["merged", "adapter"]


FORMS: tuple[Form, ...] = ("merged", "adapter")


DTYPES = ("float32", "bfloat16", "float16")


def export(registry: Registry, artifact: Artifact, folder: Path, form: Form = "merged", dtype: str = "float32") -> Path:
    """Writes an artefact as a plain folder with a model card.

    Args:
        artifact: of stage pretrain, sft, reward or ppo; verified.
        folder: must not be there, or be empty.
        dtype: in which a merged model is written; it is merged in float32.

    Raises:
        UserError: the folder holds something, or the artefact has no such form.
    """
    if artifact.stage not in ("pretrain", "sft", "reward", "ppo"):
        raise UserError(f"{artifact.reference} is no model; pretrain, sft, reward and ppo artefacts can be exported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; give another folder")
    write: Callable[[Path], None]
    if form == "adapter":
        check_adapter(registry, artifact)

        def write(place: Path) -> None:
            _write_adapter(registry, artifact, place)
    else:

        def write(place: Path) -> None:
            _write_merged(registry, artifact, place, getattr(torch, dtype))

    partial = folder.absolute().with_name(f".partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        write(partial)
        load_tokenizer(str(artifact.path)).save_pretrained(partial)
        (partial / "README.md").write_text(model_card(registry, artifact, form, dtype), encoding="utf-8")
        (partial / MANIFESTS).write_text(json.dumps(_manifests(registry, artifact), indent=1), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        return partial.rename(folder.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_merged(registry: Registry, artifact: Artifact, folder: Path, dtype: torch.dtype) -> None:
    merged: Any = merged_model(registry, artifact)
    model = merged.to(dtype)
    m = artifact.manifest
    model.config.pad_token_id, model.config.eos_token_id = m.pad_token_id, m.stop_token_ids[0]
    if artifact.stage != "reward":
        # Sampled as it was trained: nothing of the base model's habits (top-k, penalties) is left.
        model.generation_config = GenerationConfig(
            pad_token_id=m.pad_token_id,
            eos_token_id=m.stop_token_ids,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    model.save_pretrained(folder)


def check_adapter(registry: Registry, artifact: Artifact) -> None:
    """Refuses what cannot be one adapter on the base model, and one on a base that nobody else has."""
    if artifact.manifest.base_model.startswith("pretrain/"):
        raise UserError(
            f"{artifact.reference} is an adapter on {artifact.manifest.base_model} of this registry, which no other place knows; "
            "export it with --form merged"
        )
    for part in _parts(registry, artifact):
        if part.manifest.kind == "full":
            raise UserError(f"{part.reference} is a whole model, not an adapter; export it with --form merged")
        if _adapter_config(part).get("trainable_token_indices"):
            raise UserError(
                f"{part.reference} has tokens that its base model does not have; export it with --form merged"
            )
        if _adapter_config(part).get("use_dora"):
            raise UserError(
                f"{part.reference} uses DoRA, whose adapters cannot be added up; export it with --form merged"
            )


def _parts(registry: Registry, artifact: Artifact) -> list[Artifact]:
    """The adapters that lie between the base model and the artefact, lowest first."""
    return [artifact] if artifact.stage in ("pretrain", "sft") else [policy_of(registry, artifact), artifact]


def _adapter_config(artifact: Artifact) -> dict[str, Any]:
    return read_object(artifact.path / "adapter_config.json")


def _write_adapter(registry: Registry, artifact: Artifact, folder: Path) -> None:
    parts = _parts(registry, artifact)
    configs = [_adapter_config(part) for part in parts]
    rank = sum(config["r"] for config in configs)
    config = {
        **configs[-1],
        "r": rank,
        "lora_alpha": rank,  # a scale of 1: each part's own is in its B
        "use_rslora": False,
        "base_model_name_or_path": artifact.manifest.base_model,
        "target_modules": sorted(set().union(*(config["target_modules"] for config in configs))),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(_stacked([load_file(part.path / ADAPTER_FILE) for part in parts], configs), folder / ADAPTER_FILE)


def _stacked(states: list[dict[str, Tensor]], configs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One adapter's matrices from several: A (r, in) one below the other, B (out, r) side by side and scaled.

    A layer that one of them leaves alone gets zeros for it. What is no such matrix (a score head) is taken as it is.
    """
    stacked: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for state in states for key in state):
        if ".lora_A." not in key and ".lora_B." not in key:
            stacked[key] = next(state[key] for state in reversed(states) if key in state)
            continue
        down = ".lora_A." in key
        parts = []
        for state, config in zip(states, configs, strict=True):
            example = next(other[key] for other in states if key in other)
            shape = (config["r"], example.shape[1]) if down else (example.shape[0], config["r"])
            part = state[key] if key in state else torch.zeros(shape, dtype=example.dtype)
            parts.append(part if down else part * _scale(config))
        stacked[key] = torch.cat(parts, dim=0 if down else 1).contiguous()
    return stacked


def _scale(config: dict[str, Any]) -> float:
    """What peft multiplies B A with."""
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]))


def _manifests(registry: Registry, artifact: Artifact) -> dict[str, Any]:

    lines = ancestors(registry.lineage(artifact))
    return {line.reference: decode(line.artifact.manifest.to_json()) for line in lines if line.artifact}
