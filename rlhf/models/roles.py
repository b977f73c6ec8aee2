"""PPO's four roles (policy, value, reward, reference), as adapters on one frozen base.

`RoleModels` is what PPO uses: one role computes at a time, and the heads read its hidden states. `SharedModels` holds
the roles in one base; `rlhf.models.separate` has a model for each.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.models.adapters import (
    ADAPTER_FILE,
    adapted_weight,
    added_to_base,
    dequantised,
    dequantised_bytes,
    fast_adapters,
    fitted,
    lora_layers,
    read_adapter_config,
    save_adapter,
)
from rlhf.models.anatomy import anatomy, head, hidden_states
from rlhf.models.compute import Compute
from rlhf.models.graphs import fits, records, stays
from rlhf.models.heads import ScalarHead
from rlhf.models.reward_model import read_reward_adapter

Role = Literal["policy", "value", "reward", "reference"]


class RoleModels(nn.Module, abc.ABC):
    """The models of PPO, of which one role computes at a time.

    Subclasses decide where the weights of a role are; heads and the reading of hidden states are common. With
    `shared_trunk` the value head sits on the policy's hidden states, and there is no value model.
    """

    def __init__(self, base: PreTrainedModel, compute: Compute, *, shared_trunk: bool) -> None:
        super().__init__()
        self.compute, self.shared_trunk = compute, shared_trunk
        width, head_dtype = anatomy(base).width, torch.promote_types(compute.dtype, torch.float32)
        self.reward_head = ScalarHead(width, bias=False, dtype=head_dtype).requires_grad_(False)
        self.value_head = ScalarHead(width, bias=True, dtype=head_dtype)
        self.reward_mean, self.reward_std = 0.0, 1.0
        self._role: Role = "policy"

    @property
    @abc.abstractmethod
    def causal(self) -> PreTrainedModel:
        """The causal model that computes as the current role."""

    @abc.abstractmethod
    def merged_policy(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """Context that yields the policy as a plain model, for fast sampling."""

    @abc.abstractmethod
    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """Write the policy as it is registered."""

    @abc.abstractmethod
    def _load_reward_trunk(self, folder: Path) -> Tensor:
        """Load a reward model below its head, copy it as the value model, and return the head (1, d)."""

    @abc.abstractmethod
    def _add_fresh_value_trunk(self, config: LoraConfig) -> None:
        """Add a value model that starts as the SFT model."""

    @abc.abstractmethod
    def _ready(self) -> None:
        """Bring models that were added to the device, and freeze what does not train."""

    @abc.abstractmethod
    def _trunk_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Parameters of the model or adapter that belongs to a role, by name."""

    def load_reward(self, folder: Path, mean: float, std: float) -> None:
        """Load a trained reward model, and start the value model from it.

        A value head on the policy's hidden states starts at 0 instead: the reward head reads others.

        Args:
            mean, std: of the raw scores that become 0 and 1.

        Raises:
            UserError: the folder holds no score head, or was made for another model.
        """
        head = self._load_reward_trunk(folder)
        with torch.no_grad():
            self.reward_head.weight.copy_(head)
            if not self.shared_trunk:  # the *normalised* score, which is what the returns are made of
                self.value_head.weight.copy_(head / std)
                self.value_head.bias.fill_(-mean / std)
        self.reward_mean, self.reward_std = mean, std
        self._ready()

    def fresh_value(self, config: LoraConfig) -> None:
        """Make a value model where there is no reward model to start from: all its values are 0."""
        if not self.shared_trunk:
            self._add_fresh_value_trunk(config)
        self._ready()

    def trainable(self, role: Literal["policy", "value"]) -> dict[str, nn.Parameter]:
        """Return the parameters that the role's loss changes, by name."""
        if role == "policy":
            return self._trunk_parameters(role)
        head = {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return head if self.shared_trunk else self._trunk_parameters(role) | head

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Context in which the models compute as `role`. It leaves `requires_grad` alone."""
        previous = self._role
        try:
            self._switch(role)
            yield
        finally:
            self._switch(previous)

    def _switch(self, role: Role) -> None:
        self._role = role

    def _trunk(self, role: Role) -> str:
        """Name of the model or adapter that computes a role's hidden states."""
        return "policy" if role == "value" and self.shared_trunk else role

    @contextlib.contextmanager
    def training_as(self, role: Role) -> Iterator[None]:
        """Context of a role's forward pass *and its backward*: recomputed activations need its adapter again."""
        with self.role(role), fast_adapters(self, self.compute):
            yield

    def _disable_dropout(self) -> None:
        """Set every dropout to 0, so that `train()` cannot bring it back."""
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):  # no module in Llama and others
                cast(Any, module).attention_dropout = 0.0

    def hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the current role's last hidden states (B, T, d); positions count real tokens only."""
        with self.compute.autocast(), fast_adapters(self, self.compute):
            return hidden_states(self.causal, input_ids, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits (N, V) of hidden states (N, d): flat, so that the product copies nothing."""
        with self.compute.autocast():
            return head(self.causal)(hidden)

    def values(self, hidden: Tensor) -> Tensor:
        """Return values (N,) of hidden states (N, d), in fp32 or better."""
        return self.value_head(hidden).squeeze(-1)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return normalised scores (B,) of the last real tokens' hidden states (B, d): 0 is the demonstrations' mean."""
        return (self.reward_head(hidden).squeeze(-1) - self.reward_mean) / self.reward_std


class SharedModels(RoleModels):
    """One frozen base with three adapters; the reference is the base with all of them off.

    `policy` (fresh, so it starts as the SFT model) and `value` train, with the value head; `reward` is frozen.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        policy: LoraConfig,
        compute: Compute,
        *,
        shared_trunk: bool = False,
        offload: bool = False,
    ) -> None:
        """With `offload` the frozen weights stay in main memory; each layer's are brought in while it computes."""
        super().__init__(base, compute, shared_trunk=shared_trunk)
        self.offload = offload
        base.requires_grad_(False)
        self.peft = cast(PeftModel, get_peft_model(base, fitted(base, policy), adapter_name="policy"))
        if not offload:
            self.to(compute.device)
        self._disable_dropout()
        self._layers = list(lora_layers(self.peft).values())
        self._merged: dict[LoraLayer, Tensor] = {}

    @classmethod
    def finished(cls, base: PreTrainedModel, folder: Path | None, compute: Compute) -> SharedModels:
        """Return the base with a policy adapter that `save_policy` wrote; without a folder, with one of no effect.

        `release` gives the base back.

        Raises:
            UserError: the folder holds no adapter for this base.
        """
        if folder is None:
            return cls(base, LoraConfig(r=1, target_modules="all-linear"), compute)
        try:
            config = read_adapter_config(folder)
            state = load_file(folder / ADAPTER_FILE)
            models = cls(base, config, compute)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no adapter for this model: {str(error).splitlines()[-1].strip()}"
            ) from error
        try:
            _set_adapter(models.peft, "policy", state, folder)
        except UserError:
            models.release()
            raise
        return models

    def release(self) -> PreTrainedModel:
        """Return the base as it was, without adapters. These models cannot be used afterwards."""
        return cast(Any, self.peft).unload()

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model with its adapters in place."""
        return cast(PreTrainedModel, self.peft.get_base_model())

    def _load_reward_trunk(self, folder: Path) -> Tensor:
        state, head = read_reward_adapter(folder)
        saved = read_adapter_config(folder)
        for name in ("reward",) if self.shared_trunk else ("reward", "value"):
            config = LoraConfig(
                r=saved.r,
                lora_alpha=saved.lora_alpha,
                target_modules=saved.target_modules,
                target_parameters=saved.target_parameters,
                exclude_modules=saved.exclude_modules,
                rank_pattern=saved.rank_pattern,
                alpha_pattern=saved.alpha_pattern,
                use_rslora=saved.use_rslora,
                use_dora=saved.use_dora,
                task_type="CAUSAL_LM",
            )
            try:
                self.peft.add_adapter(name, config)
            except (ValueError, RuntimeError) as error:  # no such layers
                raise other_model(folder, error) from error
            _set_adapter(self.peft, name, dict(state), folder)
        return head

    def _add_fresh_value_trunk(self, config: LoraConfig) -> None:
        self.peft.add_adapter("value", fitted(self.causal, copy.deepcopy(config)))

    def merged_reward(self) -> PreTrainedModel:
        """Return the base with the reward adapter merged in. These models cannot be used afterwards."""
        return cast(Any, self.peft).merge_and_unload(adapter_names=["reward"])

    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """Write the policy's adapter, as plain peft opens it."""
        save_adapter(self.peft, folder, adapter="policy", base_model=base_model)

    def _ready(self) -> None:
        self._layers = list(lora_layers(self.peft).values())
        for layer in self._layers:
            layer.set_adapter("policy")
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(_is_adapter(name, "policy") or _is_adapter(name, "value"))
        if self.offload:
            _offload_frozen(self, self.compute.device)
        else:
            self.to(self.compute.device)

    def _trunk_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.peft.named_parameters() if _is_adapter(name, role)}

    def _switch(self, role: Role) -> None:
        """Set the fields that peft's `set_adapter` and `enable_adapters` set.

        These also turn `requires_grad` of every weight off and on (25 ms for 210 layers), and a role does not change
        which weights train.
        """
        for layer in self._layers:
            layer._disable_adapters = role == "reference"
            if role != "reference":
                layer._active_adapter = [self._trunk(role)]
        super()._switch(role)

    @contextlib.contextmanager
    def merged_policy(self) -> Iterator[PreTrainedModel]:
        """Context that yields the base with the policy adapter added to its weights.

        A quantised base is a plain copy meanwhile, if the device's memory may take it; otherwise, and where it is offloaded or
        DoRA's, it samples with the adapter on.
        """
        device, dtype = self.compute.device, self.compute.dtype
        plain = [layer for layer in self._layers if _is_plain(layer.get_base_layer())]
        copied = dequantised_bytes(self.causal, dtype)
        mergeable = len(plain) == len(self._layers) or (copied > 0 and fits(copied, device))
        if self.offload or not mergeable or cast(LoraConfig, self.peft.peft_config["policy"]).use_dora:
            with self.role("policy"):
                yield self.causal
            return
        stay = records(device) and stays(sum(adapted_weight(layer).nbytes for layer in plain), device)
        with (
            self.role("reference"),
            added_to_base(plain, "policy", self._merged if stay else None),
            dequantised(self.causal, "policy", dtype),
        ):
            yield self.causal


def _is_plain(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith(("torch.", "transformers."))


def _set_adapter(peft: PeftModel, adapter: str, state: dict[str, Tensor], folder: Path) -> None:
    """Copy the tensors that a folder holds into an adapter.

    Raises:
        UserError: they are of other layers, or of another size.
    """
    try:
        result: Any = set_peft_model_state_dict(peft, state, adapter_name=adapter)
    except (ValueError, RuntimeError) as error:
        raise other_model(folder, error) from error
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if _is_adapter(key, adapter))]
    if wrong:
        raise UserError(f"{folder} was made for another model: {wrong[0]} is on one side only")


def other_model(folder: Path, error: Exception) -> UserError:
    """Return the error of a folder whose tensors do not fit the model."""
    return UserError(f"{folder} was made for another model: {str(error).splitlines()[-1].strip()}")


def _offload_frozen(models: nn.Module, device: torch.device) -> None:
    """Move buffers and trainable weights to the device; accelerate's hooks bring the rest in, a layer at a time."""
    for module in models.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            cpu_offload(module, execution_device=device)
        else:
            for tensor in (*own, *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


def _is_adapter(name: str, role: str) -> bool:
    """Return True for a parameter of a role's adapter; a layer of the base may itself be called `value`."""
    return re.search(rf"\.lora_\w+\.{role}(\.|$)", name) is not None
