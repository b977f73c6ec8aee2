"""Seconds of operators: measured here one by one, at the model's own shapes, or by the published rates of a GPU."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from rlhf.base.errors import UserError, did_you_mean
from rlhf.doctor.plan.rehearsal import Operator, Shape

#: Seconds that a calibration may take, and those of Python's work around an operator.
BUDGET, AROUND = 3.0, 2e-5
#: Seconds below which an operator is called again: an interruption would be many times its time.
BRIEF = 3e-3
#: First guess of a processor's rates, by which the order of the measurements goes: operations and bytes a second.
_FLOPS, _BYTES = 1e11, 1e10


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """Dense bf16 operations a second."""


#: Memory, bandwidth and dense bf16 rate with sums in fp32 (half of what sheets give with sparsity), as the maker publishes them,
#: of the SXM form where there are several. Only A100, L4, L40S and RTX 4090, and memory and bandwidth of H100 and H200, were
#: compared with pages that repeat the sheets.
GPUS = {
    "a100-40gb": Gpu(40e9, 1.555e12, 312e12),
    "a100-80gb": Gpu(80e9, 2.039e12, 312e12),
    "a10": Gpu(24e9, 0.600e12, 125e12),
    "h100": Gpu(80e9, 3.35e12, 989e12),
    "h200": Gpu(141e9, 4.8e12, 989e12),
    "l4": Gpu(24e9, 0.300e12, 121e12),
    "l40s": Gpu(48e9, 0.864e12, 362e12),
    "rtx-3090": Gpu(24e9, 0.936e12, 71e12),
    "rtx-4090": Gpu(24e9, 1.008e12, 165e12),
    "rtx-5090": Gpu(32e9, 1.792e12, 209e12),
    "t4": Gpu(16e9, 0.320e12, 8.1e12),  # has no units for bf16, so that of fp32
}
#: Assumptions for a GPU that is not here: share of its rates that is reached, and seconds to launch an operator.
UTILISATION, LAUNCH = 0.4, 12.5e-6


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        UserError: it is not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"no GPU '{name}' is known{did_you_mean(name.lower(), GPUS)}; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def on_gpu(gpu: Gpu) -> Callable[[Operator], float]:
    """Return the estimate of an operator's seconds on a GPU that is not here."""

    def seconds(operator: Operator) -> float:
        return max(operator.flops / gpu.flops, operator.nbytes / gpu.bandwidth) / UTILISATION + LAUNCH

    return seconds


def calibrated(
    operators: Counter[Operator],
    device: torch.device,
    *,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[Operator], float]:
    """Measure the operators that cost most, each at its own shapes, and return the estimate of any operator's seconds.

    Args:
        operators: with the number of their calls.
        budget: seconds after which the others are judged by those that were measured.
    """
    measured: dict[Operator, float] = {}
    started = clock()
    for operator in sorted(operators, key=lambda one: -operators[one] * _guess(one)):
        if clock() - started > budget:
            break
        try:
            measured[operator] = _seconds(operator, device, clock)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            continue  # it reads numbers that a made-up tensor does not have
    ratio = sum(measured.values()) / max(sum(map(_guess, measured)), 1e-9)
    return lambda operator: AROUND + measured.get(operator, ratio * _guess(operator))


def _guess(operator: Operator) -> float:
    return operator.flops / _FLOPS + operator.nbytes / _BYTES + 1e-6


def _seconds(operator: Operator, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of a call, after one that does not count; the median of three where they are brief."""
    arguments, options = tree_map(partial(_made_up, device), (operator.arguments, dict(operator.options)))
    call = partial(operator.function, *arguments, **options)
    with torch.no_grad():
        if operator.ordered:
            rows, weight = arguments[0].flatten(0, -2), arguments[1]
            weight = torch.ops.mkldnn._reorder_linear_weight((weight[0] if weight.dim() > 2 else weight).T.contiguous())
            call = partial(torch.ops.mkldnn._linear_pointwise, rows, weight, None, "none", [], "")
        times: list[float] = []
        while len(times) < 4 and (len(times) < 2 or sum(times[1:]) < BRIEF):
            started = clock()
            call()
            _wait(device)
            times.append(clock() - started)
        return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _made_up(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.device):
        return device
    if not isinstance(value, Shape):
        return value
    tensor = torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=device)
    return tensor.fill_(0.01) if value.dtype.is_floating_point else tensor.zero_()
