"""Preflight, models: what trains, what a gradient reaches, what saving and merging change.

All of it is looked at on a batch of a few rows and leaves nothing behind: weights, gradients, modes and random numbers are
as they were (`preserve_state`, `noise_in_zeros`).
"""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.base import storage
from rlhf.doctor.preflight.check import Check
from rlhf.models.adapters import lora_layers
from rlhf.models.compute import Compute

#: Differences that are rounding where the same weights are computed with again, in nats a token or units of a score.
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.05}
#: The same where they were computed with in another type: weights were rounded, too.
ROUNDING_ACROSS_DTYPES = 0.2
#: Share of what an adapter does that merging it may change: the sum of both weights is rounded. Merged twice or not at all, it is
#: nearly half or more (tests); reward models of the demo, in bf16, had between an eighth and three tenths.
MERGING_SHARE = {torch.float64: 1e-6, torch.float32: 0.01, torch.bfloat16: 0.4}
#: Differences that are none: the same numbers in the same order, on a GPU perhaps in another one.
EQUAL_WITHIN = 1e-3
#: Spread of the noise in fresh adapters: a change of about a quarter of what a layer does, at any width.
_NOISE = 0.05
#: Tensors of more elements than this are not copied to look at their optimiser states; the rule is that of smaller ones.
_LARGEST_COPY = 2**22
_SHOWN = 3


@contextlib.contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leaves global random numbers, the modes of all modules, and gradients (none) as they were."""
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
    """Inside, tensors that are all zero hold a little noise.

    A fresh adapter is zero: merged twice or not at all, saved or lost, it changes nothing, and no gradient passes it.
    """
    generator, kept = torch.Generator().manual_seed(0), dict[str, Tensor]()
    try:
        for name, parameter in parameters.items():
            if not bool(parameter.detach().any()):
                kept[name] = parameter.data
                noise = _NOISE * torch.randn(parameter.shape, generator=generator)
                parameter.data = noise.to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data


@contextlib.contextmanager
def zero_weights(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the tensors hold zeros that may be written to."""
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.data = torch.zeros_like(parameter)
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ask for a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_trainable(model: nn.Module, intended: Mapping[str, nn.Parameter], problems: Sequence[str] = ()) -> Check:
    """That exactly the intended parameters train.

    Args:
        problems: what else was found about them.
    """
    actual = trained(model)
    missing, more = sorted(intended.keys() - actual.keys()), sorted(actual.keys() - intended.keys())
    found = [f"{_names(missing)} frozen"] if missing else []
    found += [f"{_names(more)} trained without being meant to"] if more else []
    found += list(problems) + ([] if intended else ["nothing trains"])
    numbers = sum(parameter.numel() for parameter in actual.values())
    return Check(
        name="trainable parameters",
        passed=not found,
        measured="; ".join(found) or f"{len(actual)} tensors, {numbers:,} numbers, as intended",
        cause="requires_grad was changed after the adapters were made, or lora_target_modules names no layer",
        fix="name layers that the model has in lora_target_modules, or all-linear; undo changes of requires_grad",
    )


def layers_without_adapter(model: nn.Module, targets: Sequence[str], heads: Iterable[nn.Module | None]) -> list[str]:
    """Which linear layers of an adapted model got no adapter, or which targets name no layer of it.

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
    left_out = {id(part) for head in heads if head is not None for part in head.modules()}
    bare = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in left_out
        if not name.endswith(".base_layer") and ".lora_" not in name
    ]
    return [f"{_names(bare)} without an adapter"] if bare else []


def check_gradients(model: nn.Module, intended: Mapping[str, nn.Parameter]) -> Check:
    """That a gradient reached each of the intended parameters and none else; called after a backward pass.

    Experts that no token was sent to have none, nor have input embeddings of new tokens that the rows do not hold.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    unreached = [name for name in intended if name not in gradients or not bool(gradients[name].any())]
    unreached = [name for name in unreached if ".experts." not in name and ".trainable_tokens_delta." not in name]
    broken = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    stray = [name for name in gradients if name not in intended]
    found = [f"none at {_names(unreached)}"] if unreached else []
    found += [f"not finite at {_names(broken)}"] if broken else []
    found += [f"one at {_names(stray)}, which is frozen"] if stray else []
    return Check(
        name="gradients",
        passed=not found,
        measured="; ".join(found) or f"at each of {len(intended)} tensors, and nowhere else",
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
    """That what is saved of an adapter (and its head) gives the same outputs when it is loaded into an empty one.

    Args:
        parameters: all that trains, and so has to be in the file.
        place: folder for the file, which is removed again.
    """
    before = outputs()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        try:
            save(Path(folder))
        except Exception as error:
            if not storage.is_failure(error):
                raise
            return _reload_check(False, f"nothing can be written to {place}: {str(error).splitlines()[0]}")
        with zero_weights(parameters):
            empty = outputs()
            try:
                load(Path(folder))
            except (KeyError, ValueError, RuntimeError) as error:  # a tensor is missing or has another shape
                return _reload_check(False, f"the saved file cannot be loaded: {error}")
            after = outputs()
    difference, effect = _largest(after - before), _largest(empty - before)
    told = f"outputs differ by {difference:.2g} (limit {EQUAL_WITHIN:g}); without the file by {effect:.2g}"
    return _reload_check(difference <= EQUAL_WITHIN, told)


def _reload_check(passed: bool, measured: str) -> Check:
    return Check(
        name="adapter and head reload",
        passed=passed,
        measured=measured,
        cause="a tensor is not in the saved file, or under another name, so it would start anew; or the disk takes no file",
        fix="train and save lora_target_modules and the score head with one peft version, on a disk that can be written to",
    )


def check_merged(unmerged: Tensor, merged: Tensor, without: Tensor, compute: Compute, what: str) -> Check:
    """That the adapter merged into the base weights says what the adapter beside them says.

    Args:
        without: what the base says; merged twice or not at all is as far off as this.
    """
    difference, limit = float((unmerged - merged).abs().mean()), merging_limit(unmerged, without, compute)
    return Check(
        name="merged equals unmerged",
        passed=difference <= limit,
        measured=f"{what} differ by {difference:.2g} on average (limit {limit:.2g})",
        cause="the adapter is merged with another scale, twice, or not at all",
        fix="leave merging to rlhf.models; with use_rslora or use_dora, check that the saved adapter config says so",
    )


def merging_limit(unmerged: Tensor, without: Tensor, compute: Compute) -> float:
    """By how much rounding may change what a merged adapter says: a share of what the adapter changes."""
    effect = float((unmerged - without).abs().mean())
    # Whole models have no adapter, and nothing is merged.
    return effect * MERGING_SHARE[compute.dtype] if effect else ROUNDING[compute.dtype]


def check_probe(
    name: str, now: Tensor, then: Sequence[float], dtype: str, compute: Compute, *, merged: bool = False
) -> Check:
    """That a parent answers its probe as it did when it was trained.

    Args:
        name: of the parent.
        now: (n,) what it says here.
        then: what it said, in the compute type `dtype`.
        merged: its adapter is part of the weights here, which were rounded once more.
    """
    expected = torch.tensor(then, dtype=torch.float64)
    same = compute.dtype == getattr(torch, dtype) and not (merged and compute.dtype == torch.bfloat16)
    limit = ROUNDING[compute.dtype] if same else ROUNDING_ACROSS_DTYPES
    limit *= max(1.0, float(expected.square().mean().sqrt()))
    difference = _largest(now.double().cpu() - expected)
    return Check(
        name=f"{name.split('/')[0]} model loads as it was trained",
        passed=difference <= limit,
        measured=f"{name} answers {len(then)} rows with a difference of {difference:.2g} (limit {limit:.2g})",
        cause="its base model, adapter or head is not what it was trained with, or is applied twice or not at all",
        fix=f"see that base model and revision are those of `rlhf registry show {name}`, or train it again",
    )


def check_optimizer(
    parameters: Iterable[nn.Parameter],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    smallest: int | None,
) -> Check:
    """That the optimiser keeps its states in 8 bits where that was asked for, and in 32 where precision counts.

    Makes one step on copies of the shapes that train, so that the states exist.

    Args:
        make: the run's optimiser, of other parameters.
        smallest: elements from which on states are to have 8 bits; None: 32 bits were asked for.
    """
    shapes = {p.shape: p for p in parameters if p.numel() <= _LARGEST_COPY}
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
        kept = {str(moment.dtype).removeprefix("torch.") for moment in moments}
        small += expected
        if not moments or (kept == {"uint8"}) != expected:
            wrong.append(f"{tuple(copy.shape)} in {', '.join(sorted(kept)) or 'nothing'}")
    asked = "32 bits" if smallest is None else f"8 bits from {smallest:,} elements on"
    right = f"{asked}, so at {small} of {len(copies)} shapes that train" if smallest else asked
    return Check(
        name="optimiser states",
        passed=not wrong,
        measured=f"asked for {asked}, kept {_names(wrong)}" if wrong else right,
        cause="bitsandbytes fell back to 32 bits, or a head or norm is held in 8",
        fix="use a bitsandbytes that supports this machine, or --optim adamw_torch",
    )


def parameters_matching(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """The parameters whose names hold a pattern."""
    return {name: parameter for name, parameter in model.named_parameters() if re.search(pattern, name)}


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().nan_to_num(nan=torch.inf).max())


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
