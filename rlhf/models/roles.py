"""The four roles of PPO as adapters on one frozen base."""

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
from peft import (
    LoraConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from rlhf.base.errors import UserError
from rlhf.models.adapters import ADAPTER_FILE, added_to_base, direct_casting, lora_layers, save_adapter
from rlhf.models.compute import Compute
from rlhf.models.heads import ScalarHead, backbone, check_plain_head
from rlhf.models.reward_model import _SCORE_KEY, read_score_head

Role = Literal["policy", "value", "reward", "reference"]


class RoleModels(nn.Module, abc.ABC):
    """Who answers in PPO: `policy`, `value`, `reward` and `reference`, one of them at a time (`role`).

    Subclasses say where the weights are: adapters on one frozen base (`SharedModels`), or a model for each
    (`rlhf.models.separate.SeparateModels`). Heads and what is read off the hidden states are the same.
    """

    def __init__(self, width: int, compute: Compute, *, shared_trunk: bool) -> None:
        super().__init__()
        self.compute, self.shared_trunk = compute, shared_trunk
        head_dtype = torch.promote_types(compute.dtype, torch.float32)
        self.reward_head = ScalarHead(width, bias=False, dtype=head_dtype).requires_grad_(False)
        self.value_head = ScalarHead(width, bias=True, dtype=head_dtype)
        self.reward_mean, self.reward_std = 0.0, 1.0

    @property
    @abc.abstractmethod
    def causal(self) -> PreTrainedModel:
        """The causal model that answers now."""

    @abc.abstractmethod
    def role(self, role: Role) -> contextlib.AbstractContextManager[None]:
        """Inside, the models answer as `role`."""

    @abc.abstractmethod
    def merged_policy(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """Inside, the policy as a plain model for fast sampling."""

    @abc.abstractmethod
    def trainable(self, role: Literal["policy", "value"]) -> dict[str, nn.Parameter]:
        """The parameters that the role's loss changes, by name."""

    @abc.abstractmethod
    def load_reward(self, folder: Path, mean: float, std: float) -> None:
        """A trained reward model; the value model starts from it."""

    @abc.abstractmethod
    def fresh_value(self, config: LoraConfig) -> None:
        """A value model that knows nothing, where no reward model is there to start from: all values are 0."""

    @abc.abstractmethod
    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """What is registered of the policy."""

    @contextlib.contextmanager
    def training_as(self, role: Role) -> Iterator[None]:
        """As `role`, for a forward pass *and its backward*: activations that are computed again need the same adapter."""
        with self.role(role), direct_casting(self, self.compute):
            yield

    def _no_dropout(self) -> None:
        """For good, so that `train()` cannot bring it back."""
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(
                getattr(module, "attention_dropout", None), float
            ):  # a number, not a module, in Llama and others
                cast(Any, module).attention_dropout = 0.0

    def _start_value_head(self, head: Tensor, mean: float, std: float) -> None:
        """The *normalised* score, which is what the returns are made of."""
        with torch.no_grad():
            self.value_head.weight.copy_(head / std)
            self.value_head.bias.fill_(-mean / std)

    def hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states (B, T, d) of whoever has the role; positions count real tokens, whatever the padding."""
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        with self.compute.autocast(), direct_casting(self, self.compute):
            output = backbone(self.causal)(
                input_ids=input_ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False
            )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (N, V) of flat hidden states (N, d): flat, so the head is one product and copies nothing."""
        with self.compute.autocast():
            return self.causal.get_output_embeddings()(hidden)

    def values(self, hidden: Tensor) -> Tensor:
        """Values of flat hidden states (N, d), fp32 or better."""
        return self.value_head(hidden).squeeze(-1)

    def scores(self, hidden: Tensor) -> Tensor:
        """Normalised scores of the last real token's hidden states (B, d): 0 is the mean of the demonstrations."""
        return (self.reward_head(hidden).squeeze(-1) - self.reward_mean) / self.reward_std


class SharedModels(RoleModels):
    """One frozen base, three adapters: `policy` (fresh, so it starts as the SFT model), `reward` (frozen) and `value`.

    `policy` and `value` train, with the value head; everything else is frozen. `role` chooses who answers; the reference is
    the base with all adapters off. With `shared_trunk` there is no value adapter: the value head sits on the policy's.
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
        super().__init__(base.config.hidden_size, compute, shared_trunk=shared_trunk)
        self.offload = offload
        base.requires_grad_(False)
        self.peft = get_peft_model(base, policy, adapter_name="policy")
        if not offload:
            self.to(compute.device)
        self._no_dropout()
        self._role: Role = "policy"
        self._layers = list(lora_layers(self.peft).values())
        check_plain_head(base)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model with its adapters in place."""
        return cast(PreTrainedModel, self.peft.get_base_model())

    def load_reward(self, folder: Path, mean: float, std: float) -> None:
        """Puts a trained reward adapter and its head on the base, and starts the value adapter and head from them.

        A head on the policy's trunk starts at 0: the reward's head reads another trunk.

        Raises:
            UserError: the folder holds no score head (a reward model saved without it scores at random).
        """
        head = read_score_head(folder)
        state = {key: tensor for key, tensor in load_file(folder / ADAPTER_FILE).items() if key != _SCORE_KEY}
        saved = LoraConfig.from_pretrained(str(folder))
        for name in ("reward",) if self.shared_trunk else ("reward", "value"):
            config = LoraConfig(
                r=saved.r,
                lora_alpha=saved.lora_alpha,
                target_modules=saved.target_modules,
                use_rslora=saved.use_rslora,
                use_dora=saved.use_dora,
                task_type="CAUSAL_LM",
            )
            try:
                self.peft.add_adapter(name, config)
                result: Any = set_peft_model_state_dict(self.peft, dict(state), adapter_name=name)
            except (ValueError, RuntimeError) as error:  # no such layers, or layers of another size
                raise UserError(
                    f"{folder} was made for another model: {str(error).splitlines()[-1].strip()}"
                ) from error
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
            if wrong:
                raise UserError(f"{folder} was made for another model: {wrong[0]} is on one side only")
        with torch.no_grad():
            self.reward_head.weight.copy_(head)
        if not self.shared_trunk:
            self._start_value_head(head, mean, std)
        self.reward_mean, self.reward_std = mean, std
        self._adapters_added()

    def fresh_value(self, config: LoraConfig) -> None:
        """A value adapter and head that know nothing, where no reward adapter is there to start from: all values are 0."""
        if not self.shared_trunk:
            self.peft.add_adapter("value", copy.deepcopy(config))
        self._adapters_added()

    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """The policy's adapter, as plain peft opens it."""
        save_adapter(self.peft, folder, adapter="policy", base_model=base_model)

    @classmethod
    def finished(cls, base: PreTrainedModel, folder: Path | None, compute: Compute) -> SharedModels:
        """The base with a finished policy's adapter, as `save_policy` left it, or (None) with one that changes nothing.

        `release` gives the base back.

        Raises:
            UserError: the folder holds no adapter for this base.
        """
        if folder is None:
            return cls(base, LoraConfig(r=1, target_modules="all-linear"), compute)
        try:
            config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
            config.inference_mode, config.base_model_name_or_path = (
                False,
                None,
            )  # peft would warn of the base's other name
            state = load_file(folder / ADAPTER_FILE)
            models = cls(base, config, compute)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no adapter for this model: {str(error).splitlines()[-1].strip()}"
            ) from error
        try:
            result: Any = set_peft_model_state_dict(models.peft, state, adapter_name="policy")
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if ".policy." in key)]
        except RuntimeError as error:  # layers of another size
            wrong = [str(error).splitlines()[-1].strip()]
        if wrong:
            models.release()
            raise UserError(f"{folder} was made for another model: {wrong[0]} is on one side only")
        return models

    def release(self) -> PreTrainedModel:
        """The base as it was, without adapters: these models are used up."""
        return cast(Any, self.peft).unload()

    def merged_reward(self) -> PreTrainedModel:
        """The base with the reward adapter merged in, for good: these models are used up."""
        return cast(Any, self.peft).merge_and_unload(adapter_names=["reward"])

    def _adapters_added(self) -> None:
        self._layers = list(lora_layers(self.peft).values())
        for layer in self._layers:
            layer.set_adapter("policy")
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(_is_adapter(name, "policy") or _is_adapter(name, "value"))
        if self.offload:
            _offload_frozen(self, self.compute.device)
        else:
            self.to(self.compute.device)

    def trainable(self, role: Literal["policy", "value"]) -> dict[str, nn.Parameter]:
        """The parameters that the role's loss changes, by name."""
        named = {n: p for n, p in self.peft.named_parameters() if _is_adapter(n, role)}
        if role == "value":
            named |= {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}
        return named

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Inside, the base answers as `role`; outside, as before. `requires_grad` stays as it was found."""
        before = self._role
        try:
            self._answer_as(role)
            yield
        finally:
            self._answer_as(before)

    def _answer_as(self, role: Role) -> None:
        """Sets what peft's `set_adapter` and `enable_adapters` set. These also turn `requires_grad` of every weight off and
        on, 25 ms for 210 layers, and which weights train does not depend on who answers."""
        adapter = "policy" if role == "value" and self.shared_trunk else role
        for layer in self._layers:
            layer._disable_adapters = role == "reference"
            if role != "reference":
                layer._active_adapter = [adapter]
        self._role = role

    @contextlib.contextmanager
    def merged_policy(self) -> Iterator[PreTrainedModel]:
        """Inside, the policy as a plain model for fast sampling: the adapter is added to the base weights.

        A quantised or offloaded base cannot be merged; it samples with the adapter on.
        """
        mergeable = all(
            type(layer.get_base_layer()).__module__.startswith(("torch.", "transformers.")) for layer in self._layers
        )
        if self.offload or not mergeable or cast(LoraConfig, self.peft.peft_config["policy"]).use_dora:
            with self.role("policy"):
                yield self.causal
            return
        with self.role("reference"), added_to_base(self._layers, "policy"):
            yield self.causal


def _offload_frozen(models: nn.Module, device: torch.device) -> None:
    """Moves what trains, and the buffers, to the device; accelerate's hooks bring the rest in, a layer at a time."""
    for module in models.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            cpu_offload(module, execution_device=device)
        else:
            for tensor in (*own, *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


def _is_adapter(name: str, role: str) -> bool:
    """Whether a parameter belongs to a role's adapter: a layer of the base may itself be called `value`."""
    return re.search(rf"\.lora_\w+\.{role}(\.|$)", name) is not None
