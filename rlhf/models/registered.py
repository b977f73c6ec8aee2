"""Registered artefacts as plain models: adapters are merged into their base."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.config import ComputeConfig
from rlhf.models.base import load_base, load_policy
from rlhf.models.compute import Compute
from rlhf.models.reward_model import load_reward_model
from rlhf.registry import Artifact, Registry

MANIFESTS = "rlhf_manifests.json"
"""File of an exported model: manifests of the artefact and of all its ancestors, by reference."""


def merged_model(registry: Registry, artifact: Artifact) -> PreTrainedModel:
    """Load an artefact as one plain model in float32 on the CPU: causal, or with a score head."""
    compute = Compute(torch.device("cpu"), torch.float32)
    config = ComputeConfig(registry=str(registry.root), device="cpu", dtype="float32", attn_implementation="eager")
    if artifact.stage != "reward":
        return causal_model(registry, artifact, config, compute)
    pad = artifact.manifest.pad_token_id
    assert pad is not None, "every stage records its pad token"
    model: Any = load_reward_model(artifact.path, policy_of(registry, artifact), config, compute, pad)
    return model.merge_and_unload() if artifact.manifest.kind == "adapter" else model


def causal_model(registry: Registry, artifact: Artifact, config: ComputeConfig, compute: Compute) -> PreTrainedModel:
    """Load the policy of an artefact as one plain causal model, frozen, with its ancestors' adapters merged."""
    if artifact.manifest.kind == "full":
        return load_base(str(artifact.path), config, compute).requires_grad_(False)
    if artifact.stage == "sft":
        return load_policy(artifact, config, compute)
    return load_policy(policy_of(registry, artifact), config, compute, artifact.path)


def policy_of(registry: Registry, artifact: Artifact) -> Artifact:
    """Return the SFT policy that a reward model or PPO policy was made from."""
    parent = next(parent for parent in artifact.manifest.parents if parent.stage == "sft")
    return registry.get(parent.reference)
