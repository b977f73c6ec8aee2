"""Full fine-tuning in PPO: a model for each role, with all weights of policy and value trained.

The four copies are in fp32: bf16 would round a step of 1e-6 away, and a reference of the same type makes the first KL
exactly 0. Products are computed in bf16 where the run computes in bf16.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.anatomy import anatomy, train_all
from rlhf.models.classifiers import open_classifier
from rlhf.models.compute import Compute
from rlhf.models.roles import Role, RoleModels, SharedModels, other_model


class SeparateModels(RoleModels):
    """A policy and a value model that train, a reward model and a reference that do not."""

    def __init__(self, base: PreTrainedModel, compute: Compute, *, shared_trunk: bool = False) -> None:
        super().__init__(base, compute, shared_trunk=shared_trunk)
        self.saved_dtype = base.dtype
        reference: Any = nn.Module.to(base, torch.promote_types(base.dtype, torch.float32)).requires_grad_(False)
        self.models = nn.ModuleDict(
            {"reference": reference, "policy": train_all(copy.deepcopy(reference), anatomy(base))}
        )
        self._ready()

    @property
    def causal(self) -> PreTrainedModel:
        """The current role's model."""
        return self._model(self._trunk(self._role))

    def _model(self, name: str) -> PreTrainedModel:
        return cast(PreTrainedModel, self.models[name])

    @contextlib.contextmanager
    def merged_policy(self) -> Iterator[PreTrainedModel]:
        """Context that yields the policy itself; its products are computed in the run's type."""
        with self.role("policy"), self.compute.autocast():
            yield self.causal

    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """Write the whole policy, in the type that the SFT model was loaded in, as plain transformers opens it."""
        policy = self._model("policy")
        state = {name: tensor.detach().to("cpu", self.saved_dtype) for name, tensor in policy.state_dict().items()}
        policy.save_pretrained(folder, state_dict=state)

    def _load_reward_trunk(self, folder: Path) -> Tensor:
        load = self._with_reward_adapter if (folder / ADAPTER_FILE).is_file() else _with_reward_backbone
        reward, head = load(self._model("reference"), folder)
        self.models["reward"] = reward.requires_grad_(False)
        if not self.shared_trunk:
            self.models["value"] = train_all(copy.deepcopy(reward), anatomy(reward))
        return head

    def _with_reward_adapter(self, base: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Tensor]:
        adapted = SharedModels(copy.deepcopy(base), LoraConfig(r=1, target_modules="all-linear"), self.compute)
        adapted.load_reward(folder, mean=0.0, std=1.0)
        return adapted.merged_reward(), adapted.reward_head.weight.detach().clone()

    def _add_fresh_value_trunk(self, config: LoraConfig) -> None:
        self.models["value"] = train_all(copy.deepcopy(self._model("reference")), anatomy(self._model("reference")))

    def _trunk_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        cut_off = anatomy(self._model(role)).cut_off
        return {f"{role}.{name}": p for name, p in self.models[role].named_parameters() if name not in cut_off}

    def _ready(self) -> None:
        self.to(self.compute.device)
        self._disable_dropout()


class FinishedPair(SeparateModels):
    """A finished policy and another model as its reference, in the types they were loaded in; nothing trains."""

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel, compute: Compute) -> None:
        RoleModels.__init__(self, reference, compute, shared_trunk=True)
        self.models = nn.ModuleDict({"reference": reference, "policy": policy}).requires_grad_(False)
        self._ready()


def _with_reward_backbone(base: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Tensor]:
    """Return a copy of the base with the backbone of a whole reward model, and that model's head."""
    saved: Any = open_classifier(folder, dtype=base.dtype)
    reward, trunk = copy.deepcopy(base), anatomy(base).trunk.partition(".")[0]
    try:
        getattr(reward, trunk).load_state_dict(getattr(saved, trunk).state_dict())
    except RuntimeError as error:
        raise other_model(folder, error) from error
    return reward, saved.score.weight.detach()
