"""PPO's four models, opened anew from the registry with the weights of a sheet, and computed by transformers and peft alone.

Legend: n rows, R padded response, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from rlhf.doctor.audit.plain_models import ADAPTER, HEAD, backbone_of, load_causal, load_reward, undisturbed

ROWS_AT_ONCE = 8
_ADAPTER_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_\w+\.(policy|value)(\.|$)")


class Unknown(Exception):
    """The models of a sheet cannot be opened plainly; the text is why."""


class Batch:
    """Rows of a rollout: prompts padded on the left, responses on the right."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        prompt_width, width = max(map(len, prompts)), max(map(len, responses))
        self.lengths = list(map(len, responses))
        rows = [
            [0] * (prompt_width - len(p)) + list(p) + list(r) + [0] * (width - len(r))
            for p, r in zip(prompts, responses, strict=True)
        ]
        real = [
            [0] * (prompt_width - len(p)) + [1] * (len(p) + len(r)) + [0] * (width - len(r))
            for p, r in zip(prompts, responses, strict=True)
        ]
        self.ids, self.mask = torch.tensor(rows, device=device), torch.tensor(real, device=device)
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        self.prompt_width, self.width = prompt_width, width
        self.real = torch.arange(width, device=device) < torch.tensor(self.lengths, device=device)[:, None]
        self.tokens = self.ids[:, prompt_width:]


class Roles:
    """The models of PPO with the weights that a sheet holds.

    Args:
        weights: trained weights by the trainer's names; empty: those that a run begins with, and nothing is known of the value.
        config: options of the run.
        sources: where the models come from, as the recorder wrote it.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
        self.config, self.sources, self.weights = config, sources, dict(weights)
        self.dtype: torch.dtype = getattr(torch, sources["dtype"])
        self.device = torch.device(sources["device"] if torch.cuda.is_available() else "cpu")
        self.full = config["finetuning"] == "full"
        base = load_causal(
            Path(sources["policy"]), Path(sources["registry"]), self.dtype, self.device, config["quantization"]
        )
        self.parameters: dict[str, Tensor] = {}
        self.reward_heads: dict[str, Tensor] = {}
        self._wholes: dict[str, Any] = {}
        head = {name: tensor.to(self.device) for name, tensor in self.weights.items() if name.startswith("value_head.")}
        self.head = {name.removeprefix("value_head."): tensor.clone().requires_grad_() for name, tensor in head.items()}
        self.parameters |= {f"value_head.{name}": tensor for name, tensor in self.head.items()}
        self.model: Any = base.to(torch.promote_types(self.dtype, torch.float32)) if self.full else self._adapted(base)

    def _adapted(self, base: Any) -> Any:
        """Return the base with the adapters of policy and value beside each other."""
        model: Any = base
        names = {match[2]: [] for name in self.weights if (match := _ADAPTER_TENSOR.match(name))}  # type: dict[str, list[str]]
        for name in self.weights:
            if match := _ADAPTER_TENSOR.match(name):
                names[match[2]].append(match[1])
            elif not name.startswith("value_head."):
                raise Unknown(f"{name} is no plain adapter's")
        for role, layers in names.items():
            config = self._lora(role, sorted(set(layers)))
            with undisturbed():
                if model is base:
                    model = get_peft_model(base, config, adapter_name=role)
                else:
                    model.add_adapter(role, config)
        own = dict(model.named_parameters())
        if lost := [name for name in self.weights if name not in own and not name.startswith("value_head.")]:
            raise Unknown(f"{lost[0]} is no layer that peft adapts by its name")
        for name, tensor in self.weights.items():
            if name in own:
                own[name].data = tensor.to(self.device, own[name].dtype)
                self.parameters[name] = own[name]
        self._add_reward(model)
        return model.eval()

    def _add_reward(self, model: Any) -> None:
        """Put the adapter of the registered reward model beside the others, if it sits on the same base."""
        for name, source in self.sources["rewards"].items():
            if model is not None and source["kind"] == "adapter" and source["same_tokens"]:
                saved: Any = LoraConfig.from_pretrained(source["path"])
                plain = {**saved.to_dict(), "modules_to_save": None, "task_type": None, "inference_mode": False}
                tensors = load_file(Path(source["path"]) / ADAPTER)
                self.reward_heads[name] = tensors.pop(HEAD)
                with undisturbed():
                    model.add_adapter("reward", LoraConfig.from_peft_type(**plain))
                result: Any = set_peft_model_state_dict(model, tensors, adapter_name="reward")
                if result.unexpected_keys:
                    raise Unknown(f"{result.unexpected_keys[0]} of {name} is no layer of the base")

    def _lora(self, role: str, layers: list[str]) -> LoraConfig:
        """Return the configuration of an adapter; a value that began as the reward model has that one's."""
        config, rewards = self.config, list(self.sources["rewards"].values())
        rank = next(len(t) for name, t in self.weights.items() if f".lora_A.{role}." in name)
        settings = {name: config[name] for name in ("lora_alpha", "use_rslora", "use_dora")}
        if role == "value" and rewards and rewards[0]["kind"] == "adapter" and rewards[0]["same_tokens"]:
            saved: Any = LoraConfig.from_pretrained(rewards[0]["path"])
            settings = {name: getattr(saved, name) for name in settings}
        return LoraConfig(r=rank, target_modules=layers, lora_dropout=0.0, **settings)

    @contextlib.contextmanager
    def role(self, role: str) -> Iterator[Any]:
        """Context that yields the causal model of `policy`, `value` or `reference`."""
        if self.full:
            yield self._whole(role)
        elif role == "reference":
            with self.model.disable_adapter():
                yield self.model.get_base_model()
        else:
            self.model.set_adapter(role)
            self.model.requires_grad_(False)
            yield self.model.get_base_model()

    def _whole(self, role: str) -> Any:
        """Return a whole model of a role."""
        own = {name.removeprefix(f"{role}."): t for name, t in self.weights.items() if name.startswith(f"{role}.")}
        if role == "reference" or not own:
            return self.model
        if role not in self._wholes:
            model = copy.deepcopy(self.model)
            if unknown := model.load_state_dict(own, strict=False).unexpected_keys:
                raise Unknown(f"{unknown[0]} is no weight of the model")
            self._wholes[role] = model
            parameters = dict(model.named_parameters())
            self.parameters |= {f"{role}.{name}": parameters[name] for name in own if name in parameters}
        return self._wholes[role]

    @contextlib.contextmanager
    def sampler(self) -> Iterator[Any]:
        """Context that yields the policy as it samples; where its adapter is added to the weights, it stays so."""
        config = self.config
        apart = self.full or not config["merge_adapter"] or config["use_dora"] or config["offload_base"]
        with self.role("policy") as model:
            if not apart:
                self.model.merge_adapter(["policy"])
            yield model

    def distribution(self, model: Any, batch: Batch, temperature: float) -> Tensor:
        """Return log-probabilities (n, R, V) of the next token at each place of the responses, in fp32 or better."""
        accepted = inspect.signature(model.forward).parameters
        extra: dict[str, Any] = {"position_ids": batch.positions} if "position_ids" in accepted else {}
        if "logits_to_keep" in accepted:
            extra["logits_to_keep"] = batch.width + 1
        with self._precision():
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **extra).logits
        logits = logits[:, -batch.width - 1 : -1]
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)

    def logprobs(self, model: Any, batch: Batch, temperature: float) -> Tensor:
        """Return log-probabilities (n, R) of the response tokens, 0 behind their ends."""
        distribution = self.distribution(model, batch, temperature)
        return torch.where(batch.real, distribution.gather(2, batch.tokens[:, :, None])[:, :, 0], 0.0)

    @contextlib.contextmanager
    def in_type(self, model: Any, name: str | None) -> Iterator[Any]:
        """Context that yields the model as it is, or a copy in a type that rounds less."""
        own = self.dtype
        self.dtype = own if name is None else getattr(torch, name)
        try:
            yield model if name is None else copy.deepcopy(model).to(self.dtype)
        finally:
            self.dtype = own

    def values(self, model: Any, batch: Batch) -> Tensor:
        """Return the values (n, R) read before each response token, 0 behind their ends."""
        states = self._states(model, batch)[:, batch.prompt_width - 1 : -1]
        weight = self.head["weight"]
        values = states.to(weight.dtype) @ weight[0] + self.head["bias"]
        return torch.where(batch.real, values, 0.0)

    def _states(self, model: Any, batch: Batch) -> Tensor:
        backbone = backbone_of(model)
        accepted = inspect.signature(backbone.forward).parameters
        extra = {"position_ids": batch.positions} if "position_ids" in accepted else {}
        with self._precision():
            states: Tensor = backbone(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **extra)[0]
        return states

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def value_role(self) -> str:
        """Return the model whose states the values are read from."""
        return "policy" if self.config["value_model"] == "shared_trunk" else "value"

    @torch.no_grad()
    def scores(self, name: str, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return normalised scores (n,) of rows of tokens by a registered reward model."""
        source = self.sources["rewards"][name]
        if name not in self.reward_heads:
            scorer = load_reward(
                Path(source["path"]),
                Path(self.sources["registry"]),
                self.dtype,
                self.device,
                self.config["quantization"],
            )
            return scorer(rows)
        head = self.reward_heads[name].to(self.device, torch.promote_types(self.dtype, torch.float32))
        with self.role("reward") as model:
            parts = []
            for first in range(0, len(rows), ROWS_AT_ONCE):
                batch = Batch(
                    [[row[0]] for row in rows[first:][:ROWS_AT_ONCE]],
                    [row[1:] for row in rows[first:][:ROWS_AT_ONCE]],
                    self.device,
                )
                states = self._states(model, batch)
                last = states[range(len(states)), batch.lengths]
                parts.append(last.to(head.dtype) @ head[0])
        return (torch.cat(parts) - source["mean"]) / source["std"]
