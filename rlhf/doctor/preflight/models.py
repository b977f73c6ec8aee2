"""Preflight, models: trainable parameters, gradients, and what saving and merging change.

Everything runs on a batch of a few rows and leaves weights, gradients, modes and random numbers as they were
(`preserve_state`, `noise_in_zeros`).
"""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.base import storage
from rlhf.config import TrainingConfig
from rlhf.doctor.preflight.check import Check
from rlhf.models.adapters import fused_experts, lora_layers, matrices_without_adapter
from rlhf.models.compute import Compute
from rlhf.run.optim import MIN_8BIT_SIZE, forget_overrides

#: Largest difference between two runs of equal weights in one type: nats a token, or units of a score.
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.05}
#: Largest difference where weights or outputs were in another type before, so that the weights were rounded, too.
ROUNDING_ACROSS_DTYPES = 0.2
#: Largest share of an adapter's effect that merging may change: the sum of both weights is rounded. Merging twice or not at all
#: changes nearly half or more (tests); reward models of the demo, in bf16, had between an eighth and three tenths.
MERGING_SHARE = {torch.float64: 1e-6, torch.float32: 0.01, torch.bfloat16: 0.4}
#: Largest difference of numbers that should be equal; a GPU may add them in another order.
EQUAL_WITHIN = 1e-3
#: Spread of the noise in fresh adapters: it changes a layer's output by about a quarter, at any width.
NOISE = 0.05
#: Elements of the largest tensor that is copied to look at its optimiser states; smaller ones follow the same rule.
LARGEST_COPY = 2**22
_SHOWN = 3


@contextlib.contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore global random numbers and the modes of all modules at the end, and clear gradients."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training
        for parameter in model.parameters():
            parameter.grad = None


@contextlib.contextmanager
def noise_in_zeros(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Fill tensors that are all zero with a little noise, inside.

    A fresh adapter is zero: merged twice or not at all, saved or lost, it changes nothing, and no gradient passes it.
    """
    generator, originals = torch.Generator().manual_seed(0), dict[str, Tensor]()
    try:
        for name, parameter in parameters.items():
            if not bool(parameter.detach().any()):
                originals[name] = parameter.data
                noise = NOISE * torch.randn(parameter.shape, generator=generator)
                parameter.data = noise.to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, data in originals.items():
            parameters[name].data = data


@contextlib.contextmanager
def zero_weights(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Replace the tensors by zeros that may be written to, inside."""
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.data = torch.zeros_like(parameter)
        yield
    finally:
        for name, data in originals.items():
            parameters[name].data = data


def check_trainable(model: nn.Module, intended: Mapping[str, nn.Parameter], problems: Sequence[str] = ()) -> Check:
    """Check that exactly the intended parameters train.

    Args:
        problems: further faults of them.
    """
    actual = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen, extra = sorted(intended.keys() - actual.keys()), sorted(actual.keys() - intended.keys())
    faults = [f"{_names(frozen)} frozen"] if frozen else []
    faults += [f"{_names(extra)} trained without being meant to"] if extra else []
    faults += list(problems) + ([] if intended else ["nothing trains"])
    numbers = sum(parameter.numel() for parameter in actual.values())
    frozen_rest = matrices_without_adapter(model) if lora_layers(model) else []
    rest = f"; no adapter, frozen: {_names(frozen_rest)}" if frozen_rest else ""
    return Check(
        name="trainable parameters",
        passed=not faults,
        measured="; ".join(faults) or f"{len(actual)} tensors, {numbers:,} numbers, as intended{rest}",
        cause="requires_grad was changed after the adapters were made, or lora_target_modules names no layer",
        fix="name layers that the model has in lora_target_modules, or all-linear; undo changes of requires_grad",
    )


def layers_without_adapter(model: nn.Module, targets: Sequence[str], heads: Iterable[nn.Module | None]) -> list[str]:
    """Return messages about linear layers without an adapter, or about targets that name no layer.

    Args:
        targets: `lora_target_modules`.
        heads: layers that get no adapter by design.
    """
    adapted = list(lora_layers(model))
    if list(targets) != ["all-linear"]:
        return [
            f"lora_target_modules {target} names no layer"
            for target in targets
            if not any(name == target or name.endswith(f".{target}") for name in adapted)
        ]
    exempt = {id(part) for head in heads if head is not None for part in head.modules()}
    config = next(iter(cast(Any, model).peft_config.values()))
    excluded = tuple(config.exclude_modules or ())
    # Beside fused experts peft takes the names of their former layers for those, so layers of such a name cannot be adapted.
    reachable = {name.rpartition(".")[2] for name in config.target_modules} if config.target_parameters else None
    bare = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in exempt
        if not name.endswith((".base_layer", *excluded)) and ".lora_" not in name
        if reachable is None or name.rpartition(".")[2] in reachable
    ]
    experts = [
        name
        for name in fused_experts(cast(Any, model))
        if not name.endswith(tuple(config.target_parameters or ()) or "\0")
    ]
    bare += experts
    return [f"{_names(bare)} without an adapter"] if bare else []


def check_gradients(model: nn.Module, intended: Mapping[str, nn.Parameter]) -> Check:
    """Check that a backward pass reached each of the intended parameters and no other.

    Experts that no token was sent to have no gradient, nor have routers that chose without a doubt, nor input embeddings of
    new tokens that the rows do not hold.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    unreached = [name for name in intended if name not in gradients or not bool(gradients[name].any())]
    unreached = [name for name in unreached if not re.search(r"\.(experts|router|gate|trainable_tokens_delta)\.", name)]
    broken = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    stray = [name for name in gradients if name not in intended]
    faults = [f"none at {_names(unreached)}"] if unreached else []
    faults += [f"not finite at {_names(broken)}"] if broken else []
    faults += [f"one at {_names(stray)}, which is frozen"] if stray else []
    return Check(
        name="gradients",
        passed=not faults,
        measured="; ".join(faults) or f"at each of {len(intended)} tensors, and nowhere else",
        cause="a tensor is cut off from the loss (another model's copy, a detach, a frozen part), or numbers overflow",
        fix="train with the loss and models of this version; with overflow, use --dtype float32",
    )


def check_reload(
    parameters: Mapping[str, nn.Parameter],
    save: Callable[[Path], None],
    load: Callable[[Path], None],
    outputs: Callable[[], Tensor],
    place: Path,
) -> Check:
    """Check that an adapter (and its head) gives the same outputs after saving and loading into zeros.

    Args:
        parameters: all that trains, and so has to be in the file.
        place: folder for the file, which is removed again.
    """
    original = outputs()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        try:
            save(Path(folder))
        except Exception as error:
            if not storage.is_failure(error):
                raise
            return _reload_check(False, f"nothing can be written to {place}: {str(error).splitlines()[0]}")
        with zero_weights(parameters):
            zeroed = outputs()
            try:
                load(Path(folder))
            except (KeyError, ValueError, RuntimeError) as error:  # a tensor is missing or has another shape
                return _reload_check(False, f"the saved file cannot be loaded: {error}")
            reloaded = outputs()
    difference, effect = _largest(reloaded - original), _largest(zeroed - original)
    measured = f"outputs differ by {difference:.2g} (limit {EQUAL_WITHIN:g}); without the file by {effect:.2g}"
    return _reload_check(difference <= EQUAL_WITHIN, measured)


def _reload_check(passed: bool, measured: str) -> Check:
    return Check(
        name="adapter and head reload",
        passed=passed,
        measured=measured,
        cause="a tensor is not in the saved file, or under another name, so it would start anew; or the disk takes no file",
        fix="train and save lora_target_modules and the score head with one peft version, on a disk that can be written to",
    )


def check_merged(unmerged: Tensor, merged: Tensor, without: Tensor, compute: Compute, outputs: str) -> Check:
    """Check that an adapter gives the same outputs merged into the base weights as beside them.

    Args:
        without: outputs of the base; an adapter that is merged twice or not at all is as far off.
        outputs: name and unit of the outputs.
    """
    difference, limit = float((unmerged - merged).abs().mean()), merging_limit(unmerged, without, compute)
    return Check(
        name="merged equals unmerged",
        passed=difference <= limit,
        measured=f"{outputs} differ by {difference:.2g} on average (limit {limit:.2g})",
        cause="the adapter is merged with another scale, twice, or not at all",
        fix="leave merging to rlhf.models; with use_rslora or use_dora, check that the saved adapter config says so",
    )


def merging_limit(unmerged: Tensor, without: Tensor, compute: Compute) -> float:
    """Return how far rounding may move a merged adapter's outputs: a share of its effect, at least what equal weights may."""
    effect = float((unmerged - without).abs().mean())
    return max(effect * MERGING_SHARE[compute.dtype], ROUNDING[compute.dtype])


def check_probe(
    name: str, values: Tensor, expected: Sequence[float], dtype: str, compute: Compute, *, merged: bool = False
) -> Check:
    """Check that a parent gives the values of its probe as it did when it was trained.

    Args:
        name: of the parent.
        values: (n,) computed here.
        expected: values of the trained model, in the compute type `dtype`.
        merged: the adapter is part of the weights here, which were rounded once more.
    """
    target = torch.tensor(expected, dtype=torch.float64)
    same_type = compute.dtype == getattr(torch, dtype) and not (merged and compute.dtype == torch.bfloat16)
    limit = ROUNDING[compute.dtype] if same_type else ROUNDING_ACROSS_DTYPES
    limit *= max(1.0, float(target.square().mean().sqrt()))
    difference = _largest(values.double().cpu() - target)
    return Check(
        name=f"{name.split('/')[0]} model loads as it was trained",
        passed=difference <= limit,
        measured=f"{name} gives the values of {len(expected)} rows with a difference of {difference:.2g} (limit {limit:.2g})",
        cause="its base model, adapter or head is not what it was trained with, or is applied twice or not at all",
        fix=f"see that base model and revision are those of `rlhf registry show {name}`, or train it again",
    )


def check_trainer_optimizer(trainer: Any, parameters: Iterable[nn.Parameter], config: TrainingConfig) -> Check:
    """Check the states of the optimiser of transformers' Trainer."""
    forget_overrides()  # as the stages do when they start to train
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    smallest = MIN_8BIT_SIZE if config.optim == "adamw_8bit" else None
    return check_optimizer(parameters, lambda copies: kind(copies, **settings), smallest=smallest)


def check_optimizer(
    parameters: Iterable[nn.Parameter],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    smallest: int | None,
) -> Check:
    """Check that optimiser states have 8 bits where the config says so, and 32 where precision counts.

    Makes one step on copies of the shapes that train, so that the states exist.

    Args:
        make: the run's optimiser, of other parameters.
        smallest: elements from which on states have 8 bits; None for 32 bits throughout.
    """
    shapes = {p.shape: p for p in parameters if p.numel() <= LARGEST_COPY}
    copies = [nn.Parameter(torch.zeros_like(p)) for p in shapes.values()]
    optimizer = make(copies)
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    optimizer.step()
    wrong: list[str] = []
    small = 0
    for copy in copies:
        expected = smallest is not None and copy.numel() >= smallest
        moments = [s for s in optimizer.state[copy].values() if isinstance(s, Tensor) and s.shape == copy.shape]
        dtypes = {str(moment.dtype).removeprefix("torch.") for moment in moments}
        small += expected
        if not moments or (dtypes == {"uint8"}) != expected:
            wrong.append(f"{tuple(copy.shape)} in {', '.join(sorted(dtypes)) or 'nothing'}")
    rule = "32 bits" if smallest is None else f"8 bits from {smallest:,} elements on"
    sound = f"{rule}, so at {small} of {len(copies)} shapes that train" if smallest else rule
    return Check(
        name="optimiser states",
        passed=not wrong,
        measured=f"should have {rule}, are {_names(wrong)}" if wrong else sound,
        cause="bitsandbytes fell back to 32 bits, or a head or norm is held in 8",
        fix="use a bitsandbytes that supports this machine, or --optim adamw_torch",
    )


def parameters_matching(model: nn.Module, pattern: str, *, without: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match a regular expression somewhere, and do not end as some others."""
    ends = tuple(without)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(pattern, name) and not name.endswith(ends)
    }


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().nan_to_num(nan=torch.inf).max())


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
