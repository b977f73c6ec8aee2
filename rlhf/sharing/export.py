"""Export of artefacts to folders that transformers or peft opens without this package: `rlhf registry export`

The form `merged` holds the whole model: the base with the adapters of the SFT policy and of the artefact merged in. The form
`adapter` holds one adapter on the *base model*. An artefact's own adapter is one on its SFT policy; as both add a low-rank
product to the same weights, W + B1 A1 + B2 A2 = W + [B1 B2] [A1; A2], they equal one adapter with the sum of the ranks.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import decode, read_object
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.classifiers import GENERIC, is_generic
from rlhf.models.inputs import require_same_base
from rlhf.models.registered import MANIFESTS, merged_model, policy_of
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.registry.lineage import ancestors
from rlhf.sharing.model_card import model_card

Form = Literal["merged", "adapter"]


def export(registry: Registry, artifact: Artifact, folder: Path, form: Form = "merged", dtype: str = "float32") -> Path:
    """Write an artefact to a folder with a model card, and return the folder's absolute path.

    Args:
        artifact: verified, of stage pretrain, sft, reward or ppo.
        folder: a new or empty folder.
        dtype: dtype of the written merged model; merging is done in float32.

    Raises:
        UserError: the folder is not empty, or the artefact has no such form.
    """
    if artifact.stage not in ("pretrain", "sft", "reward", "ppo"):
        raise UserError(
            f"{artifact.reference} is no model; only pretrain, sft, reward and ppo artefacts can be exported"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give another folder")
    if form == "adapter":
        check_adapter(registry, artifact)
    with storage.partial_folder(folder.absolute().parent) as partial:
        partial.mkdir(parents=True)
        if form == "adapter":
            _write_adapter(registry, artifact, partial)
            trunk = None
        else:
            trunk = _write_merged(registry, artifact, partial, getattr(torch, dtype))
        load_tokenizer(str(artifact.path)).save_pretrained(partial)
        (partial / "README.md").write_text(model_card(registry, artifact, form, dtype, trunk), encoding="utf-8")
        (partial / MANIFESTS).write_text(json.dumps(_manifests(registry, artifact), indent=1), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        return partial.rename(folder.absolute())


def _write_merged(registry: Registry, artifact: Artifact, folder: Path, dtype: torch.dtype) -> str | None:
    """Write the whole model; return the name of the backbone if it is a reward model that transformers has no class for."""
    merged: Any = merged_model(registry, artifact)
    model = merged.to(dtype)
    m = artifact.manifest
    model.config.pad_token_id, model.config.eos_token_id = m.pad_token_id, m.stop_token_ids[0]
    if artifact.stage != "reward":
        # Sampling as in training, without the base model's own settings (top-k, penalties).
        model.generation_config = GenerationConfig(
            pad_token_id=m.pad_token_id,
            eos_token_id=m.stop_token_ids,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    model.save_pretrained(folder)
    return model.config.scored_trunk if is_generic(model.config) else None


def check_adapter(registry: Registry, artifact: Artifact) -> None:
    """Raise `UserError` unless the artefact can be one adapter on a public base model."""
    if artifact.manifest.base_model.startswith("pretrain/"):
        raise UserError(
            f"{artifact.reference} is an adapter on {artifact.manifest.base_model}, which only this registry has; export it "
            "with --form merged"
        )
    for part in _parts(registry, artifact):
        require_same_base(part, registry.root)
        if part.manifest.kind == "full":
            raise UserError(f"{part.reference} is a whole model, not an adapter; export it with --form merged")
        if _adapter_config(part).get("trainable_token_indices"):
            raise UserError(
                f"{part.reference} has tokens that its base model does not have; export it with --form merged"
            )
        if _adapter_config(part).get("target_parameters"):
            raise UserError(
                f"{part.reference} has adapters on fused experts, which cannot be added; export it with --form merged"
            )
        if part.stage == "reward" and type(merged_model(registry, part)).__name__.endswith(GENERIC):
            raise UserError(
                f"{part.reference} has a score head on an architecture that transformers has no classifier for; "
                "export it with --form merged"
            )
        if _adapter_config(part).get("use_dora"):
            raise UserError(f"{part.reference} uses DoRA, whose adapters cannot be added; export it with --form merged")


def _parts(registry: Registry, artifact: Artifact) -> list[Artifact]:
    """Return the artefacts with adapters between the base model and this artefact, lowest first."""
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
        **{
            name: sorted(set().union(*(config[name] for config in configs if config.get(name)))) or None
            for name in ("target_modules", "exclude_modules")
        },
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(_stacked([load_file(part.path / ADAPTER_FILE) for part in parts], configs), folder / ADAPTER_FILE)


def _stacked(states: list[dict[str, Tensor]], configs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the matrices of one adapter that equals the sum of several.

    All A (r, in) are stacked, and all B (out, r) scaled and placed side by side. A layer that an adapter lacks gets zeros.
    Other tensors (a score head) are copied from the last adapter that has them.
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
    """Return the factor of B A in peft."""
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]))


def _manifests(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    lines = ancestors(registry.lineage(artifact))
    return {line.reference: decode(line.artifact.manifest.to_json()) for line in lines if line.artifact}


def command(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Export an artefact: the verb `export`."""
    artifact = registry.get(arguments.ref)
    folder = export(registry, artifact, arguments.folder, arguments.form, arguments.dtype)
    console.print(f"{artifact.reference} is in {folder}", soft_wrap=True)
