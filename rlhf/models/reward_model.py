"""Reward models on the SFT policy: building, saving and loading."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.config import ComputeConfig, RewardConfig
from rlhf.models.adapters import ADAPTER_FILE, attach_adapter, fitted, lora_config, save_adapter, with_adapter
from rlhf.models.anatomy import anatomy, train_all
from rlhf.models.base import load_policy, load_with_attention
from rlhf.models.classifiers import fresh_classifier, open_classifier
from rlhf.models.compute import Compute
from rlhf.models.heads import ScalarHead
from rlhf.models.packing import pack_rows
from rlhf.registry import Artifact

_SCORE_KEY = "base_model.model.score.weight"


def sequence_classifier(causal: PreTrainedModel, pad_token_id: int, *, seed: int) -> PreTrainedModel:
    """Return a reward model around a causal model's backbone, with a score head in place of the language-model head.

    The fresh head is N(0, 1/sqrt(d+1)) (N+ implementation details, arXiv:2403.17031); weights are shared, not copied.
    """
    settings = {
        k: v for k, v in causal.config.to_dict().items() if k not in ("quantization_config", "id2label", "label2id")
    }
    config = type(causal.config).from_dict({**settings, "num_labels": 1, "pad_token_id": pad_token_id})
    width = anatomy(causal).width
    classifier = fresh_classifier(config, causal)
    trunk = anatomy(causal).trunk.partition(".")[0]
    setattr(classifier, trunk, getattr(causal, trunk))
    head = ScalarHead(width, bias=False, dtype=torch.promote_types(causal.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    classifier.score = head.to(causal.device)
    classifier.config.dtype = causal.dtype
    return classifier


def trainable_reward_model(
    base: PreTrainedModel, config: RewardConfig, pad_token_id: int
) -> PreTrainedModel | PeftModel:
    """Return the SFT policy as a reward model to be trained: an adapter and a head, or all weights, in fp32.

    It shares the policy's weights, which full fine-tuning changes.
    """
    if config.finetuning == "lora":
        classifier = sequence_classifier(base, pad_token_id, seed=config.seed)
        return with_adapter(classifier, fitted(base, lora_config(config, "SEQ_CLS")))
    whole: Any = nn.Module.to(base, torch.promote_types(base.dtype, torch.float32))
    return train_all(sequence_classifier(whole, pad_token_id, seed=config.seed), anatomy(base))


def save_reward_model(model: PreTrainedModel | PeftModel, folder: Path, *, base_model: str) -> None:
    """Write the adapter with its head as plain peft opens it, or the whole model as plain transformers opens it."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder, adapter="default", base_model=base_model)
    else:
        model.save_pretrained(folder)


def load_reward_model(
    folder: Path, policy: Artifact, config: ComputeConfig, compute: Compute, pad_token_id: int
) -> PreTrainedModel | PeftModel:
    """Load a saved reward model, frozen: an adapter and a head on the SFT policy, or a whole model.

    Raises:
        UserError: the folder holds no score head, or no model.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return _load_whole_reward_model(folder, config, compute)
    read_reward_adapter(folder)
    classifier = sequence_classifier(load_policy(policy, config, compute), pad_token_id, seed=0)
    return attach_adapter(classifier, folder).to(compute.device).eval().requires_grad_(False)


def _load_whole_reward_model(folder: Path, config: ComputeConfig, compute: Compute) -> PreTrainedModel:
    dtype = torch.promote_types(compute.dtype, torch.float32)
    try:
        model: Any = load_with_attention(partial(open_classifier, folder, dtype=dtype), config)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the reward model in {folder}: {str(error).splitlines()[0]}") from error
    head = ScalarHead(model.score.in_features, bias=False, dtype=dtype)
    head.load_state_dict(model.score.state_dict())
    model.score = head
    model.to(compute.device)
    if config.attn_implementation == "auto":
        pack_rows(model)
    return model.eval().requires_grad_(False)


def read_reward_adapter(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a saved reward adapter, and its score head (1, d).

    Raises:
        UserError: there is no head (a reward model saved without it scores at random).
    """
    state = load_file(folder / ADAPTER_FILE)
    if _SCORE_KEY not in state:
        raise UserError(f"{folder} holds no score head ({_SCORE_KEY}); train the reward model again")
    head = state.pop(_SCORE_KEY)
    # peft also keeps a copy of whatever is called `classifier`, which is frozen here: some routers are.
    return {name: tensor for name, tensor in state.items() if ".classifier." not in name or ".lora_" in name}, head
