"""Estimates of memory and time by phase, of disk, and of the largest microbatch that fits."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf.config import PPOConfig, RewardConfig, SFTConfig, TrainingConfig
from rlhf.doctor.plan.phases import REHEARSALS, Stage
from rlhf.doctor.plan.rates import BUDGET, Gpu, calibrated, on_gpu
from rlhf.doctor.plan.rehearsal import Count, Operator
from rlhf.doctor.plan.twin import layers, shortened
from rlhf.doctor.plan.work import Work
from rlhf.models.compute import Compute, rehearsed_on
from rlhf.models.sampling import SAMPLED_AT_ONCE
from rlhf.run.memory import free_bytes
from rlhf.run.optim import parameter_bytes

#: Depths that are rehearsed; deeper models are their straight line.
DEPTHS = (2, 4)
#: Main memory beside what is alive, bytes: what libraries load late, and the kernels that they compile, one for each shape of
#: a product (a sampler has most).
LATE = 65_000_000
KERNELS = {SFTConfig: 30_000_000, RewardConfig: 150_000_000, PPOConfig: 200_000_000}
#: Main memory that a byte of activations takes: the allocator's holes and the kernels' own buffers; more where each pass has
#: another length. Measured on two shapes that `benchmarks/plan.py` does not have, and on the demo.
HELD, HELD_VARIED = 1.8, 2.4
#: Share of the longest pass's tokens below which the usual one differs.
VARIED = 0.95
#: What a GPU's library takes for itself, bytes (an assumption), and its allocator for a byte.
CONTEXT, GPU_HELD = 1_000_000_000, 1.1
#: An estimate may be too small by this factor: what fits has room for it. The largest of 20 that were measured
#: (benchmarks/plan.py) is 1.36.
MARGIN = 1.4


@dataclass(frozen=True)
class Phase:
    """Memory and time of a phase."""

    name: str
    peak: float
    """Bytes, of the whole process on a CPU."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, time and disk of a stage, as estimated."""

    stage: str
    phases: list[Phase]
    available: float
    """Bytes that there are for it."""
    parameters: int
    trained: int
    tokens: int
    """Tokens of prompts and answers that pass through training."""
    checkpoint: float
    """Bytes of one checkpoint."""
    disk: float
    microbatch: int
    """Rows of a pass."""
    fitting: int
    """Most rows of a pass that fit; 0 if none does."""
    source: str
    """Where the lengths come from."""

    @property
    def largest(self) -> int:
        """The power of two among the rows that fit; 0 if none does."""
        return 1 << (self.fitting.bit_length() - 1) if self.fitting else 0

    @property
    def peak(self) -> float:
        """Bytes of the phase that takes most."""
        return max(phase.peak for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Seconds of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        """True if the largest phase fits, with a margin for what the estimate may be off."""
        return MARGIN * self.peak <= self.available


@dataclass(frozen=True)
class _Rehearsed:
    """Counts of a stage at its full depth."""

    counts: dict[str, Count]
    trained: int
    weights: float
    """Bytes of the trained weights."""
    states: float


def stage_name(config: TrainingConfig) -> str:
    """Return the name of the stage that a config is of."""
    return {SFTConfig: "sft", RewardConfig: "reward", PPOConfig: "ppo"}[type(config)]


def rehearse(
    config: TrainingConfig, shape: PreTrainedConfig, dtype: torch.dtype, work: Work, *, on_cpu: bool
) -> _Rehearsed:
    """Rehearse a stage at two depths, and return what it counts at the model's own."""
    depth = layers(shape)
    kinds = getattr(shape.get_text_config(), "layer_types", None) or [None]
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    depths = [d * period for d in DEPTHS] if depth > DEPTHS[-1] * period else [depth]
    stages = [Stage(config, shortened(shape, d) if d != depth else shape, dtype, work, on_cpu=on_cpu) for d in depths]
    with nullcontext() if on_cpu else rehearsed_on("cuda"):
        for stage in stages:
            REHEARSALS[type(config)](stage)
    times = (depth - depths[0]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0.0

    def line(first: float, last: float) -> float:
        return first + times * (last - first)

    def sizes(measure: Callable[[Stage], float]) -> float:
        return line(measure(stages[0]), measure(stages[-1]))

    counts = {}
    for name, first in stages[0].counts.items():
        last = stages[-1].counts[name]
        operators = Counter[Operator]()
        for operator in first.operators.keys() | last.operators.keys():
            operators[operator] = max(round(line(first.operators[operator], last.operators[operator])), 0)
        sums = {size: round(line(getattr(first, size), getattr(last, size))) for size in ("peak", "lasting")}
        counts[name] = Count(**sums, operators=operators)
    return _Rehearsed(
        counts,
        round(sizes(lambda stage: sum(p.numel() for p in stage.trained))),
        sizes(lambda stage: parameter_bytes(stage.trained)),
        sizes(lambda stage: stage.states),
    )


def process_bytes(
    name: str, counts: dict[str, Count], config: TrainingConfig, *, on_gpu: bool = False, varied: bool = False
) -> float:
    """Return the memory of the process in a phase, or that of the GPU.

    Args:
        varied: the passes of the phase have many lengths.
    """
    factor = GPU_HELD if on_gpu else HELD_VARIED if varied and not isinstance(config, PPOConfig) else HELD
    held = max(_held(counts, count, factor) for key, count in counts.items() if key.split(":")[0] == name)
    if on_gpu:
        return CONTEXT + held
    kernels = KERNELS[type(config)] if name != "load" else 0
    return libraries() + LATE + kernels + held


def _held(counts: dict[str, Count], count: Count, factor: float) -> float:
    """Return what a pass takes: weights, gradients and states as they are, what comes and goes with the allocator's share."""
    lasting = counts["load"].peak - counts["load"].lasting + count.lasting
    return lasting + factor * max(count.peak - lasting, 0)


_LIBRARIES: list[float] = []


def libraries() -> float:
    """Return the memory of a process that has imported all that a stage imports, measured once in this one."""
    if not _LIBRARIES:
        _LIBRARIES.append(psutil.Process().memory_info().rss)
    return _LIBRARIES[0]


def updates(config: Any, work: Work) -> int:
    """Return the number of optimiser updates (in PPO: rollouts)."""
    if isinstance(config, PPOConfig):
        return config.num_updates
    if config.max_steps > 0:
        return int(config.max_steps)
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(math.ceil(work.training / step * config.num_train_epochs), 1)


def passes(config: Any, work: Work) -> dict[str, dict[str, float]]:
    """Return how often each count of a phase is made in the whole run, by phase."""
    rounds = updates(config, work)
    if isinstance(config, PPOConfig):
        parts = config.rollout_batch_size / config.microbatch
        share = config.num_eval_samples / config.rollout_batch_size
        rollout = {"rollout: prompts": 1.0, "rollout: a token": config.response_length - 1.0}
        return {
            "rollout": {name: rounds * times for name, times in rollout.items()},
            "score": {"score": rounds * parts},
            "optimise": {
                "optimise": rounds * parts * config.num_ppo_epochs,
                "optimise: update": rounds * config.num_ppo_epochs * config.rollout_batch_size / config.minibatch_size,
            },
            "evaluate": {**{name: 2 * share * times for name, times in rollout.items()}, "score": 2 * share * parts},
        }
    held_out = min(work.validation, config.max_eval_samples)
    evaluations = rounds // config.eval_steps + 1
    training = {"train": float(rounds * config.gradient_accumulation_steps), "train: update": float(rounds)}
    if not isinstance(config, RewardConfig):
        return {
            "train": {**training, "evaluate": evaluations * math.ceil(held_out / config.per_device_eval_batch_size)}
        }
    rows = (
        sum(map(len, work.spread)) / len(work.spread) / config.per_device_eval_batch_size
    )  # passes of a prompt's rows
    training["evaluate: scores"] = evaluations * held_out * rows
    sampled = config.card_policy_samples / SAMPLED_AT_ONCE
    scored = work.validation * rows + (3 * config.card_policy_samples + config.card_likelihood_responses) / 32
    return {
        "train": training,
        "evaluate": {
            "evaluate: prompts": sampled,
            "evaluate: a token": sampled * config.response_length,
            "evaluate: scores": scored,
        },
    }


def make_plan(
    config: TrainingConfig,
    shape: PreTrainedConfig,
    compute: Compute,
    work: Work,
    *,
    gpu: Gpu | None = None,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Return what a stage takes on this machine, or on a GPU by its published figures.

    Args:
        budget: seconds of the calibration on this machine.
    """
    on_cpu = gpu is None and compute.device.type == "cpu"
    result = rehearse(config, shape, compute.dtype, work, on_cpu=on_cpu)
    schedule = passes(config, work)
    total = Counter[Operator]()
    for row in schedule.values():
        for name, times in row.items():
            for operator, calls in result.counts[name].operators.items():
                total[operator] += round(calls * times)
    cost = on_gpu(gpu) if gpu else calibrated(total, compute.device, budget=budget, clock=clock)
    usual = _usual_share(config, work)

    def seconds(row: dict[str, float]) -> float:
        return sum(
            (1.0 if name.endswith(": update") else usual) * times * calls * cost(operator)
            for name, times in row.items()
            for operator, calls in result.counts[name].operators.items()
        )

    names = dict.fromkeys(key.split(":")[0] for key in result.counts)
    device = {"on_gpu": not on_cpu, "varied": usual < VARIED}
    phases = [
        Phase(name, process_bytes(name, result.counts, config, **device), seconds(schedule.get(name, {})))
        for name in names
    ]
    available = gpu.memory if gpu else free_bytes(compute.device) + (libraries() if on_cpu else 0)
    rows = microbatch(config)
    checkpoint = result.weights + result.states
    return Plan(
        stage=stage_name(config),
        phases=phases,
        available=available,
        parameters=parameters(shape),
        trained=result.trained,
        tokens=_tokens(config, work),
        checkpoint=checkpoint,
        disk=3 * checkpoint + 3 * result.weights + _snapshots(config, result.weights) + 50_000_000,
        microbatch=rows,
        fitting=_fitting(rows, phases, available, _lasting(result.counts)),
        source=work.source,
    )


def _lasting(counts: dict[str, Count]) -> int:
    """Return the bytes of gradients and optimiser states that training adds to what is loaded."""
    return max(counts[name].lasting for name in ("train", "optimise") if name in counts) - counts["load"].lasting


def _fitting(rows: int, phases: list[Phase], available: float, lasting: float) -> int:
    """Return the most rows of a pass that fit: activations grow with the rows, weights, gradients and states do not."""
    fixed = phases[0].peak + lasting
    peak = max(phase.peak for phase in phases if phase.name in ("train", "optimise"))
    room = available / MARGIN - fixed
    return int(rows * room / max(peak - fixed, 1.0)) if room > 0 else 0


def microbatch(config: Any) -> int:
    """Return the rows of a pass with gradients: responses, demonstrations, or prompts of a reward model."""
    return int(config.microbatch if isinstance(config, PPOConfig) else config.per_device_train_batch_size)


def parameters(shape: PreTrainedConfig) -> int:
    """Return the number of a model's parameters, from its config."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return int(AutoModelForCausalLM.from_config(shape).num_parameters())


def _usual_share(config: TrainingConfig, work: Work) -> float:
    """Return the tokens of a usual pass as a share of the largest's."""
    rows = microbatch(config)
    largest, usual = (
        sum(len(p) + len(a) for group in groups for p, a in group)
        for groups in (work.largest_groups(rows), work.usual_groups(rows))
    )
    return min(usual / largest, 1.0)


def _tokens(config: Any, work: Work) -> int:
    if isinstance(config, PPOConfig):
        return round(config.total_episodes * work.mean_tokens)
    rows = updates(config, work) * config.gradient_accumulation_steps * config.per_device_train_batch_size
    return round(rows * work.mean_tokens)


def _snapshots(config: Any, weights: float) -> float:
    steps = getattr(config, "snapshot_steps", None)
    return weights * (config.num_updates // steps) if steps else 0.0


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON has it."""
    summary = {name: getattr(plan, name) for name in ("largest", "peak", "seconds", "fits")}
    return {**dataclasses.asdict(plan), **summary}
