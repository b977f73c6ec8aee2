"""The option `microbatch_size: auto`: the responses of a pass that fit into a GPU's free memory, by the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.base.json_files import read_object_or_none
from rlhf.config import PPOConfig
from rlhf.data_prep.load import Loaded
from rlhf.doctor.plan.estimate import make_plan
from rlhf.doctor.plan.rates import Gpu
from rlhf.doctor.plan.twin import read_shape
from rlhf.doctor.plan.work import Work, work_of
from rlhf.models.compute import Compute


def with_microbatch(
    config: PPOConfig,
    name: str,
    sets: Mapping[str, Loaded],
    tokenizer: PreTrainedTokenizerBase,
    record: Path,
) -> PPOConfig:
    """Return the config with a number in place of `auto`: a resumed run's own, a CPU's, or what fits into the GPU's memory.

    Args:
        name: of the base model.
        record: of the run in its folder, which has the number of a run that is resumed.
    """
    if config.microbatch_size != "auto":
        return config
    size = _recorded(config, record) if config.resume else None
    compute = Compute.choose(config)
    if size is None and compute.device.type == "cpu":
        size = config.microbatch
    elif size is None:
        size = _fitting_or_usual(config, name, compute, sets, tokenizer)
    return dataclasses.replace(config, microbatch_size=size)


def fitting_microbatch(
    config: PPOConfig, shape: PreTrainedConfig, compute: Compute, work: Work, *, gpu: Gpu | None = None
) -> int:
    """Return the largest divisor of the minibatch whose pass fits into free memory, or 1.

    Activations are a straight line of the rows that does not begin at 0, so a smaller size than the rehearsed one is
    rehearsed again.
    """
    rehearsed, size = config.minibatch_size + 1, config.microbatch
    while size < rehearsed:
        rehearsed = size
        trial = dataclasses.replace(config, microbatch_size=rehearsed)
        size = config.divisor(make_plan(trial, shape, compute, work, gpu=gpu, budget=0.0).fitting)
    return size


def _fitting_or_usual(
    config: PPOConfig,
    name: str,
    compute: Compute,
    sets: Mapping[str, Loaded],
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return the size that fits on every process's GPU and leaves each a microbatch; a CPU's where nothing can be rehearsed."""
    distributed.start()
    try:
        size = fitting_microbatch(config, read_shape(name, config.registry), compute, work_of(config, sets, tokenizer))
        reason = "the most that fit into the GPU's free memory"
    except Exception as error:  # a stage runs without its plan
        size = config.microbatch
        reason = f"no plan for {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    shared = config.divisor(config.minibatch_size // distributed.size())
    size = min(round(-distributed.largest(-float(size))), shared)
    if distributed.rank() == 0:
        print(f"microbatch_size auto: {size} ({reason})", flush=True)
    return size


def _recorded(config: PPOConfig, record: Path) -> int | None:
    """Return the size that a run began with, if its record has one that still divides the minibatch."""
    options = (read_object_or_none(record) or {}).get("config")
    size = options.get("microbatch_size") if isinstance(options, dict) else None
    return size if isinstance(size, int) and size > 0 and config.minibatch_size % size == 0 else None
