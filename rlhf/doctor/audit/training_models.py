"""The model of a supervised stage, opened anew with the weights of a sheet, and computed by transformers and peft alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.doctor.audit.compare import NotExamined, rms
from rlhf.doctor.audit.plain_models import backbone_of, fit_vocabulary, load_base, load_causal, padded, undisturbed
from rlhf.doctor.audit.plain_text import IGNORED
from rlhf.doctor.audit.sheet import Sheet
from rlhf.doctor.audit.training_record import sampled

ROWS_AT_ONCE = 16
#: Share of a frozen weight's numbers that may differ: two kinds of rounding in a merged base.
DIFFERENT = 0.05


class Twin:
    """The model of a sheet: its base from disk, its trained weights from the sheet."""

    def __init__(self, sheet: Sheet) -> None:
        facts = sheet.facts
        self.sources, config = facts["sources"], facts["config"]
        self.device, self.dtype = torch.device(self.sources["device"]), getattr(torch, self.sources["dtype"])
        weights, place = sheet.group("weights"), Path(self.sources["base"])
        registry, quantization = Path(self.sources["registry"]), config["quantization"]
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if facts["stage"] == "pretrain":
            with undisturbed():
                shape = AutoConfig.for_model(**facts["shape"])
                model: Any = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").to(self.device)
        elif facts["stage"] == "reward":
            model = load_causal(place, registry, quantization=quantization, **options)
        else:
            settings = {name: self.sources[name] for name in ("revision", "trust_remote_code")}
            model = load_base(str(place), registry, quantization=quantization, **options, **settings)
        if adapter := facts.get("adapter"):
            lora = LoraConfig(**adapter)
            fit_vocabulary(model, lora)
            with undisturbed():
                model = get_peft_model(model, lora)
        elif facts["stage"] == "reward":
            model = model.to(torch.promote_types(self.dtype, torch.float32))
        self.model = model.eval().requires_grad_(False)
        self._chosen = sheet.group("before/weight").keys()
        self.head: Tensor | None = None
        self.parameters: dict[str, Tensor] = {}
        self._by_token: list[Tensor] = []
        self.usual_score = 0.0
        self._load(weights)

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights.items():
            if name.endswith(("score.weight", "score.modules_to_save.default.weight")):
                self.head = self.parameters[name] = tensor.to(self.device).clone()
            elif name in own:
                own[name].data = tensor.to(self.device, torch.promote_types(tensor.dtype, own[name].dtype))
                self.parameters[name] = own[name]
            else:
                raise NotExamined(f"{name} is no weight that can be opened plainly")
        for name in self._chosen & self.parameters.keys():
            self.parameters[name].requires_grad_()

    def differing(self, recorded: Mapping[str, Tensor]) -> tuple[list[str], int]:
        """Return the names of frozen weights that are others here, and how many were compared."""
        own = dict(self.model.named_parameters())
        names = [name for name in recorded if name in own and own[name].is_floating_point()]
        other = []
        for name in names:
            numbers, expected = recorded[name], sampled(own[name])
            room = 4 * torch.finfo(self.dtype).eps * expected.abs() + 1e-12
            if numbers.shape != expected.shape or float(((numbers - expected).abs() > room).float().mean()) > DIFFERENT:
                other.append(name)
        return other, len(names)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def token_losses(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Return the negative log-likelihoods of each row's labelled tokens, nats."""
        losses = []
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            ids, mask = padded([ids for ids, _ in part], self.device)
            with self._precision():
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for scores, (_, labels) in zip(logits, part, strict=True):
                targets = torch.tensor(labels[1:], device=self.device)
                places = (targets != IGNORED).nonzero()[:, 0]
                distribution = scores[places].to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(dim=-1)
                losses.append(-distribution.gather(1, targets[places][:, None])[:, 0])
        return losses

    def scores(self, rows: Sequence[list[int]]) -> Tensor:
        """Return the scores of rows, read at their last tokens."""
        if self.head is None:
            raise NotExamined("the sheet holds no score head")
        backbone, scores, sizes = backbone_of(self.model), [], []
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            ids, mask = padded(part, self.device)
            with self._precision():
                states = backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            values = states.to(self.head.dtype) @ self.head[0]
            self._by_token += [value[: len(row)].detach().cpu() for value, row in zip(values, part, strict=True)]
            scores.append(torch.stack([value[len(row) - 1] for value, row in zip(values, part, strict=True)]))
            sizes.append(rms(states) * float(self.head.detach().norm()))
        self.usual_score = max(sizes)
        return torch.cat(scores)

    @property
    def by_token(self) -> list[Tensor]:
        """The scores at each token of the rows that `scores` was called with."""
        return self._by_token

    def gradients(self, loss: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradients of a loss by name; 0 where it does not depend on a weight."""
        parameters = [self.parameters[name] for name in names]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
        }
