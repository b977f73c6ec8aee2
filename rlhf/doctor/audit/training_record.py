"""The recorder of pretraining, SFT and reward modelling: copies a sample of an update onto a sheet, and changes nothing."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf.doctor.audit.sheet import Sheet

#: Most bytes of weights on a sheet; without them, what needs them is not examined.
MOST_BYTES = 200_000_000
#: Tensors whose gradients and optimiser states are copied, and the most elements that each has.
NUM_TENSORS, MOST_ELEMENTS = 6, 1 << 18
#: Numbers that are copied of each frozen weight.
SAMPLED = 64
#: Options of an adapter that decide what it computes.
ADAPTER_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "use_rslora", "use_dora",
    "trainable_token_indices", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
)  # fmt: skip
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TrainingRecorder(TrainerCallback):
    """Shows each update to `receive` as a sheet: a whole one where it is due, else the step size and the rows drawn.

    Args:
        facts: what is the same on each sheet: options, and where the models come from.
        audit_steps: updates between whole sheets; the first that it sees is one, and the second is one without a model.
    """

    def __init__(
        self, trainer: Any, facts: Mapping[str, Any], audit_steps: int, receive: Callable[[Sheet, Any], None]
    ) -> None:
        self.trainer, self.facts, self.audit_steps, self.receive = trainer, dict(facts), audit_steps, receive
        self._sheet = Sheet(0)
        self._copies = self._seen_one = False
        self._first = 0
        self._recent: deque[tuple[list[Any], Any]] = deque(maxlen=2 * trainer.args.gradient_accumulation_steps + 4)
        self._chosen: dict[str, nn.Parameter] = {}
        self._frozen: dict[str, int] = {}
        self._draws = Draws(trainer)
        self._hooks: list[Any] = []
        trainer.on_microbatch = self.on_microbatch
        trainer.data_collator = _Collator(trainer.data_collator, self._recent)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rows may come again from here on."""
        self._draws.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a sheet."""
        step = state.global_step + 1
        self._first = self._first or step
        is_due = step == self._first or state.global_step % self.audit_steps == 0
        self._copies = is_due or step == self._first + 1
        self._sheet = Sheet(step, {**self.facts, "microbatches": [], "model": is_due, "copies": self._copies})
        self._draws.begin_step()
        if not self._copies:
            return
        self._chosen = self._choose()
        frozen = self._frozen_weights()
        prints = fingerprints(frozen)
        self._frozen = self._frozen or prints
        self._sheet.facts |= {
            "leftover_before": _norm(self._gradients()),
            "frozen_first": self._frozen,
            "frozen_before": prints,
            "dropout": _dropout(self.trainer.model),
        }
        if is_due:
            self._copy_model(frozen)

    def on_microbatch(self, inputs: Mapping[str, Any], loss: Tensor) -> None:
        """Copy what a microbatch was trained on, its loss, and the gradients so far."""
        self._draws.add(inputs)
        if not self._copies:
            return
        entries = self._sheet.facts["microbatches"]
        number = len(entries)
        entries.append({"loss": float(loss), "rows": self._rows_of(inputs), "is_training": self.trainer.model.training})
        for name, tensor in inputs.items():
            if isinstance(tensor, Tensor):
                self._sheet.tensors[f"inputs/{number}/{name}"] = tensor.detach().cpu().clone()
        for earlier in [name for name in self._sheet.tensors if name.startswith("gradient/earlier/")]:
            del self._sheet.tensors[earlier]
        for name in [name for name in self._sheet.tensors if name.startswith("gradient/all/")]:
            self._sheet.tensors[name.replace("/all/", "/earlier/", 1)] = self._sheet.tensors.pop(name)
        self._copy_gradients("gradient/all")
        self._sheet.facts["norm"] = _norm(self._gradients())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy what the optimiser is about to use."""
        self._sheet.facts["rates"] = [float(group["lr"]) for group in self.trainer.optimizer.param_groups]
        if self._copies:
            self._copy_gradients("clipped")
            self._copy_weights("before")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy what the step has changed, and hand the sheet over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        leftover = _norm(self._gradients())
        self._sheet.facts |= {"leftover_after": leftover, "drawn": self._draws.problem(), "max_steps": state.max_steps}
        self._sheet.facts |= {"num_rows": len(self.trainer.train_dataset)}
        if self._copies:
            self._copy_weights("after")
            self._sheet.facts["frozen_after"] = fingerprints(self._frozen_weights())
        sheet, self._sheet = self._sheet, Sheet(0)
        self.receive(sheet, control)

    def _copy_model(self, frozen: Mapping[str, Tensor]) -> None:
        """Copy the trained weights, a few numbers of each frozen one, and what the model returns of each batch."""
        model, tensors = self.trainer.model, self._sheet.tensors
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if sum(p.numel() * p.element_size() for p in trained.values()) <= MOST_BYTES:
            tensors |= {f"weights/{name}": p.detach().cpu().clone() for name, p in trained.items()}
        for name, weight in frozen.items():
            if weight.is_floating_point():
                tensors[f"frozen/{name}"] = sampled(weight)
        if isinstance(model, PeftModel):
            options = model.peft_config["default"].to_dict()
            self._sheet.facts["adapter"] = {
                name: sorted(options[name]) if isinstance(options[name], set) else options[name]
                for name in ADAPTER_OPTIONS
            }
        if self.facts["stage"] == "pretrain":
            self._sheet.facts["shape"] = model.config.to_dict()
        if self.facts["stage"] == "reward":
            self._hooks.append(model.register_forward_hook(self._copy_scores, with_kwargs=True))

    def _copy_scores(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        number = len(self._sheet.facts["microbatches"])
        place = f"scores/{number}/{sum(name.startswith(f'scores/{number}/') for name in self._sheet.tensors) // 3}"
        self._sheet.tensors[f"{place}/ids"] = kwargs["input_ids"].detach().cpu().clone()
        self._sheet.tensors[f"{place}/mask"] = kwargs["attention_mask"].detach().cpu().clone()
        self._sheet.tensors[f"{place}/logits"] = output.logits.detach().float().cpu().clone()

    def _rows_of(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of the data set that a batch was made of; none if it is not what the collator made."""
        ids = inputs["input_ids"].cpu()
        for rows, batch in self._recent:
            if torch.equal(batch["input_ids"], ids):
                wanted = ("input_ids", "labels", "prompt", "responses", "ratings")
                known = [row for row in rows if isinstance(row, Mapping)]
                return [{name: row[name] for name in wanted if name in row} for row in known]
        return []

    def _choose(self) -> dict[str, nn.Parameter]:
        """Return a few trained tensors, from the first layers to the head."""
        trained = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        small = {name: p for name, p in trained.items() if p.numel() <= MOST_ELEMENTS} or dict(
            list(trained.items())[:1]
        )
        names = list(small)
        places = {round(i * (len(names) - 1) / (NUM_TENSORS - 1)) for i in range(NUM_TENSORS)}
        return {names[place]: small[names[place]] for place in sorted(places)}

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.trainer.model.parameters() if p.grad is not None]

    def _frozen_weights(self) -> dict[str, Tensor]:
        parameters = self.trainer.model.named_parameters()
        return {name: p for name, p in parameters if not p.requires_grad and p.numel() and not p.is_meta}

    def _copy_gradients(self, place: str) -> None:
        for name, parameter in self._chosen.items():
            if parameter.grad is not None:
                self._sheet.tensors[f"{place}/{name}"] = parameter.grad.detach().cpu().clone()

    def _copy_weights(self, place: str) -> None:
        """Copy the chosen weights with their optimiser states."""
        states = self.trainer.optimizer.state
        for name, parameter in self._chosen.items():
            self._sheet.tensors[f"{place}/weight/{name}"] = parameter.detach().cpu().clone()
            for key, value in states.get(parameter, {}).items():
                self._sheet.tensors[f"{place}/{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone()


class _Collator:
    """A collator that keeps the last few batches with the rows that they were made of."""

    def __init__(self, collate: Any, recent: deque[tuple[list[Any], Any]]) -> None:
        self.collate, self.recent = collate, recent

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        self.recent.append((rows, batch))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collate, name)


class Draws:
    """Counts the rows that are trained on by their tokens, to find some that come again too early."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._epoch: Counter[bytes] = Counter()
        self._step: list[bytes] = []
        self._firsts: list[list[bytes]] = []
        self._copies: Counter[bytes] = Counter()

    def begin_epoch(self) -> None:
        """Forget the rows of the epoch before."""
        self._epoch.clear()
        self._firsts = [*self._firsts[-1:], []]

    def begin_step(self) -> None:
        """Forget the rows of the update before."""
        self._step = []

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count the rows of a microbatch; of a ranking its first response."""
        ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
        rows = [_key(row if mask is None else row[mask[i].bool().cpu()]) for i, row in enumerate(ids)]
        if "prompt" in inputs:
            prompts = inputs["prompt"].tolist()
            rows = [row for i, row in enumerate(rows) if i == 0 or prompts[i] != prompts[i - 1]]
        self._step += rows
        self._epoch.update(rows)

    def problem(self) -> str:
        """Return what is wrong with the rows of this update; empty: nothing."""
        again = [row for row in self._step if self._epoch[row] > 1]
        if again and not self._copies:
            self._copies = Counter(map(_key_of_row, self.trainer.train_dataset))
        twice = sum(self._epoch[row] > self._copies[row] > 0 for row in set(again))
        if twice:
            return f"{twice} of {len(self._step)} rows were trained on in this epoch before"
        if not self._firsts or self._firsts[-1]:
            return ""
        self._firsts[-1] = sorted(self._step)
        chances = math.comb(len(self.trainer.train_dataset), min(len(self._step), len(self.trainer.train_dataset)))
        if self._firsts[0] == self._firsts[-1] and len(self._firsts) > 1 and chances > 10_000:
            return "the epoch begins with the same rows as the one before"
        return ""


def _key(ids: Tensor) -> bytes:
    return ids.to(torch.int32).numpy().tobytes()


def _key_of_row(row: Any) -> bytes:
    ids = row["input_ids"] if isinstance(row, Mapping) else row
    return _key(torch.tensor(ids[0] if isinstance(ids[0], list) else list(ids)))


def sampled(weight: Tensor) -> Tensor:
    """Return a few numbers of a weight, evenly spread."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu().clone()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a number of each tensor that changes with any single bit of it."""
    bits = [t.detach().contiguous().view(_WHOLE_NUMBERS[t.element_size()]) for t in tensors.values()]
    sums = torch.stack([part.sum(dtype=torch.int64) for part in bits]).tolist() if bits else []
    return dict(zip(tensors, sums, strict=True))


def _norm(gradients: Sequence[Tensor]) -> float:
    squares = [gradient.detach().double().square().sum() for gradient in gradients]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _dropout(model: nn.Module) -> dict[str, Any]:
    """Return the shares that a model drops while it trains: of its adapters' inputs, and of anything."""
    dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    shares: Any = getattr(model, "config", None)
    shares = shares.to_dict() if shares is not None and hasattr(shares, "to_dict") else {}
    named = [v for k, v in shares.items() if (k.endswith(("dropout", "_pdrop"))) and isinstance(v, float)]
    adapters = sorted({p for name, p in dropouts.items() if "lora_dropout" in name})
    return {"adapters": adapters or [0.0], "largest": max([0.0, *dropouts.values(), *named])}
