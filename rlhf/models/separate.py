"""Full fine-tuning in PPO: a model of its own for each role, all weights of policy and value trained.

Four copies of the model, in fp32: a step of 1e-6 would be rounded away in bf16, and a reference of the same type makes the
first KL exactly 0. Products are computed in bf16 where the run computes in bf16.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.compute import Compute
from rlhf.models.heads import backbone, check_plain_head
from rlhf.models.roles import Role, RoleModels, SharedModels


class SeparateModels(RoleModels):
    """A policy and a value model that train, a reward model and a reference that do not.

    With `shared_trunk` there is no value model: the value head sits on the policy.
    """

    def __init__(self, base: PreTrainedModel, compute: Compute, *, shared_trunk: bool = False) -> None:
        super().__init__(base.config.hidden_size, compute, shared_trunk=shared_trunk)
        check_plain_head(base)
        self.saved_dtype = base.dtype
        reference: Any = nn.Module.to(base, torch.promote_types(base.dtype, torch.float32)).requires_grad_(False)
        self.models = nn.ModuleDict({"reference": reference, "policy": copy.deepcopy(reference).requires_grad_(True)})
        self._role: Role = "policy"
        self._ready()

    @property
    def causal(self) -> PreTrainedModel:
        """The model of whoever has the role."""
        name = "policy" if self._role == "value" and self.shared_trunk else self._role
        model = self.models[name]
        assert isinstance(model, PreTrainedModel)
        return model

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Inside, the model of `role` answers; outside, the one before."""
        before, self._role = self._role, role
        try:
            yield
        finally:
            self._role = before

    @contextlib.contextmanager
    def merged_policy(self) -> Iterator[PreTrainedModel]:
        """The policy itself; its products are computed in the run's type."""
        with self.role("policy"), self.compute.autocast():
            yield self.causal

    def trainable(self, role: Literal["policy", "value"]) -> dict[str, nn.Parameter]:
        """The parameters that the role's loss changes, by name."""
        named: dict[str, nn.Parameter] = {}
        if role == "policy" or not self.shared_trunk:
            named = {f"{role}.{n}": p for n, p in self.models[role].named_parameters()}
        if role == "value":
            named |= {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}
        return named

    def load_reward(self, folder: Path, mean: float, std: float) -> None:
        """The reference with a trained reward adapter merged in, or with the weights of a whole reward model, and its
        head; the value model starts as a copy.

        Raises:
            UserError: the folder holds no score head, or was made for another model.
        """
        base = self.models["reference"]
        assert isinstance(base, PreTrainedModel)
        reward, head = self._adapted(base, folder) if (folder / ADAPTER_FILE).is_file() else _replaced(base, folder)
        self.models["reward"] = reward.requires_grad_(False)
        if not self.shared_trunk:
            self.models["value"] = copy.deepcopy(self.models["reward"]).requires_grad_(True)
            self._start_value_head(head, mean, std)
        with torch.no_grad():
            self.reward_head.weight.copy_(head)
        self.reward_mean, self.reward_std = mean, std
        self._ready()

    def _adapted(self, base: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Tensor]:
        adapted = SharedModels(copy.deepcopy(base), LoraConfig(r=1, target_modules="all-linear"), self.compute)
        adapted.load_reward(folder, mean=0.0, std=1.0)
        return adapted.merged_reward(), adapted.reward_head.weight.detach().clone()

    def fresh_value(self, config: LoraConfig) -> None:
        """A value model that starts as the SFT model with a head of 0."""
        if not self.shared_trunk:
            self.models["value"] = copy.deepcopy(self.models["reference"]).requires_grad_(True)
        self._ready()

    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """The whole policy, in the type that the SFT model was loaded in, as plain transformers opens it."""
        policy = self.models["policy"]
        assert isinstance(policy, PreTrainedModel)
        state = {name: tensor.detach().to("cpu", self.saved_dtype) for name, tensor in policy.state_dict().items()}
        policy.save_pretrained(folder, state_dict=state)

    def _ready(self) -> None:
        self.to(self.compute.device)
        self._no_dropout()


class FinishedPair(SeparateModels):
    """A finished policy beside another model as its reference, in the types that they were loaded in; nothing trains."""

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel, compute: Compute) -> None:
        RoleModels.__init__(self, reference.config.hidden_size, compute, shared_trunk=True)
        check_plain_head(policy)
        check_plain_head(reference)
        self.models = nn.ModuleDict({"reference": reference, "policy": policy}).requires_grad_(False)
        self._role: Role = "policy"
        self._ready()


def _replaced(base: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Tensor]:
    """A copy of the base with the trunk of the whole reward model in the folder, and that model's head."""
    saved: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=base.dtype, use_safetensors=True, trust_remote_code=False
    )
    reward = copy.deepcopy(base)
    try:
        backbone(reward).load_state_dict(backbone(saved).state_dict())
    except RuntimeError as error:
        raise UserError(f"{folder} was made for another model: {str(error).splitlines()[-1].strip()}") from error
    return reward, saved.score.weight.detach()
