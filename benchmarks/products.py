"""The matrix products that a stage's work cannot do without, and the time of each on this machine; see `floor.py`."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import common
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.doctor.plan.rates import _seconds
from rlhf.doctor.plan.rehearsal import Operator, Shape
from rlhf.doctor.plan.twin import read_shape, twin
from rlhf.models.adapters import fitted, lora_config, with_adapter
from rlhf.models.anatomy import backbone
from rlhf.models.decoding import has_ordered_products
from rlhf.ppo.credit import estimator
from rlhf.run.memory import cache_bytes

#: What `Floor` counts by, in its order.
SIZES = ("episodes", "microbatch", "prompt", "response")
#: Of a PPO update, in order.
PHASES = ("rollout", "score", "optimise")
#: Positions whose logits PPO makes together.
LOGITS_AT_ONCE = {"cpu": 128, "cuda": 1024}
#: Measurements of a rate, of which the median counts.
REPEATS = 5
#: Seconds of products, and under None those of a byte that is read.
Times = dict[Operator | None, float]


class Layer(NamedTuple):
    """A linear layer; those of one kind are equal."""

    name: str
    inputs: int
    outputs: int
    rank: int = 0
    """Of its adapter."""
    across: bool = False
    """The weight is (inputs, outputs), as GPT-2 has it."""
    experts: int = 1
    share: float = 1.0
    """Of the tokens, that an expert sees."""


@dataclass
class Piece:
    """Products of a piece of work, with the number of times."""

    base: Counter[Operator] = field(default_factory=Counter)
    adapters: Counter[Operator] = field(default_factory=Counter)
    step: Counter[Operator] = field(default_factory=Counter)
    """Of one decoding step."""
    steps: int = 0
    step_bytes: float = 0.0
    """Weights, keys and values that a step reads, on average."""

    def __add__(self, other: Piece) -> Piece:
        own = self if self.steps else other
        base, adapters = self.base + other.base, self.adapters + other.adapters
        return Piece(base, adapters, own.step, own.steps, own.step_bytes)

    def flops(self) -> dict[str, float]:
        """Multiplications and additions, of the base and of the adapters."""
        base, adapters, step = (
            _sum(products, lambda one: one.flops) for products in (self.base, self.adapters, self.step)
        )
        return {"base": base + self.steps * step, "adapters": adapters}

    def seconds(self, times: Times) -> dict[str, float]:
        """The floor of the base products, and that with the adapters'."""
        base, adapters, step = (_sum(part, times.__getitem__) for part in (self.base, self.adapters, self.step))
        base += self.steps * max(step, self.step_bytes * times[None])
        return {"base": base, "with adapters": base + adapters}


def _sum(products: Counter[Operator], figure: Callable[[Operator], float]) -> float:
    return sum(count * figure(one) for one, count in products.items())


def product(
    rows: int, inner: int, columns: int, dtype: torch.dtype, turned: str = "", ordered: bool = False
) -> Operator:
    """(rows, inner) by (inner, columns); the side that is `turned`, left or right, lies in memory column by column."""
    left = Shape((rows, inner), (1, rows) if turned == "left" else (inner, 1), dtype)
    right = Shape((inner, columns), (1, inner) if turned == "right" else (columns, 1), dtype)
    return Operator(torch.ops.aten.mm.default, (left, right), (), ordered)


def linear_layers(model: nn.Module, per_token: int) -> Iterator[Layer]:
    """Linear layers, with numbers in their names as `*`; of fused experts a token sees `per_token`."""
    for path, module in model.named_modules():
        name = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path.replace(".base_layer", ""))
        if isinstance(module, LoraLayer):
            experts, across = getattr(module, "num_experts", 1), isinstance(module.get_base_layer(), Conv1D)
            layer = Layer(name, module.in_features, module.out_features, next(iter(module.r.values())), across)
            yield layer._replace(experts=experts, share=min(per_token / experts, 1.0))
        elif isinstance(module, nn.Linear | Conv1D) and ".base_layer" not in path and ".lora_" not in path:
            across = isinstance(module, Conv1D)
            yield Layer(name, *(module.weight.shape if across else module.weight.shape[::-1]), across=across)


class Floor:
    """Products of the pieces of a stage's work, and their times on this machine."""

    def __init__(self, stage: str, model: str, config: Any, episodes: int, microbatch: int, prompt: int, response: int):
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.full = getattr(config, "finetuning", "lora") == "full"
        base = twin(read_shape(model, config.registry), config, self.dtype)
        with_adapter(base, fitted(base, lora_config(config, "CAUSAL_LM")))  # in place
        named = base.config.get_text_config().to_dict().items()
        per_token = [n for name, n in named if type(n) is int and re.search(r"experts_per_tok|^moe_(top_?)?k$", name)]
        self.layers = Counter(linear_layers(backbone(base), *per_token[:1] or [1]))
        self.head = Layer("head", *cast(Any, base.get_output_embeddings()).weight.shape[::-1])
        self.episodes, self.answers, batches = episodes, microbatch * response, math.ceil(episodes / microbatch)
        self.rows, self.at_once = microbatch * (prompt + response), self.answers
        if stage == "reward":  # pairs, each prompt once
            self.rows = max(microbatch // 2, 1) * (prompt + 2 * response)
            self.pieces = {"reward step": self.passes(1, gradients=1, adapters=1)}
        elif stage == "sft":
            trunk = self.passes(batches, gradients=batches, adapters=batches)
            self.pieces = {"SFT step": trunk + self.logits(batches, gradients=batches)}
        else:
            self.at_once = min(LOGITS_AT_ONCE[self.device.type], self.answers)
            values = int(config.value_model != "shared_trunk" and estimator(config).needs_values)
            trained = batches * config.num_ppo_epochs
            score = self.passes(batches * (3 + values), adapters=batches * (2 + values)) + self.logits(2 * batches)
            both = trained * (1 + values)
            optimise = self.passes(both, gradients=both, adapters=both) + self.logits(trained, gradients=trained)
            weights = sum(n * x.experts * x.inputs * x.outputs for x, n in [*self.layers.items(), (self.head, 1)])
            rollout = self.passes(1, rows=episodes * prompt) + self.logits(1, rows=episodes)
            rollout.step, rollout.steps = self._decoding(episodes), response - 1
            cached = episodes * cache_bytes(base, 1) * (prompt + (response - 1) / 2)
            rollout.step_bytes = weights * self.dtype.itemsize + cached
            self.pieces = dict(zip(PHASES, (rollout, score, optimise), strict=True))
            self.pieces["update"] = rollout + score + optimise

    def forward(self, layer: Layer, rows: int, ordered: bool = False) -> Operator:
        """A layer's product with its inputs."""
        turned = "" if layer.across else "right"
        return product(math.ceil(rows * layer.share), layer.inputs, layer.outputs, self.dtype, turned, ordered)

    def backward(self, layer: Layer, rows: int) -> Operator:
        """The gradient of a layer's inputs."""
        turned = "right" if layer.across else ""
        return product(math.ceil(rows * layer.share), layer.outputs, layer.inputs, self.dtype, turned)

    def weight(self, layer: Layer, rows: int) -> Operator:
        """The gradient of a layer's weight."""
        return product(layer.outputs, rows, layer.inputs, self.dtype, "left")

    def passes(self, forwards: int, *, gradients: int = 0, adapters: int = 0, rows: int = 0) -> Piece:
        """Passes through all layers; those with gradients train the adapters, or all weights."""
        piece, rows = Piece(), rows or self.rows
        for layer, number in self.layers.items():
            times, own = number * layer.experts, math.ceil(rows * layer.share)
            piece.base[self.forward(layer, rows)] += times * forwards
            piece.base[self.backward(layer, rows)] += times * gradients
            parts = (Layer("A", layer.inputs, layer.rank), Layer("B", layer.rank, layer.outputs))
            for side in () if self.full or not layer.rank else parts:
                piece.adapters[self.forward(side, own)] += times * adapters
                piece.adapters[self.backward(side, own)] += times * gradients
                piece.adapters[self.weight(side, own)] += times * gradients
            if self.full:
                piece.base[self.weight(layer, own)] += times * gradients
        return Piece(+piece.base, +piece.adapters)

    def logits(self, forwards: int, *, gradients: int = 0, rows: int = 0) -> Piece:
        """Products of the head on the answers of a microbatch, or on `rows`."""
        piece, rows = Piece(), rows or self.answers
        for part, number in ((self.at_once, rows // self.at_once), (rows % self.at_once, 1)):
            piece.base[self.forward(self.head, part)] += number * forwards * bool(part)
            piece.base[self.backward(self.head, part)] += number * gradients * bool(part)
            piece.base[self.weight(self.head, part)] += number * gradients * bool(part) * self.full
        return Piece(+piece.base)

    def _decoding(self, rows: int) -> Counter[Operator]:
        """Products of a decoding step; on a CPU weights may lie in the order of its bf16 products."""
        ordered = self.device.type == "cpu" and self.dtype == torch.bfloat16 and has_ordered_products()
        parts = Counter[Operator]()
        for layer, number in [*self.layers.items(), (self.head, 1)]:
            plain = not layer.across and layer.experts == 1
            parts[self.forward(layer, rows, ordered and plain)] += number * layer.experts
        return parts

    def times(self) -> Times:
        """Seconds of each product now, and of a byte among as many as a step reads."""
        pieces = self.pieces.values()
        products = {one for piece in pieces for part in (piece.base, piece.adapters, piece.step) for one in part}
        clock, again = time.perf_counter, range(REPEATS)
        times: Times = {p: statistics.median(_seconds(p, self.device, clock) for _ in again) for p in products}
        read = int(min(max(piece.step_bytes for piece in pieces), 1e9)) // 4
        held = torch.ones(max(read, 1 << 20), device=self.device)
        times[None] = min(common.seconds_of(held.sum, REPEATS, self.device.type)) / held.nbytes
        return times

    def over(self, seconds: Mapping[str, float], before: Times, after: Times) -> dict[str, Any]:
        """Each piece's seconds, floors and ratios, by the rates before and after it."""
        figures = {}
        for name, measured in seconds.items():
            first, last = (self.pieces[name].seconds(times) for times in (before, after))
            floor = {kind: (first[kind] + last[kind]) / 2 for kind in first}
            figures[name] = {"seconds": measured, "floor": floor, "ratio": {k: measured / s for k, s in floor.items()}}
        return figures

    def modules(self, times: Times) -> list[dict[str, Any]]:
        """Sizes, GFLOP and rates of the layers of each kind, in a pass of a microbatch."""
        rows = []
        for layer, number in [*self.layers.items(), (self.head, 1)]:
            own = self.at_once if layer is self.head else self.rows
            both = {"forward": self.forward(layer, own), "gradient": self.backward(layer, own)}
            rates = {kind: one.flops / times[one] / 1e12 for kind, one in both.items() if one in times}
            gflop = number * layer.experts * both["forward"].flops / 1e9
            rows.append({**layer._asdict(), "number": number, "rows": own, "gflop": gflop, "tflops": rates})
        return rows
